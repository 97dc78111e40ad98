"""What error feedback carries on a client from round to round.

Both the residual before its last round and the one after are kept, so that a round that is repeated, or
whose reply was not used, starts from the one before it. Each value is kept as a bfloat16, so the two together
take 4 bytes an entry; what this rounds off (at most 2^-9 of a residual that is itself a rounding error) is
the only thing that is ever lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmask.codecs.base import State, Vector
from fedmask.codecs.plain import from_bf16, to_bf16


@dataclass(frozen=True)
class Residual:
    """``before`` and ``after`` round ``round``: 2 bytes an entry each, none for "nothing carried"."""

    round: int
    before: bytes
    after: bytes

    def at_start_of(self, round: int, counted: int | None = None) -> State:
        """float32 [n] to begin ``round`` with; None: nothing, also when what it began with is long gone.

        ``counted``: the last round whose reply the server used, where it says that a later one was not.
        """
        if round < self.round:
            return None
        used = self.round < round and (counted is None or self.round <= counted)
        data = self.after if used else self.before
        return from_bf16(np.frombuffer(data, "<u2")) if data else None

    @classmethod
    def of(cls, round: int, before: State, after: Vector) -> Residual:
        """After ``round``, which began with ``before``: float32 [n] each."""
        return cls(round, b"" if before is None else to_bf16(before).tobytes(), to_bf16(after).tobytes())
