"""What the values of one message stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmask.layout import Layout

Vector = NDArray[np.float32]


class Step(Protocol):
    """How the values of a change lead from one version of the vector to the next."""

    def grown(self, vector: Vector) -> Vector:
        """``vector`` (float32 ``[n before]``) with room for the entries that come new with the change."""

    def taken(self, difference: Vector) -> Vector:
        """The values of the message (float32 ``[m]``), of the difference (float32 ``[n]``) that it is for."""

    def moved(self, grown: Vector, change: Vector) -> Vector:
        """A grown vector (float32 ``[n]``) and the message's values (float32 ``[m]``): the next vector."""


@dataclass(frozen=True, eq=False)
class Places:
    """The step of a growing union of entries.

    ``size``: the vector's length then; ``kept``: int64 ``[n before]``, where the values go that it had;
    ``places``: int64 ``[m]``, where the values of the message go.
    """

    size: int
    kept: NDArray[np.int64]
    places: NDArray[np.int64]

    def grown(self, vector: Vector) -> Vector:
        """See ``Step``."""
        out = np.zeros(self.size, np.float32)
        out[self.kept] = vector
        return out

    def taken(self, difference: Vector) -> Vector:
        """See ``Step``."""
        return difference[self.places]

    def moved(self, grown: Vector, change: Vector) -> Vector:
        """See ``Step``."""
        out = grown.copy()
        out[self.places] += change
        return out


@dataclass(frozen=True)
class Terms:
    """The segments of a message's values and the digest of the mask (64 hex digits) that they live on.

    The down-link's and the up-link's may differ, by client and by round. ``step``: what a change makes of
    the vector; None: it keeps its entries, and each of them has a value that is added. ``origin`` (float32
    ``[n]``): the weights from which a vector that is sent whole counts, where those are what its codec is to
    see (FLASC); None: it sees the vector.
    """

    layout: Layout
    digest: str
    step: Step | None = None
    origin: Vector | None = None

    def shown(self, vector: Vector) -> Vector:
        """What the codec sees of a vector that is sent whole: float32 ``[n]``."""
        return vector if self.origin is None else vector + self.origin

    def counted(self, values: Vector) -> Vector:
        """The vector (float32 ``[n]``) that such values stand for."""
        return values if self.origin is None else values - self.origin

    def grown(self, vector: Vector) -> Vector:
        """See ``Step``: float32."""
        return vector if self.step is None else self.step.grown(vector)

    def taken(self, difference: Vector) -> Vector:
        """See ``Step``: float32."""
        return difference if self.step is None else self.step.taken(difference)

    def moved(self, grown: Vector, change: Vector) -> Vector:
        """See ``Step``: float32."""
        return grown + change if self.step is None else self.step.moved(grown, change)
