"""The t entries of largest absolute value, t = round(fraction x n), and where they stand.

Positions are packed near log2 C(n, t) (``pack_indices``); the values go through another codec. Used with
error feedback alone (Stich et al. 2018, arXiv 1809.07599): what is left out is sent later.

    1 + n   name of the values' codec       varint  t
    varint  bytes of the positions          positions, values
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedmask.codecs.base import Codec, Encoded, State, Vector
from fedmask.codecs.bits import Reader, varint
from fedmask.codecs.errors import Malformed, UnknownCodec
from fedmask.codecs.indices import pack_indices, unpack_indices


class TopK:
    """Option ``fraction`` or ``fraction/codec``, such as ``topk:0.05/int8``; 0.1 and fp16 unless said."""

    name = "topk"
    biased = True
    keeps_state = False

    def __init__(self, codecs: Callable[[], dict[str, Callable[[str], Codec]]], option: str = "") -> None:
        self._codecs = codecs
        fraction, _, inner = option.partition("/")
        try:
            self._fraction = float(fraction) if fraction else 0.1
        except ValueError:
            self._fraction = 0.0
        if not 0 < self._fraction <= 1:
            raise UnknownCodec(f"codec 'topk': expected a fraction in (0, 1], found {fraction!r}")
        name, _, inner_option = inner.partition(":")
        self._values = self._value_codec(name or "fp16", inner_option)

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """float32[n] -> bytes. Equal magnitudes: the first ones are sent."""
        t = min(vector.size, max(1, round(self._fraction * vector.size)))
        chosen = _largest(vector, t)
        positions = pack_indices(chosen, vector.size)
        values, _ = self._values.encode(vector[chosen], None, generator)
        name = self._values.name.encode()
        return b"".join((varint(len(name)), name, varint(t), varint(len(positions)), positions, values)), None

    def decode(self, data: memoryview, size: int) -> Vector:
        """The inverse, float32[size]: zeros where nothing was sent."""
        reader = Reader(data)
        name = bytes(reader.take(reader.varint("name of the values' codec"), "name of the values' codec"))
        t = reader.varint("count of positions")
        if t > size:
            raise Malformed(f"codec 'topk': expected at most {size} positions, found {t}")
        chosen = unpack_indices(reader.take(reader.varint("bytes of positions"), "positions"), size, t)
        inner = self._value_codec(name.decode("ascii", "replace"))
        values = inner.decode(reader.take(reader.left, "values"), t)
        vector = np.zeros(size, np.float32)
        vector[chosen] = values
        return vector

    def _value_codec(self, name: str, option: str = "") -> Codec:
        codecs = self._codecs()
        if name not in codecs or name == self.name:
            valid = ", ".join(c for c in codecs if c != self.name)
            raise UnknownCodec(f"codec 'topk': expected a codec of values ({valid}), found {name!r}")
        return codecs[name](option)


def _largest(vector: Vector, t: int) -> NDArray[np.int64]:
    """Sorted positions of the t largest magnitudes; ties at the threshold go to the first."""
    if t == vector.size:
        return np.arange(t)
    size = np.abs(vector)
    threshold = np.partition(size, size.size - t)[size.size - t]
    above = np.flatnonzero(size > threshold)
    ties = np.flatnonzero(size == threshold)[: t - above.size]
    return np.sort(np.concatenate([above, ties]))
