"""The server's side of the down-link.

Beside its exact vector x the server keeps the public one, p: what every client that has read all changes
holds, to the bit.

    p_0 = 0        p_v = p_{v-1} + decode(encode(x_v - p_{v-1}))

What a change loses is in the next difference again: error feedback without a state of its own (as in
DoubleSqueeze, Tang et al. 2019, arXiv 1905.05957, and DORE, Liu et al. 2020, arXiv 1910.07561). All clients
train from the same p and all get the same changes, so each is encoded once. Version 0 is the pre-trained
model, which everybody holds.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from fedmask.channel.frames import WHOLE, write_frame
from fedmask.channel.terms import Terms
from fedmask.codecs import Codec, encode_update, payload_bytes, unpack_update
from fedmask.codecs.base import Vector

MOST_CHANGES = 1000
"""Versions kept besides the limit in bytes: only changes of nearly no bytes come near it."""


@dataclass(frozen=True)
class Public:
    """``vector`` float32 [n] is p after ``version`` rounds; ``changes``: the last envelopes, oldest first."""

    version: int
    vector: Vector
    changes: tuple[bytes, ...] = ()

    @property
    def oldest(self) -> int:
        """The oldest version from which the changes lead to this one."""
        return self.version - len(self.changes)


def start_public(size: int) -> Public:
    """Version 0: no change from the pre-trained model, float32 [size]."""
    return Public(0, np.zeros(size, np.float32))


def advance(public: Public, exact: Vector, terms: Terms, codec: Codec) -> Public:
    """The next version, towards ``exact`` (float32 [n], x of that version).

    Changes that together would be larger than the whole vector are let go, the oldest first.
    """
    version = public.version + 1
    before = terms.grown(public.vector)
    change, _ = encode_update(
        terms.taken(exact - before), terms.layout, codec=codec, digest=terms.digest, round=version
    )
    read = unpack_update(change, layout=terms.layout, digest=terms.digest, round=version)
    changes = [*public.changes, change][-MOST_CHANGES:]
    while sum(map(len, changes)) > _whole_bytes(exact.size, change):
        del changes[0]
    return Public(version, terms.moved(before, read), tuple(changes))


def frame_for(public: Public, held: int, terms: Terms) -> bytes:
    """What a client that holds version ``held`` needs: the changes since, or the whole where that is less.

    Changes that are kept are less. Either way the client then holds ``public.vector`` to the bit.
    """
    if public.oldest <= held <= public.version:
        checksum = zlib.crc32(public.vector.tobytes())
        return write_frame(public.version, held, checksum, public.changes[held - public.oldest :])
    return whole_frame(public.vector, public.version, terms, "fp32")


def _whole_bytes(size: int, change: bytes) -> int:
    """Bytes of the envelope of the whole vector; its header is as long as a change's."""
    return 4 * size + len(change) - payload_bytes(change)


def whole_frame(
    vector: Vector,
    version: int,
    terms: Terms,
    codec: str | Codec,
    generator: np.random.Generator | None = None,
) -> bytes:
    """A whole vector, float32 [n], as ``codec`` carries it; ``generator`` draws stochastic rounding."""
    envelope, _ = encode_update(
        terms.shown(vector),
        terms.layout,
        codec=codec,
        digest=terms.digest,
        round=version,
        generator=generator,
    )
    return write_frame(version, WHOLE, 0, (envelope,))
