"""Small vectorized tools: varints, a reader that never reads past the end, fixed-width integers.

Fixed-width packing splits a width into powers of two (11 bits = 8 + 2 + 1) and stores one plane for each.
A plane of 8, 16 or 32 bits is a plain little-endian array; one of 4, 2 or 1 bits fills each byte from its
lowest bits. So every step is one whole-array operation, whatever the width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmask.codecs.errors import Malformed, Truncated, WrongLength

_PIECES = (32, 16, 8, 4, 2, 1)
_MAX_VARINT_BYTES = 9  # 63 bits: every count and index fits an int64


def varint(value: int) -> bytes:
    """A non-negative integer below 2^63 in 7-bit groups, lowest first (LEB128): 1 to 9 bytes."""
    if not 0 <= value < 1 << 63:
        raise Malformed(f"expected an integer in [0, 2^63), found {value}")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Reads forward through bytes; asking for more than there is raises ``Truncated``."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int, what: str) -> memoryview:
        """The next ``count`` bytes, without a copy."""
        if count > self.left:
            raise Truncated(f"{what}: expected {count} more bytes, found {self.left}; send the message again")
        self._at += count
        return self._data[self._at - count : self._at]

    def varint(self, what: str) -> int:
        """The next integer as written by ``varint``."""
        value = 0
        for group in range(_MAX_VARINT_BYTES):
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << (7 * group)
            if byte < 0x80:
                return value
        raise Malformed(f"{what}: expected an integer of up to {_MAX_VARINT_BYTES} bytes, found more")

    def end(self, what: str) -> None:
        """Refuse bytes that nobody asked for."""
        if self.left:
            raise WrongLength(f"{what}: expected no further bytes, found {self.left}")


def fixed_bytes(count: int, width: int) -> int:
    """Bytes that ``pack_fixed`` makes of ``count`` integers of ``width`` bits."""
    return sum(-(-count * piece // 8) for piece in _PIECES if width & piece)


def pack_fixed(values: NDArray[np.integer], width: int) -> bytes:
    """Non-negative integers below 2^width (width 0 to 63) -> ``fixed_bytes(len(values), width)`` bytes."""
    planes = []
    shift = 0
    for piece in _PIECES:
        if width & piece:
            part = values >> shift if shift else values
            planes.append(_pack_piece(part, piece))
            shift += piece
    return b"".join(planes)


def unpack_fixed(data: bytes | memoryview, count: int, width: int) -> NDArray[np.int64]:
    """The inverse of ``pack_fixed`` as int64[count]; the bytes must be exactly as many as it makes."""
    expected = fixed_bytes(count, width)
    if len(data) != expected:
        raise WrongLength(f"expected {expected} bytes for {count} x {width} bits, found {len(data)}")
    out = np.zeros(count, np.int64)
    shift = at = 0
    for piece in _PIECES:
        if width & piece:
            size = -(-count * piece // 8)
            part = _unpack_piece(data[at : at + size], count, piece).astype(np.int64)
            out |= part << shift
            at += size
            shift += piece
    return out


def _pack_piece(values: NDArray[np.integer], piece: int) -> bytes:
    if piece >= 8:
        # Casting an integer array to a narrower unsigned type keeps its low bits, which is what is wanted.
        return values.astype(f"<u{piece // 8}").tobytes()
    return pack_small(values.astype(np.uint8) & np.uint8((1 << piece) - 1), piece).tobytes()


def _unpack_piece(data: bytes | memoryview, count: int, piece: int) -> NDArray[np.unsignedinteger]:
    if piece >= 8:
        return np.frombuffer(data, f"<u{piece // 8}", count)
    return unpack_small(np.frombuffer(data, np.uint8), count, piece)


def pack_small(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """uint8[n] below 2^width -> uint8[ceil(n * width / 8)], for widths 1, 2 and 4."""
    if width == 1:
        return np.packbits(values, bitorder="little")
    parts = 8 // width
    if values.size % parts:
        values = np.concatenate([values, np.zeros(-values.size % parts, np.uint8)])
    # Several bytes at a time, as one integer: shifting moves each of them next to the one before.
    wide = values.view(f"<u{parts}")
    out = wide.copy()
    for part in range(1, parts):
        out |= wide >> (part * (8 - width))
    return out.astype(np.uint8)


def unpack_small(data: NDArray[np.uint8], count: int, width: int) -> NDArray[np.uint8]:
    """The inverse of ``pack_small``: uint8[count]. ``data`` has exactly ceil(count * width / 8) bytes."""
    if width == 1:
        return np.unpackbits(data, count=count, bitorder="little")
    parts = 8 // width
    wide = data.astype(f"<u{parts}")
    out = wide.copy()
    for part in range(1, parts):
        out |= wide << (part * (8 - width))
    out &= int.from_bytes([(1 << width) - 1] * parts, "little")
    return out.view(np.uint8)[:count]
