"""The named segments of a client's flat float32 vector."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_PREFIX = "head/"
RESIDUAL = "residual"
"""The segment that the server alone changes (fedmask.products): it travels down and never up."""


@dataclass(frozen=True)
class Segment:
    """One named run of values: ``mask``, ``bias``, ``backbone`` or ``head/<task>``."""

    name: str
    size: int

    @property
    def shared(self) -> bool:
        """Whether all clients share it; a head belongs to the clients of its task."""
        return not self.name.startswith(HEAD_PREFIX)


@dataclass(frozen=True)
class Layout:
    """Segments in order: the shared ones first, the task's head last."""

    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Number of values in the vector."""
        return sum(s.size for s in self.segments)

    @property
    def shared_size(self) -> int:
        """Number of values at the start of the vector that all clients share."""
        return sum(s.size for s in self.segments if s.shared)

    def slices(self) -> dict[str, slice]:
        """Where each segment lies in the vector."""
        out: dict[str, slice] = {}
        start = 0
        for segment in self.segments:
            out[segment.name] = slice(start, start + segment.size)
            start += segment.size
        return out


def sent(layout: Layout) -> Layout:
    """The segments of a client's vector that it sends: all but what the server alone changes."""
    return Layout(tuple(segment for segment in layout.segments if segment.name != RESIDUAL))
