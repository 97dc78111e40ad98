"""The down-link's frame: one array that holds the whole vector, or the changes that lead to it.

Little-endian:

    4  magic "FMCH"    1  format version
    4  version: rounds that the vector has behind it (signed)
    4  base: the version that the changes start from (signed), -1 when the vector is there whole
    4  CRC-32 of the vector that the changes must lead to, as float32; 0 when it is there whole
    2  number of envelopes, and for each: varint of its length, the envelope (``fedmask.codecs``)

A whole vector is one envelope. A client that holds the newest version already gets none.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from fedmask import codecs
from fedmask.codecs import Malformed, NotAnEnvelope, Truncated, UnknownVersion
from fedmask.codecs.bits import Reader, varint

MAGIC = b"FMCH"
VERSION = 1
WHOLE = -1
_HEAD = struct.Struct("<4sBiiIH")


@dataclass(frozen=True)
class Frame:
    """What a frame says: see the module. ``envelopes``: in the order in which they apply."""

    version: int
    base: int
    checksum: int
    envelopes: tuple[bytes, ...]


def write_frame(version: int, base: int, checksum: int, envelopes: Sequence[bytes]) -> bytes:
    """The bytes of a frame: 19, and the envelopes with 1 to 9 before each."""
    head = _HEAD.pack(MAGIC, VERSION, version, base, checksum, len(envelopes))
    return b"".join((head, *(part for one in envelopes for part in (varint(len(one)), one))))


def read_frame(data: bytes) -> Frame:
    """The inverse of ``write_frame``; envelopes are cut apart, not read. Raises ``EnvelopeError``."""
    if len(data) < _HEAD.size:
        raise Truncated(f"frame: expected at least {_HEAD.size} bytes, found {len(data)}; send it again")
    magic, format_version, version, base, checksum, count = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise NotAnEnvelope(f"frame: expected to begin with {MAGIC!r}, found {magic!r}")
    if format_version != VERSION:
        raise UnknownVersion(
            f"frame: expected version {VERSION}, found {format_version}; update the older side"
        )
    if not (base == WHOLE and count == 1) and not (0 <= base <= version and count == version - base):
        raise Malformed(f"frame: {count} envelopes do not lead from version {base} to {version}")
    reader = Reader(memoryview(data)[_HEAD.size :])
    envelopes = tuple(bytes(reader.take(reader.varint("envelope"), "envelope")) for _ in range(count))
    reader.end("frame")
    return Frame(version, base, checksum, envelopes)


def payload_bytes(data: bytes) -> int:
    """Bytes of values and positions in a frame or in a single envelope, without any header."""
    if data[: len(MAGIC)] == MAGIC:
        return sum(codecs.payload_bytes(one) for one in read_frame(data).envelopes)
    return codecs.payload_bytes(data)
