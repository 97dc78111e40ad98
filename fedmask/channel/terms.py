"""What the values of one message stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmask.layout import Layout


@dataclass(frozen=True, eq=False)
class Places:
    """How a vector of a growing union becomes the next one.

    ``size``: its length then; ``kept``: int64 ``[n before]``, where the values go that it had; ``moved``:
    int64 ``[m]``, where the values of the message go.
    """

    size: int
    kept: NDArray[np.int64]
    moved: NDArray[np.int64]


@dataclass(frozen=True)
class Terms:
    """The segments of a message's values and the digest of the mask (64 hex digits) that they live on.

    The down-link's and the up-link's may differ, by client and by round. ``places``: where a change of some
    of a growing vector's entries goes; None: the vector keeps its entries and all of them change.
    """

    layout: Layout
    digest: str
    places: Places | None = None

    def grown(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """``vector`` (float32 ``[n before]``) with room for the entries that come new with the change."""
        if self.places is None:
            return vector
        out = np.zeros(self.places.size, np.float32)
        out[self.places.kept] = vector
        return out

    def taken(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of a grown vector (float32 ``[n]``) the entries that the message has values for."""
        return vector if self.places is None else vector[self.places.moved]

    def moved(self, grown: NDArray[np.float32], change: NDArray[np.float32]) -> NDArray[np.float32]:
        """A grown vector (float32 ``[n]``) plus the change (float32 ``[m]``) in its places."""
        if self.places is None:
            return grown + change
        out = grown.copy()
        out[self.places.moved] += change
        return out
