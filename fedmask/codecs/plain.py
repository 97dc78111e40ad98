"""Each value as a float: fp32 (exact) and fp16 (IEEE 754 binary16, round to nearest even).

fp16 keeps 11 significant bits from 6.1e-5 to 65504 (relative error at most 2^-11); below that it steps by
2^-24, so the error is at most 2^-25. A value above 65504 is refused when packing, not saturated: a clipped
update would be another update, and a change of that size means that training diverged.
"""

from __future__ import annotations

import numpy as np

from fedmask.codecs.base import Encoded, State, Vector, check_length, no_option
from fedmask.codecs.errors import OutOfRange

FP16_MAX = 65504.0


class Fp32:
    """4 bytes a value, exact."""

    name = "fp32"
    keeps_state = False

    def __init__(self, option: str = "") -> None:
        no_option(self.name, option)

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """float32[n] -> 4n bytes, little-endian."""
        return vector.astype("<f4", copy=False).tobytes(), None

    def decode(self, data: memoryview, size: int) -> Vector:
        """4 * size bytes -> float32[size]."""
        check_length(self.name, len(data), 4 * size, size)
        return np.frombuffer(data, "<f4").astype(np.float32)


class Fp16:
    """2 bytes a value."""

    name = "fp16"
    keeps_state = False

    def __init__(self, option: str = "") -> None:
        no_option(self.name, option)

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """float32[n] -> 2n bytes, little-endian. Raises ``OutOfRange`` above 65504."""
        largest = float(np.abs(vector).max(initial=0.0))
        if largest > FP16_MAX:
            raise OutOfRange(
                f"codec 'fp16': expected values up to {FP16_MAX:g}, found {largest:g}; "
                "send fp32 or lower the learning rate"
            )
        return vector.astype("<f2").tobytes(), None

    def decode(self, data: memoryview, size: int) -> Vector:
        """2 * size bytes -> float32[size]."""
        check_length(self.name, len(data), 2 * size, size)
        return np.frombuffer(data, "<f2").astype(np.float32)
