"""Each value as a float: fp32 (exact), fp16 (IEEE 754 binary16) and bf16 (the upper half of an fp32).

fp16 keeps 11 significant bits from 6.1e-5 to 65504 (relative error at most 2^-11); below that it steps by
2^-24, so the error is at most 2^-25. A value above 65504 is refused when packing, not saturated: a clipped
update would be another update, and a change of that size means that training diverged.
bf16 keeps 8 significant bits (relative error at most 2^-8) over the whole range of fp32. Both round to
nearest even: not unbiased, but the error is far below the noise of a training step; ``+ef`` carries it on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmask.codecs.base import Encoded, State, Vector, check_length, no_option
from fedmask.codecs.errors import OutOfRange

FP16_MAX = 65504.0
BF16_MAX = float(np.uint32(0x7F7F0000).view(np.float32))


class Fp32:
    """4 bytes a value, exact."""

    name = "fp32"
    biased = False
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
    biased = False
    keeps_state = False

    def __init__(self, option: str = "") -> None:
        no_option(self.name, option)

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """float32[n] -> 2n bytes, little-endian. Raises ``OutOfRange`` above 65504."""
        _check_range(self.name, vector, FP16_MAX)
        return vector.astype("<f2").tobytes(), None

    def decode(self, data: memoryview, size: int) -> Vector:
        """2 * size bytes -> float32[size]."""
        check_length(self.name, len(data), 2 * size, size)
        return np.frombuffer(data, "<f2").astype(np.float32)


class Bf16:
    """2 bytes a value."""

    name = "bf16"
    biased = False
    keeps_state = False

    def __init__(self, option: str = "") -> None:
        no_option(self.name, option)

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """float32[n] -> 2n bytes, little-endian. Raises ``OutOfRange`` above 3.39e38."""
        _check_range(self.name, vector, BF16_MAX)
        return to_bf16(vector).tobytes(), None

    def decode(self, data: memoryview, size: int) -> Vector:
        """2 * size bytes -> float32[size]."""
        check_length(self.name, len(data), 2 * size, size)
        return from_bf16(np.frombuffer(data, "<u2"))


def to_bf16(values: Vector, *, up: bool = False) -> NDArray[np.uint16]:
    """float32[n] -> the upper halves, uint16[n]: to nearest even, or away from zero with ``up``."""
    bits = values.view(np.uint32)
    rest = np.uint32(0xFFFF) if up else np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return ((bits + rest) >> 16).astype("<u2")


def from_bf16(halves: NDArray[np.uint16]) -> Vector:
    """uint16[n] -> float32[n], exact."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _check_range(name: str, vector: Vector, most: float) -> None:
    largest = float(np.abs(vector).max(initial=0.0))
    if largest > most:
        raise OutOfRange(
            f"codec {name!r}: expected values up to {most:g}, found {largest:g}; "
            "send fp32 or lower the learning rate"
        )
