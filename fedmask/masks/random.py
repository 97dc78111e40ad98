"""Data-free controls: entries drawn from a seed that all parties share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from fedmask.masks.base import Mask, Rule, mask_size
from fedmask.masks.magnitude import magnitude
from fedmask.rng import rng_for
from fedmask.space import ParameterSpace, parameter_space


def random(model: nn.Module, rule: Rule) -> Mask:
    """k distinct eligible entries, uniform over the space, drawn from ``rule.seed``.

    ``per_tensor`` has no meaning for a uniform draw and is ignored.
    """
    space = parameter_space(model, rule.eligible)
    return Mask(draw(space, mask_size(rule.density, space.eligible_size), rule.seed), space, rule)


def draw(space: ParameterSpace, k: int, seed: int, band: int = 0) -> np.ndarray:
    """k distinct eligible flat indices (int64, sorted), uniform; each ``band`` of a seed is another draw."""
    rng = rng_for(seed, -1, -1, "mask") if band == 0 else rng_for(seed, band, -1, "mask")
    drawn = rng.choice(space.eligible_size, size=k, replace=False, shuffle=False)
    return _flat(np.sort(drawn.astype(np.int64)), space.excluded)


def random_matched(model: nn.Module, rule: Rule) -> Mask:
    """As many entries of each tensor as the smallest-magnitude mask holds, drawn uniformly inside it.

    What is left of the magnitude mask when its choice inside the tensors is taken away: near zero the
    weights of a tensor are nearly evenly spread, so the smallest are almost a random draw whose share of
    a tensor falls with the tensor's spread.
    """
    smallest = magnitude(model, replace(rule, name="magnitude"))
    space, rng = smallest.space, rng_for(rule.seed, -1, -1, "mask")
    counts = [part.size for part in space.split(smallest.indices)]
    first = np.cumsum([0, *space.eligible_sizes])  # in ranks among the eligible entries
    parts = [
        start + np.sort(rng.choice(size, size=count, replace=False, shuffle=False).astype(np.int64))
        for start, size, count in zip(first, space.eligible_sizes, counts, strict=False)
    ]
    return Mask(_flat(np.concatenate(parts), space.excluded), space, rule)


def _flat(ranks: np.ndarray, excluded: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Sorted ranks among eligible entries -> flat indices."""
    indices = ranks
    for start, stop in excluded:
        indices[indices >= start] += stop - start
    return indices
