"""The client's side of the down-link: from a frame and what it holds to the vector."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from fedmask.channel.frames import WHOLE, read_frame
from fedmask.channel.terms import Terms
from fedmask.codecs import unpack_update
from fedmask.codecs.base import Vector
from fedmask.codecs.errors import StaleRound
from fedmask.errors import EnvelopeError


@dataclass(frozen=True)
class Received:
    """``vector`` float32 [n]: the server's public vector after ``version`` rounds."""

    version: int
    vector: Vector


class Behind(EnvelopeError):
    """The changes start from a version that this client does not hold; ``held`` is what it does hold."""

    def __init__(self, held: int, reason: str) -> None:
        super().__init__(reason)
        self.held = held


def receive(
    data: bytes, held: Received, version: int, terms: Callable[[int], Terms], whole: Terms | None = None
) -> Received:
    """The vector of ``version`` that a frame carries or leads to.

    ``terms(v)``: what the values of version v stand for; ``whole``: those of a whole vector, where they are
    others than the change's. Changes that the client has read before are skipped.
    Raises ``Behind`` when it must be sent the whole vector, ``EnvelopeError`` for unsound bytes.
    """
    frame = read_frame(data)
    if frame.version != version:
        raise StaleRound(f"frame: expected version {version}, found {frame.version}")
    if frame.base == WHOLE:
        meant = whole or terms(version)
        return Received(version, meant.counted(_read(frame.envelopes[0], meant, version)))
    if not frame.base <= held.version <= version:
        raise Behind(held.version, f"frame: expected to hold version {frame.base}, found {held.version}")
    vector = held.vector
    for at in range(held.version + 1, version + 1):
        step = terms(at)
        vector = step.moved(step.grown(vector), _read(frame.envelopes[at - frame.base - 1], step, at))
    if (found := zlib.crc32(vector.tobytes())) != frame.checksum:
        raise Behind(0, f"frame: expected a vector with checksum {frame.checksum:08x}, found {found:08x}")
    return Received(version, vector)


def _read(envelope: bytes, terms: Terms, version: int) -> Vector:
    return unpack_update(envelope, layout=terms.layout, digest=terms.digest, round=version)
