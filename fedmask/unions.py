"""A sparse change over a growing set of entries, and what one client has of it.

With a shared, fixed mask the run's change is one vector in the mask's order. With masks that differ between
clients or rounds it is a value at each entry of their union. Everything here takes time and memory
by the number of entries in hand, never by the size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmask.errors import FedmaskError

Indices = NDArray[np.int64]
Values = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SparseChange:
    """``values`` float32 ``[u]`` at ``indices`` int64 ``[u]``, sorted and unique; zero elsewhere."""

    indices: Indices
    values: Values

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape or self.indices.ndim != 1:
            raise FedmaskError(
                f"sparse change: expected a value an index, found {list(self.values.shape)} values for "
                f"{list(self.indices.shape)} indices"
            )

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(self.indices.size)


def no_change() -> SparseChange:
    """The change before anything was trained."""
    return SparseChange(np.empty(0, np.int64), np.empty(0, np.float32))


def find(within: Indices, wanted: Indices) -> tuple[Indices, NDArray[np.bool_]]:
    """Where ``wanted`` (int64 ``[w]``) lie in ``within`` (both sorted, unique), and which of them do.

    Positions of those that do not lie there have no meaning, but are safe to look up unless it is empty.
    """
    if not within.size:
        return np.zeros(wanted.size, np.int64), np.zeros(wanted.size, bool)
    at = np.minimum(np.searchsorted(within, wanted), within.size - 1)
    return at, within[at] == wanted


def union(*parts: Indices) -> Indices:
    """All indices of the sorted ``parts`` once, sorted: int64 ``[u]``."""
    filled = [part for part in parts if part.size]
    if len(filled) < 2:
        return filled[0] if filled else np.empty(0, np.int64)
    # A stable sort merges what is sorted already; numpy.unique would start anew, ten times as slow.
    merged: Indices = np.sort(np.concatenate(filled), kind="stable")
    first = np.concatenate([[True], merged[1:] != merged[:-1]])
    out: Indices = merged[first]
    return out


def without(indices: Indices, taken: Indices) -> Indices:
    """The ``indices`` that are not in ``taken`` (both int64, sorted, unique)."""
    return indices[~find(taken, indices)[1]]


def take(change: SparseChange, indices: Indices) -> Values:
    """The values of ``change`` at ``indices`` (int64 ``[w]``): float32 ``[w]``, zero where it has none."""
    at, known = find(change.indices, indices)
    out = np.zeros(indices.size, np.float32)
    out[known] = change.values[at[known]]
    return out


def grow(change: SparseChange, indices: Indices) -> SparseChange:
    """``change`` with ``indices`` (int64, sorted) among its entries: new ones have the value 0."""
    whole = union(change.indices, indices)
    return change if whole.size == change.size else SparseChange(whole, take(change, whole))


def put(change: SparseChange, indices: Indices, values: Values) -> SparseChange:
    """``change`` with ``values`` (float32 ``[w]``) at sorted ``indices`` (int64 ``[w]``), new ones too."""
    grown = grow(change, indices)
    out = grown.values.copy()
    out[find(grown.indices, indices)[0]] = values
    return SparseChange(grown.indices, out)
