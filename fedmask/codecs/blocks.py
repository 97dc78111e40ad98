"""Blocks with a scale each, the frame of the quantized codecs.

2  block size (entries that share a scale)
2  a scale for each block, bf16
   the codes of all entries, ``width`` bits each
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from fedmask.codecs.base import Vector, check_length
from fedmask.codecs.bits import Reader, pack_small, unpack_small
from fedmask.codecs.errors import Malformed, UnknownCodec
from fedmask.codecs.plain import from_bf16, to_bf16

DEFAULT_BLOCK = 256
MIN_BLOCK, MAX_BLOCK = 8, 4096  # the last block is filled up in memory, so its size is bounded
CHUNK = 1 << 16
"""Entries worked on at a time, so that the steps between find them in the cache."""


def block_size(name: str, option: str) -> int:
    """The option of a block codec: entries that share a scale, 8 to 4096; empty for 256."""
    if not option:
        return DEFAULT_BLOCK
    if not option.isascii() or not option.isdigit() or not MIN_BLOCK <= int(option) <= MAX_BLOCK:
        raise UnknownCodec(
            f"codec {name!r}: expected a block size in [{MIN_BLOCK}, {MAX_BLOCK}], found {option!r}"
        )
    return int(option)


def rows_of(vector: Vector, block: int) -> Vector:
    """float32[n] -> float32[ceil(n / block), block], the last row filled up with zeros."""
    missing = -vector.size % block
    if missing:
        vector = np.concatenate([vector, np.zeros(missing, np.float32)])
    return vector.reshape(-1, block)


def chunks(rows: int, block: int) -> list[slice]:
    """Row ranges of about ``CHUNK`` entries each."""
    step = max(1, CHUNK // block)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def frame(scales: NDArray[np.uint16], codes: NDArray[np.uint8], size: int, width: int) -> bytes:
    """bf16 scales [rows] and codes [rows, block] -> bytes."""
    flat = codes.reshape(-1)[:size]
    body = flat if width == 8 else pack_small(flat, width)
    return b"".join((struct.pack("<H", codes.shape[1]), scales.tobytes(), body.tobytes()))


def unframe(name: str, data: memoryview, size: int, width: int) -> tuple[Vector, NDArray[np.uint8]]:
    """Bytes -> scales as float32 [rows] and codes as uint8 [rows, block], the last row filled up."""
    block = int(struct.unpack("<H", Reader(data).take(2, f"codec {name!r}"))[0])
    if not MIN_BLOCK <= block <= MAX_BLOCK:
        raise Malformed(f"codec {name!r}: expected a block size in [{MIN_BLOCK}, {MAX_BLOCK}], found {block}")
    rows = -(-size // block)
    check_length(name, len(data), 2 + 2 * rows + -(-size * width // 8), size)
    scales = from_bf16(np.frombuffer(data, "<u2", rows, 2))
    packed = np.frombuffer(data, np.uint8, offset=2 + 2 * rows)
    codes = np.zeros(rows * block, np.uint8)
    codes[:size] = packed if width == 8 else unpack_small(packed, size, width)
    return scales, codes.reshape(rows, block)


def bf16_scales(values: Vector, *, up: bool = False) -> tuple[NDArray[np.uint16], Vector]:
    """Scales [rows] as they travel and as both sides then use them. Below 1e-30: zero."""
    halves = to_bf16(np.where(values < 1e-30, np.float32(0), values), up=up)
    return halves, from_bf16(halves)
