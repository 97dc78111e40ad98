"""Choosing the k smallest of very many numbers exactly, without holding them.

Numbers are given as sortable keys: the bits of a non-negative float32 order like the number itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedmask.errors import CheckpointError
from fedmask.masks.base import Rule, mask_size
from fedmask.space import ParameterSpace, float32_chunks
from fedmask.stored import TensorReader

Chunks = Callable[[], Iterator[tuple[int, np.ndarray]]]
"""Gives (flat index of the first entry, keys uint32) in rising order of index, as often as called."""

_INFINITE = np.uint32(0x7F800000)  # float32 bit patterns from here on are infinite or not a number


def magnitude_keys(values: np.ndarray, name: str, *, largest: bool) -> np.ndarray:
    """Keys uint32 that order float32 ``values`` by rising (or, for ``largest``, falling) magnitude.

    CheckpointError naming the tensor where a value is infinite or not a number.
    """
    keys = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    if keys.max(initial=0) >= _INFINITE:
        raise CheckpointError(
            f"{name}: expected finite values, found inf or nan; the checkpoint is damaged, was stored in "
            "too small a dtype, or the loss has diverged"
        )
    return _INFINITE - keys if largest else keys


def without(
    ranges: tuple[tuple[int, int], ...], start: int, keys: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """The runs of ``keys`` (first entry: flat index ``start``) outside the ``[low, high)`` ranges."""
    at, stop = start, start + keys.size
    for low, high in ranges:
        low, high = max(low, at), min(high, stop)
        if low < high:
            if low > at:
                yield at, keys[at - start : low - start]
            at = high
    if at < stop:
        yield at, keys[at - start :]


def smallest(chunks: Chunks, k: int) -> np.ndarray:
    """Flat indices (int64 ``[k]``, sorted) of the k smallest keys, first come first among equals.

    Radix selection in three passes, so that nothing of the keys' size is held: count the high halves,
    count the low halves inside the bucket where the k-th key falls, collect.
    """
    high = np.zeros(1 << 16, dtype=np.int64)
    for _, keys in chunks():
        high += np.bincount(keys >> np.uint32(16), minlength=1 << 16)
    bucket = int(np.searchsorted(np.cumsum(high), k))
    before = int(high[:bucket].sum())
    low = np.zeros(1 << 16, dtype=np.int64)
    for _, keys in chunks():
        inside = keys[(keys >> np.uint32(16)) == bucket]
        low += np.bincount(inside & np.uint32(0xFFFF), minlength=1 << 16)
    last = int(np.searchsorted(np.cumsum(low), k - before))
    threshold = np.uint32((bucket << 16) | last)
    ties = k - before - int(low[:last].sum())
    parts = []
    for start, keys in chunks():
        found = np.flatnonzero(keys <= threshold)
        equal = keys[found] == threshold
        if ties < int(equal.sum()):
            found = found[~equal | (np.cumsum(equal) <= ties)]
            equal = keys[found] == threshold
        ties -= int(equal.sum())
        parts.append(found.astype(np.int64) + start)
    return np.concatenate(parts)


def choose(space: ParameterSpace, read: TensorReader, rule: Rule, *, largest: bool) -> np.ndarray:
    """Flat indices (int64 ``[k]``, sorted) of the k entries of smallest or largest magnitude.

    ``read`` gives the ranked numbers by tensor name: stored weights, or scores. Ties go by tensor order,
    then flat index; one threshold for all tensors, or one each with ``rule.per_tensor``. Padding rows
    never count. CheckpointError for a number that is not finite.
    """
    k = mask_size(rule.density, space.eligible_size)
    tensors = range(len(space.names))
    groups = [[i] for i in tensors] if rule.per_tensor else [list(tensors)]
    counts = shares(k, space.eligible_sizes) if rule.per_tensor else [k]
    parts = [
        smallest(group_chunks(space, read, group, largest), count)
        for group, count in zip(groups, counts, strict=True)
        if count
    ]
    return np.concatenate(parts)


def shares(k: int, sizes: Sequence[int]) -> list[int]:
    """k split over tensors in proportion to their sizes, summing to k (largest remainder, first wins)."""
    total = sum(sizes)
    counts = [k * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in order[: k - sum(counts)]:
        counts[i] += 1
    return counts


def group_chunks(space: ParameterSpace, read: TensorReader, tensors: Sequence[int], largest: bool) -> Chunks:
    """The sortable keys of some tensors' numbers, as often as wanted; ``largest`` turns the order."""
    return lambda: _keys(space, read, tensors, largest)


def _keys(
    space: ParameterSpace, read: TensorReader, tensors: Sequence[int], largest: bool
) -> Iterator[tuple[int, np.ndarray]]:
    for i in tensors:
        start = space.offsets[i]
        for values in float32_chunks(read(space.names[i])):
            keys = magnitude_keys(values, space.names[i], largest=largest)
            yield from without(space.excluded, start, keys)
            start += keys.size
