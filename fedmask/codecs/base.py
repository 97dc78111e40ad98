"""The contract of a value codec."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmask.codecs.errors import UnknownCodec, WrongLength

Vector = NDArray[np.float32]
State = Vector | None
"""What a sender carries from one message to the next: the residual [n] of error feedback, or nothing."""

Encoded = tuple[bytes, State]


class Codec(Protocol):
    """Vector <-> bytes. Plain functions of their arguments: all that is remembered is the state passed in.

    The bytes are self-contained: whatever option the sender chose (a block size, a fraction) is in them,
    so the receiver needs the name and the number of values alone.
    """

    name: str
    """The name in the envelope."""
    biased: bool
    """Whether what it loses must be carried on: such a codec always works with error feedback."""
    keeps_state: bool
    """Whether ``encode`` returns a state that the next call needs (error feedback)."""

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """Finite float32[n] -> bytes and the state for the next call.

        ``state`` None: a new sender, nothing carried. ``generator`` draws stochastic rounding; without it
        the codec rounds to nearest.
        """
        ...

    def decode(self, data: memoryview, size: int) -> Vector:
        """Bytes -> float32[size]. The length is compared with ``size`` before anything is allocated.

        Raises ``WrongLength``, ``Truncated`` or ``Malformed``. Need not refuse NaN: the envelope does.
        """
        ...


def no_option(name: str, option: str) -> None:
    """Refuse an option for a codec that has none."""
    if option:
        raise UnknownCodec(f"codec {name!r} takes no option, found {option!r}; write {name!r} alone")


def check_length(name: str, found: int, expected: int, size: int) -> None:
    """Refuse a payload that cannot be ``size`` values of this codec."""
    if found != expected:
        raise WrongLength(f"codec {name!r}: expected {expected} bytes for {size} values, found {found}")
