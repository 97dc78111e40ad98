"""The sign of each entry and the mean absolute value of its block: 1 bit a value.

Scaled sign compression, used with error feedback alone (Karimireddy et al. 2019, arXiv 1901.09847): by itself
it is biased, and descent with it can fail on convex problems. With the mean as scale the residual's norm is
always below the vector's.
"""

from __future__ import annotations

import numpy as np

from fedmask.codecs.base import Encoded, State, Vector
from fedmask.codecs.blocks import bf16_scales, block_size, frame, rows_of, unframe


class Sign:
    """1 bit a value and two bytes a block."""

    name = "sign"
    biased = True
    keeps_state = False

    def __init__(self, option: str = "") -> None:
        self._block = block_size(self.name, option)

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """float32[n] -> 2 + 2 ceil(n / block) + ceil(n / 8) bytes."""
        rows = rows_of(vector, self._block)
        counts = np.full(rows.shape[0], self._block, np.float32)
        counts[vector.size // self._block :] = vector.size % self._block  # the last block may be short
        halves, _ = bf16_scales(np.abs(rows).sum(axis=1) / counts)
        return frame(halves, (rows >= 0).view(np.uint8), vector.size, 1), None

    def decode(self, data: memoryview, size: int) -> Vector:
        """The inverse, float32[size]."""
        scales, codes = unframe(self.name, data, size, 1)
        values = codes.astype(np.float32)
        values *= 2
        values -= 1
        values *= scales[:, None]
        return values.reshape(-1)[:size]
