"""The versioned envelope around one update, and every reason to refuse one.

Little-endian, nothing but numpy, struct and zlib:

    4  magic "FMSK"        1  format version      4  CRC-32 of all that follows
    2  header bytes        8  payload bytes
    header:  4 round (signed)   32 mask digest   1 + n codec name   2 number of segments
             and for each segment  1 + n name   8 number of values
    payload: what the codec made of the values

The checksum finds damage, not malice: a sender who wants to can always send other finite values.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from fedmask.codecs.base import Codec, Encoded, State, Vector
from fedmask.codecs.bits import Reader
from fedmask.codecs.errors import (
    AbsurdScale,
    BadChecksum,
    Malformed,
    NotAnEnvelope,
    NotFinite,
    StaleRound,
    Truncated,
    UnknownVersion,
    WrongDigest,
    WrongLayout,
    WrongLength,
)
from fedmask.codecs.registry import codec_for, decoder_for
from fedmask.layout import Layout, Segment

MAGIC = b"FMSK"
VERSION = 1
MAX_ABS = 1e4
"""No sound change of a weight comes near this; training that diverged does."""
_ROUNDED_UP = 1.01  # a codec's scale of 8 significant bits may make a value larger by less than 1 %

_PREFIX = struct.Struct("<4sBIHQ")
_CRC_FROM = 9  # the checksum covers everything behind itself


@dataclass(frozen=True)
class Header:
    """What an envelope says about itself. ``digest``: 64 hex digits; ``payload_bytes``: the values alone."""

    codec: str
    round: int
    digest: str
    layout: Layout
    payload_bytes: int


def pack_update(
    vector: Vector, layout: Layout, *, codec: str, digest: str, round: int, max_abs: float = MAX_ABS
) -> bytes:
    """float32[layout.size] -> the bytes of one update, for codecs without a state (fp32, fp16, ...).

    ``digest`` is the mask's, 64 hex digits. Raises ``EnvelopeError`` for what the receiver would refuse:
    a wrong length, NaN or infinity, a value beyond ``max_abs`` or beyond the codec's range.
    """
    if codec_for(codec).keeps_state:
        raise Malformed(f"codec {codec!r} keeps a residual between rounds; use encode_update and carry it")
    return encode_update(vector, layout, codec=codec, digest=digest, round=round, max_abs=max_abs)[0]


def encode_update(
    vector: Vector,
    layout: Layout,
    *,
    codec: str | Codec,
    digest: str,
    round: int,
    state: State = None,
    generator: np.random.Generator | None = None,
    max_abs: float = MAX_ABS,
) -> Encoded:
    """Like ``pack_update`` for any codec: takes the sender's state and generator, returns the next state.

    ``vector`` float32[layout.size]; ``codec``: a spec, or what ``codec_for`` made of one.
    """
    if vector.shape != (layout.size,) or vector.dtype != np.float32:
        raise WrongLength(f"expected float32 [{layout.size}], found {vector.dtype} {list(vector.shape)}")
    _check_values(vector, layout, max_abs)
    coder = codec_for(codec) if isinstance(codec, str) else codec
    payload, state = coder.encode(vector, state, generator)
    header = _write_header(Header(coder.name, round, digest, layout, len(payload)))
    body = struct.pack("<HQ", len(header), len(payload)) + header
    checksum = zlib.crc32(payload, zlib.crc32(body))
    return b"".join((MAGIC, struct.pack("<BI", VERSION, checksum), body, payload)), state


def unpack_update(
    data: bytes, *, layout: Layout, digest: str, round: int, max_abs: float = MAX_ABS
) -> Vector:
    """The bytes of one update -> float32[layout.size], a fresh array.

    The envelope must carry this layout, mask digest and round; each refusal is a subclass of
    ``EnvelopeError`` in one line. Nothing larger than the layout's values is allocated.
    """
    checksum, header_bytes, payload = _open(data)
    if (found := zlib.crc32(memoryview(data)[_CRC_FROM:])) != checksum:
        raise BadChecksum(f"envelope: expected checksum {checksum:08x}, found {found:08x}; send it again")
    header = _read_header(Reader(header_bytes), len(payload))
    coder = decoder_for(header.codec)
    if header.layout != layout:
        raise WrongLayout(f"envelope: expected segments {_show(layout)}, found {_show(header.layout)}")
    if header.digest != digest:
        raise WrongDigest(
            f"envelope: expected mask {digest}, found {header.digest}; "
            "both sides need the same checkpoint and recipe"
        )
    if header.round != round:
        raise StaleRound(f"envelope: expected an update of round {round}, found one of round {header.round}")
    with np.errstate(all="ignore"):  # NaN and infinity are looked for below, by name
        vector = coder.decode(payload, layout.size)
    _check_values(vector, layout, max_abs * _ROUNDED_UP)
    return vector


def read_header(data: bytes) -> Header:
    """What the envelope says, without decoding or verifying its values."""
    _, header, payload = _open(data)
    return _read_header(Reader(header), len(payload))


def payload_bytes(data: bytes) -> int:
    """Bytes of values (and positions, where the codec sends any) in an envelope, without its header."""
    return len(_open(data)[2])


def _open(data: bytes) -> tuple[int, memoryview, memoryview]:
    """Checksum as sent, header and payload, once the lengths fit."""
    if len(data) < _PREFIX.size:
        raise Truncated(f"envelope: expected at least {_PREFIX.size} bytes, found {len(data)}; send it again")
    magic, version, checksum, header_size, payload_size = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise NotAnEnvelope(f"envelope: expected to begin with {MAGIC!r}, found {magic!r}")
    if version != VERSION:
        raise UnknownVersion(f"envelope: expected version {VERSION}, found {version}; update the older side")
    total = _PREFIX.size + header_size + payload_size
    if len(data) < total:
        raise Truncated(f"envelope: expected {total} bytes, found {len(data)}; send it again")
    if len(data) > total:
        raise WrongLength(f"envelope: expected {total} bytes, found {len(data)}; send it again")
    view = memoryview(data)[_PREFIX.size :]
    return checksum, view[:header_size], view[header_size:]


def _write_header(header: Header) -> bytes:
    try:
        raw = bytes.fromhex(header.digest)
        parts = [struct.pack("<i32s", header.round, raw), _name(header.codec)]
        parts.append(struct.pack("<H", len(header.layout.segments)))
        parts += [_name(s.name) + struct.pack("<Q", s.size) for s in header.layout.segments]
    except (ValueError, struct.error) as error:
        raise Malformed(f"envelope: cannot write {header}: {error}") from error
    if len(raw) != 32:
        raise Malformed(f"envelope: expected a digest of 64 hex digits, found {header.digest!r}")
    packed = b"".join(parts)
    if len(packed) > 0xFFFF:
        raise Malformed(f"envelope: expected a header below 64 KiB, found {len(packed)} bytes")
    return packed


def _name(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<B", len(raw)) + raw


def _read_header(reader: Reader, payload_size: int) -> Header:
    def number(layout: str, what: str) -> int:
        value = struct.unpack(layout, reader.take(struct.calcsize(layout), what))[0]
        return int(value)

    def name(what: str) -> str:
        raw = bytes(reader.take(number("<B", what), what))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise Malformed(f"{what}: expected UTF-8, found {raw!r}") from None

    round = number("<i", "round")
    digest = bytes(reader.take(32, "mask digest")).hex()
    codec = name("codec name")
    count = number("<H", "number of segments")
    segments = tuple(Segment(name("segment name"), number("<Q", "segment size")) for _ in range(count))
    reader.end("header")
    return Header(codec, round, digest, Layout(segments), payload_size)


def _check_values(vector: Vector, layout: Layout, max_abs: float) -> None:
    # One pass finds both: a NaN anywhere makes the maximum NaN.
    largest = float(np.maximum(vector.max(initial=0.0), -vector.min(initial=0.0)))
    if largest <= max_abs:
        return
    if not np.isfinite(largest):
        at = int(np.flatnonzero(~np.isfinite(vector))[0])
        what = f"expected finite values, found {vector[at]} in {_segment_of(at, layout)}"
        raise NotFinite(f"{what}; training diverged, lower the learning rate")
    at = int(np.argmax(np.abs(vector)))
    raise AbsurdScale(
        f"expected changes up to {max_abs:g}, found {vector[at]:g} in {_segment_of(at, layout)}; "
        "training diverged, lower the learning rate"
    )


def _segment_of(at: int, layout: Layout) -> str:
    for name, where in layout.slices().items():
        if where.start <= at < where.stop:
            return f"{name}[{at - where.start}]"
    return f"[{at}]"


def _show(layout: Layout) -> str:
    return "+".join(f"{s.name}:{s.size}" for s in layout.segments) or "none"
