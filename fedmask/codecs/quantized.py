"""int8, int4 and int2: evenly spaced levels from -peak to +peak in each block of entries.

The idea of QSGD (Alistarh et al. 2017, arXiv 1610.02132), with the largest absolute value of a block where
it has the norm of the whole vector. With a generator the rounding is stochastic, up with the probability
of the remainder, so that its mean is the value (to 2^-17 of a step: 16 random bits decide). Without one it
is to nearest. int8 and int4 have an odd number of levels, so zero stays zero. int2 uses all four of its codes
(-1, -1/3, 1/3, 1 times the peak): against three levels (-1, 0, 1) that halves the error of normal values.
The error of rounding to nearest is at most peak / (levels - 1), below the peak itself, so a residual of
error feedback cannot grow without bound.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmask.codecs.base import Encoded, State, Vector
from fedmask.codecs.blocks import bf16_scales, block_size, chunks, frame, rows_of, unframe


class Quantized:
    """``bits`` bits a value and two bytes a block."""

    biased = False
    keeps_state = False

    def __init__(self, bits: int, option: str = "") -> None:
        self.name = f"int{bits}"
        self._bits = bits
        self._block = block_size(self.name, option)
        levels = 4 if bits == 2 else 2**bits - 1
        self._half = np.float32((levels - 1) / 2)
        self._last = np.uint8(levels - 1)

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """float32[n] -> 2 + 2 ceil(n / block) + ceil(n bits / 8) bytes."""
        rows = rows_of(vector, self._block)
        peaks = np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))
        # Rounded up, so that the peak itself lies within the levels.
        halves, scales = bf16_scales(peaks / self._half, up=True)
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
        codes = np.empty(rows.shape, np.uint8)
        for part in chunks(*rows.shape):
            steps = rows[part] * inverse[part, None]
            if generator is None:
                steps += self._half + np.float32(0.5)
            else:
                steps += _sixteen_bits(generator, steps.size).reshape(steps.shape) * np.float32(2.0**-16)
                steps += self._half + np.float32(2.0**-17)
            # Positive, so the cast rounds down; float32 may have rounded the last level up to the next.
            np.minimum(steps.astype(np.uint8), self._last, out=codes[part])
        return frame(halves, codes, vector.size, self._bits), None

    def decode(self, data: memoryview, size: int) -> Vector:
        """The inverse, float32[size]."""
        scales, codes = unframe(self.name, data, size, self._bits)
        values = np.empty(codes.shape, np.float32)
        for part in chunks(*codes.shape):
            np.subtract(codes[part], self._half, out=values[part])
            values[part] *= scales[part, None]
        return values.reshape(-1)[:size]


def _sixteen_bits(generator: np.random.Generator, count: int) -> NDArray[np.uint16]:
    """uint16[count], four from each 64-bit draw, in the same order on every machine."""
    draws = generator.integers(0, 2**64, -(-count // 4), dtype=np.uint64)
    return draws.astype("<u8", copy=False).view("<u2")[:count]
