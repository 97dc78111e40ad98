"""Masks from the magnitude of pre-trained weights: no data, no gradient, no task.

PaFi (Liao, Meng, Monz, ACL 2023, arXiv 2305.16742) trains the weights of smallest magnitude under
one global threshold. ``largest`` is its opposite, kept as a control. Here k = round(density x N)
where implementations round down, and ties are broken so that every party agrees.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from fedmask.errors import CheckpointError
from fedmask.masks.base import Mask, Rule, mask_size
from fedmask.space import ParameterSpace, backbone_parameters, float32_chunks, parameter_space
from fedmask.stored import stored_reader

_FINITE = 0x7F800000  # float32 bit patterns from here on are infinite or not a number


def magnitude(model: nn.Module, rule: Rule) -> Mask:
    """The k entries of smallest absolute stored value; ties by tensor order, then flat index."""
    return _select(model, rule, largest=False)


def largest(model: nn.Module, rule: Rule) -> Mask:
    """The k entries of largest absolute stored value; ties by tensor order, then flat index."""
    return _select(model, rule, largest=True)


def _select(model: nn.Module, rule: Rule, *, largest: bool) -> Mask:
    space = parameter_space(model, rule.eligible)
    keys = _Keys(model, space, largest)
    if rule.per_tensor:
        sizes = [space.offsets[i + 1] - space.offsets[i] for i in range(len(space.names))]
        for start, stop in space.excluded:
            sizes[int(np.searchsorted(space.offsets, start, side="right")) - 1] -= stop - start
        counts = shares(mask_size(rule.density, space.eligible_size), sizes)
        parts = [_smallest(keys, [i], count) for i, count in enumerate(counts) if count]
        indices = np.concatenate(parts)
    else:
        everything = list(range(len(space.names)))
        indices = _smallest(keys, everything, mask_size(rule.density, space.eligible_size))
    return Mask(indices, space, rule)


def shares(k: int, sizes: list[int]) -> list[int]:
    """k split over tensors in proportion to their sizes, summing to k (largest remainder, first wins)."""
    total = sum(sizes)
    exact = [k * size / total for size in sizes]
    counts = [int(e) for e in exact]
    order = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in order[: k - sum(counts)]:
        counts[i] += 1
    return counts


class _Keys:
    """Chunks of sortable uint32 keys: the float bits without the sign, which order like |w|."""

    def __init__(self, model: nn.Module, space: ParameterSpace, largest: bool) -> None:
        self.space = space
        self._read = stored_reader(model, backbone_parameters(model))
        self._largest = largest

    def chunks(self, tensors: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(flat index of the first entry, keys uint32) in order, excluded ranges left out."""
        for i in tensors:
            start = self.space.offsets[i]
            for values in float32_chunks(self._read(self.space.names[i])):
                keys = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
                if int(keys.max(initial=0)) >= _FINITE:
                    raise CheckpointError(
                        f"{self.space.names[i]}: expected finite weights, found inf or nan; "
                        "the checkpoint is damaged or was stored in too small a dtype"
                    )
                if self._largest:
                    keys = np.uint32(_FINITE) - keys
                yield from self._without_excluded(start, keys)
                start += keys.size

    def _without_excluded(self, start: int, keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        at = start
        for low, high in self.space.excluded:
            low, high = max(low, at), min(high, start + keys.size)
            if low < high:
                if low > at:
                    yield at, keys[at - start : low - start]
                at = high
        if at < start + keys.size:
            yield at, keys[at - start :]


def _smallest(keys: _Keys, tensors: list[int], k: int) -> np.ndarray:
    """Flat indices of the k smallest keys, first come first among equals.

    Radix selection in three passes over the keys, so that nothing of the model's size is held: count
    the high halves, count the low halves inside the bucket where the k-th key falls, collect.
    """
    high = np.zeros(1 << 16, dtype=np.int64)
    for _, chunk in keys.chunks(tensors):
        high += np.bincount(chunk >> np.uint32(16), minlength=1 << 16)
    bucket = int(np.searchsorted(np.cumsum(high), k))
    before = int(high[:bucket].sum())
    low = np.zeros(1 << 16, dtype=np.int64)
    for _, chunk in keys.chunks(tensors):
        inside = chunk[(chunk >> np.uint32(16)) == bucket]
        low += np.bincount(inside & np.uint32(0xFFFF), minlength=1 << 16)
    last = int(np.searchsorted(np.cumsum(low), k - before))
    threshold = np.uint32((bucket << 16) | last)
    ties = k - before - int(low[:last].sum())
    parts = []
    for start, chunk in keys.chunks(tensors):
        found = np.flatnonzero(chunk <= threshold)
        equal = chunk[found] == threshold
        if ties < int(equal.sum()):
            found = found[~equal | (np.cumsum(equal) <= ties)]
            equal = chunk[found] == threshold
        ties -= int(equal.sum())
        parts.append(found.astype(np.int64) + start)
    return np.concatenate(parts)
