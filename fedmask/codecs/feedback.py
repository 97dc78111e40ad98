"""Error feedback: what a codec lost in one message is added to the next (Seide et al. 2014; Karimireddy et
al. 2019, arXiv 1901.09847). The state is that residual. A sender without one, being new or having lost it,
starts from zero: it loses at most what one message lost.
"""

from __future__ import annotations

import numpy as np

from fedmask.codecs.base import Codec, Encoded, State, Vector
from fedmask.codecs.errors import WrongLength


class Feedback:
    """Another codec with error feedback. It rounds to nearest: the residual makes up for the bias."""

    biased = False
    keeps_state = True

    def __init__(self, codec: Codec) -> None:
        self.name = codec.name
        self._codec = codec

    def encode(self, vector: Vector, state: State, generator: np.random.Generator | None) -> Encoded:
        """Encode vector + residual; the next state is what was lost, float32[n]."""
        if state is not None and state.shape != vector.shape:
            raise WrongLength(
                f"codec {self.name!r}: expected a residual of {vector.size} values, found {state.size}; "
                "start again without one"
            )
        wanted = vector if state is None else vector + state
        data, _ = self._codec.encode(wanted, None, None)
        return data, wanted - self._codec.decode(memoryview(data), vector.size)

    def decode(self, data: memoryview, size: int) -> Vector:
        """The wrapped codec's own."""
        return self._codec.decode(data, size)
