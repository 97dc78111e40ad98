"""int8h, int4h and int2h: a quantized codec's bytes in a Huffman code made for them.

Values of a block are spread like a bell, so its middle codes are frequent. The code is DEFLATE's (RFC 1951)
without string matching, by zlib: on real changes it comes within a few percent of the codes' entropy,
as near as zstandard and a range coder did (docs/bytes.md), and needs no package.

    varint  bytes of the codec      its bytes, deflated
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from fedmask.codecs.base import Codec, Encoded, State, Vector
from fedmask.codecs.bits import Reader, varint
from fedmask.codecs.errors import Malformed, WrongLength

_MOST_A_VALUE, _MOST_BESIDE = 2, 64  # no quantized codec makes more bytes than that: blocks are 8 or longer


class Huffman:
    """Another codec's bytes, deflated. Options are the other codec's."""

    biased = False
    keeps_state = False

    def __init__(self, make: Callable[[str], Codec], option: str = "") -> None:
        self._codec = make(option)
        self.name = self._codec.name + "h"

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """float32[n] -> bytes, how many depends on the values."""
        data, _ = self._codec.encode(vector, None, generator)
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        return varint(len(data)) + deflate.compress(data) + deflate.flush(), None

    def decode(self, data: memoryview, size: int) -> Vector:
        """The inverse, float32[size]. Never makes more bytes than ``size`` values can have."""
        reader = Reader(data)
        length = reader.varint("length before the Huffman code")
        if length > _MOST_A_VALUE * size + _MOST_BESIDE:
            raise WrongLength(f"codec {self.name!r}: {length} bytes are too many for {size} values")
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            found = inflate.decompress(reader.take(reader.left, "Huffman code"), length + 1)
        except zlib.error as error:
            raise Malformed(f"codec {self.name!r}: the Huffman code is damaged ({error})") from None
        if len(found) != length or not inflate.eof or inflate.unused_data:
            raise WrongLength(f"codec {self.name!r}: expected {length} bytes, found others; send it again")
        return self._codec.decode(memoryview(found), size)
