"""Which replies counted, for clients whose error feedback builds on them.

A client cannot know whether its reply was used: it may have come too late, been refused or not been needed.
What it rounded off in one that was not belongs to nothing that anybody has. So the next message names the
last round whose reply counted, and the client goes back to what it carried before the later one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

_CLIENTS, _ROUNDS, _UNUSED = "counted/clients", "counted/rounds", "counted/unused"


@dataclass(frozen=True)
class Counted:
    """``last``: by client, the last round whose reply counted; ``unused``: who was asked after it in vain.

    ``begun``: who was asked in a round that broke off and is done again. Who is asked again knows by the
    round's number; the others are in ``unused`` after it.
    """

    last: Mapping[int, int] = field(default_factory=dict)
    unused: frozenset[int] = frozenset()
    begun: frozenset[int] = frozenset()

    def after(self, round: int, asked: Iterable[int], good: Collection[int]) -> Counted:
        """After ``round``, in which clients were ``asked`` and the replies of the ``good`` ones counted."""
        unused = (self.unused | self.begun | set(asked)) - set(good)
        return Counted({**self.last, **dict.fromkeys(good, round)}, frozenset(unused))

    def told(self, client: int) -> int | None:
        """The round that the client's next message names (0: none has counted yet); None: no need to."""
        return self.last.get(client, 0) if client in self.unused else None

    def tensors(self) -> dict[str, np.ndarray]:
        """As int64 arrays by name, for the file that a run goes on from; nothing for nothing."""
        if not self.last and not self.unused:
            return {}
        pairs = zip(*self.last.items(), strict=True) if self.last else ((), ())
        clients, rounds = (np.array(values, np.int64) for values in pairs)
        return {_CLIENTS: clients, _ROUNDS: rounds, _UNUSED: np.array(sorted(self.unused), np.int64)}

    @classmethod
    def read(cls, tensors: Mapping[str, np.ndarray]) -> Counted:
        """The inverse of ``tensors``."""
        if _CLIENTS not in tensors:
            return cls()
        last = dict(zip(tensors[_CLIENTS].tolist(), tensors[_ROUNDS].tolist(), strict=True))
        return cls(last, frozenset(tensors[_UNUSED].tolist()))
