"""Whole channels of the feed-forward part, drawn from a seed: a structured mask without data.

After S2FT (Yang et al., NeurIPS 2024, arXiv 2412.06289), which trains whole channels of coupled matrices so
that a permutation makes them one dense slice. Taken over: the feed-forward half in the form of its release,
some inputs of each block's last feed-forward matrix (``down_proj``), as many in every block, drawn at
random. Different here: no attention heads; the size is any k, so one channel a matrix may be cut; and
nothing is permuted: a channel's entries are trained like those of any mask, at a mask's speed.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from fedmask.errors import ConfigError
from fedmask.masks.base import Mask, Rule, mask_size
from fedmask.masks.select import shares
from fedmask.rng import rng_for
from fedmask.space import is_conv1d, parameter_space


def channels(model: nn.Module, rule: Rule) -> Mask:
    """k entries that fill whole channels: all weights of one intermediate value to the block's output.

    The channels of a matrix are drawn from ``rule.seed``; of the last one only the first outputs count if k
    needs no more. ``per_tensor`` has no meaning here and is ignored. ConfigError where k is more than all of
    these matrices hold, or the model has none.
    """
    space = parameter_space(model, rule.eligible)
    matrices = narrowing(model)
    wanted = mask_size(rule.density, space.eligible_size)
    sizes = [inputs * outputs for _, inputs, outputs, _ in matrices]
    if wanted > sum(sizes):
        raise ConfigError(
            f"density {rule.density:g}: {wanted:,} entries are more than the last feed-forward matrices hold"
            f" ({sum(sizes):,}); give at most {sum(sizes) / space.eligible_size:.4f}"
        )
    rng = rng_for(rule.seed, -1, -1, "mask")
    parts = []
    for (name, inputs, outputs, turned), count in zip(matrices, shares(wanted, sizes), strict=True):
        drawn = rng.permutation(inputs)[: -(-count // outputs)].astype(np.int64)
        rows = np.arange(outputs, dtype=np.int64)
        entries = drawn[:, None] * outputs + rows if turned else rows * inputs + drawn[:, None]
        parts.append(space.offsets[space.names.index(name)] + entries.reshape(-1)[:count])
    return Mask(np.sort(np.concatenate(parts)), space, rule)


def narrowing(model: nn.Module) -> list[tuple[str, int, int, bool]]:
    """The feed-forward matrices with more inputs than outputs: (name, inputs, outputs, stored transposed)."""
    from fedmask.trainables.adapters import feed_forward_layers  # which builds on masks

    found = []
    for name, layer in feed_forward_layers(model):
        shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
        turned = is_conv1d(layer)
        outputs, inputs = shape[::-1] if turned else shape
        if inputs > outputs:
            found.append((f"{name}.weight", inputs, outputs, turned))
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no feed-forward matrix that narrows, which this method trains; use"
            " method 'random'"
        )
    return found
