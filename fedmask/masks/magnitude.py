"""Masks from the magnitude of pre-trained weights: no data, no gradient, no task.

PaFi (Liao, Meng, Monz, ACL 2023, arXiv 2305.16742) trains the weights of smallest magnitude under
one global threshold. ``largest`` is its opposite, kept as a control. Here k = round(density x N)
where implementations round down, and ties are broken so that every party agrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn

from fedmask.masks.base import Mask, Rule, mask_size
from fedmask.masks.select import magnitude_keys, smallest, without
from fedmask.space import ParameterSpace, backbone_parameters, float32_chunks, parameter_space
from fedmask.stored import TensorReader, stored_reader


def magnitude(model: nn.Module, rule: Rule) -> Mask:
    """The k entries of smallest absolute stored value; ties by tensor order, then flat index."""
    return _select(model, rule, largest=False)


def largest(model: nn.Module, rule: Rule) -> Mask:
    """The k entries of largest absolute stored value; ties by tensor order, then flat index."""
    return _select(model, rule, largest=True)


def _select(model: nn.Module, rule: Rule, *, largest: bool) -> Mask:
    space = parameter_space(model, rule.eligible)
    read = stored_reader(model, backbone_parameters(model))
    k = mask_size(rule.density, space.eligible_size)
    tensors = range(len(space.names))
    groups = [[i] for i in tensors] if rule.per_tensor else [list(tensors)]
    counts = shares(k, space.eligible_sizes) if rule.per_tensor else [k]
    parts = [
        smallest(lambda group=group: _keys(space, read, group, largest), count)  # type: ignore[misc]
        for group, count in zip(groups, counts, strict=True)
        if count
    ]
    return Mask(np.concatenate(parts), space, rule)


def shares(k: int, sizes: Sequence[int]) -> list[int]:
    """k split over tensors in proportion to their sizes, summing to k (largest remainder, first wins)."""
    total = sum(sizes)
    counts = [k * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in order[: k - sum(counts)]:
        counts[i] += 1
    return counts


def _keys(
    space: ParameterSpace, read: TensorReader, tensors: Sequence[int], largest: bool
) -> Iterator[tuple[int, np.ndarray]]:
    for i in tensors:
        start = space.offsets[i]
        for values in float32_chunks(read(space.names[i])):
            keys = magnitude_keys(values, space.names[i], largest=largest)
            yield from without(space.excluded, start, keys)
            start += keys.size
