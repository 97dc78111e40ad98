"""The mean of updates under unequal masks: over the union of their entries, in time O(sum of k).

For comparison and for methods whose clients choose masks of their own; a shared mask needs none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmask.aggregation.fixed import check, fixed_sum, quantize
from fedmask.codecs import MAX_ABS
from fedmask.errors import FedmaskError

Over = Literal["all", "holders"]
_DIGIT = 16


@dataclass(frozen=True)
class SparseUpdate:
    """``indices`` int64 [k], sorted and unique; ``values`` float32 [k]; ``weight``: whole, at least 1."""

    indices: NDArray[np.int64]
    values: NDArray[np.float32]
    weight: int


def union_mean(
    updates: Sequence[SparseUpdate], size: int, over: Over = "all", largest: float = MAX_ABS
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The union of the masks (int64 [u], sorted) and the weighted mean at each of its entries (float32 [u]).

    ``size``: length of the space that the indices point into. ``over``: ``all`` counts an entry that a
    client lacks as a change of 0; ``holders`` averages over those that have it. Time and memory go with the
    sum of k, not with ``size``; the result does not depend on the order of the updates (fixed point).
    Raises ``FedmaskError`` for indices that are unsorted, repeated or outside, other lengths, no update.
    """
    if not updates:
        raise FedmaskError("union of masks: expected an update or more, found none")
    whole = sum(update.weight for update in updates)
    bounds = fixed_sum(0, max(whole, 1), largest)
    integers = []
    for update in updates:
        _check_indices(update, size)
        check(bounds, update.values, update.weight)
        part = np.empty(update.values.size, np.int64)
        quantize(update.values, update.weight / bounds.unit, np.empty(part.size), part)
        integers.append(part)
    places = np.concatenate([update.indices for update in updates])
    order = _sorting(places, size)
    places = places[order]
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    if not starts.size:
        return places, np.empty(0, np.float32)
    sums = np.add.reduceat(np.concatenate(integers)[order], starts).astype(np.float64) * bounds.unit
    if over == "all":
        return places[starts], (sums / whole).astype(np.float32)
    weights = np.concatenate([np.full(u.indices.size, u.weight, np.int64) for u in updates])
    return places[starts], (sums / np.add.reduceat(weights[order], starts)).astype(np.float32)


def _check_indices(update: SparseUpdate, size: int) -> None:
    indices = update.indices
    if indices.shape != update.values.shape or indices.ndim != 1:
        raise FedmaskError(
            f"union of masks: expected a value for each of {indices.size} indices, found {update.values.size}"
        )
    if indices.size and (indices[0] < 0 or indices[-1] >= size or np.any(indices[1:] <= indices[:-1])):
        raise FedmaskError(f"union of masks: expected sorted unique indices from 0 to {size - 1}")


def _sorting(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The order that sorts ``places``: a radix sort, 16 bits a pass, as NumPy sorts numbers of 16 bits."""
    order = np.arange(places.size)
    for shift in range(0, max(size - 1, 1).bit_length(), _DIGIT):
        digit = ((places[order] >> shift) & ((1 << _DIGIT) - 1)).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    return order
