"""Which entries a run has changed by which version, and what that makes of its messages.

Version v is the state after v rounds. With masks that move or differ between clients its change lies at a
union of entries that grows, and a round changes some of them. With a moving mask every party knows both
from the recipe; with a mask a client the server knows them, and tells each client what is new to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedmask.channel import Places, Terms
from fedmask.codecs import pack_indices, unpack_indices
from fedmask.codecs.bits import Reader, varint
from fedmask.codecs.errors import Malformed
from fedmask.layout import Layout
from fedmask.masks import Mask, Rule
from fedmask.masks.bands import Schedule
from fedmask.space import ParameterSpace
from fedmask.unions import Indices, find, union, without
from fedmask.views import down_layout, up_layout


class Positions(Protocol):
    """Flat indices by version: int64, sorted."""

    def known(self, version: int) -> Indices:
        """All entries (int64) that ``version`` rounds have trained; none for 0."""

    def changed(self, version: int) -> Indices:
        """The entries (int64) that the last of ``version`` rounds trained."""


class ByRecipe:
    """Positions of a mask that moves by a schedule: nothing needs to be sent."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._known: dict[int, Indices] = {}

    def known(self, version: int) -> Indices:
        """See ``Positions`` (int64)."""
        if version not in self._known:
            before = self._known.get(version - 1)
            found = (
                self.schedule.moved(0, version + 1)
                if before is None
                else union(before, self.schedule.mask(version).indices)
            )
            self._known[version] = found
            while len(self._known) > 3:
                del self._known[next(iter(self._known))]
        return self._known[version]

    def changed(self, version: int) -> Indices:
        """See ``Positions`` (int64)."""
        return self.schedule.mask(version).indices


@dataclass
class ByHolders:
    """Positions of clients' own masks.

    ``masks``: int64 by client; ``trained``: by version, the clients that trained in its round.
    """

    masks: dict[int, Indices] = field(default_factory=dict)
    trained: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _unions: dict[frozenset[int], Indices] = field(default_factory=dict, repr=False)

    def known(self, version: int) -> Indices:
        """See ``Positions`` (int64)."""
        return self._union(
            frozenset(client for at, clients in self.trained.items() if at <= version for client in clients)
        )

    def changed(self, version: int) -> Indices:
        """See ``Positions`` (int64)."""
        return self._union(frozenset(self.trained[version]))

    def _union(self, clients: frozenset[int]) -> Indices:
        if clients not in self._unions:
            self._unions[clients] = union(*(self.masks[client] for client in sorted(clients)))
            while len(self._unions) > 8:
                del self._unions[next(iter(self._unions))]
        return self._unions[clients]

    def with_round(self, version: int, masks: Mapping[int, Indices]) -> ByHolders:
        """The positions after a round: ``masks`` (int64) of the clients that trained in it."""
        trained = {**self.trained, version: tuple(sorted(masks))}
        return ByHolders({**self.masks, **masks}, trained, dict(self._unions))


@dataclass
class ByMessage:
    """Positions as a client was told: int64 by version."""

    unions: dict[int, Indices]
    changes: dict[int, Indices]

    def known(self, version: int) -> Indices:
        """See ``Positions`` (int64)."""
        return self.unions[version]

    def changed(self, version: int) -> Indices:
        """See ``Positions`` (int64)."""
        return self.changes[version]


@dataclass(frozen=True, eq=False)
class UnionTerms:
    """What the values of a run's messages mean. ``layout``: a task's segments without any view's entries."""

    positions: Positions
    layout: Layout
    space: ParameterSpace
    rule: Rule

    def change(self, version: int) -> Terms:
        """Of the change that leads to ``version``."""
        before, after = self.positions.known(version - 1), self.positions.known(version)
        moved = self.positions.changed(version)
        layout = down_layout(self.layout, moved.size)
        rest = np.arange(layout.size - moved.size)
        places = Places(
            after.size + rest.size,
            np.concatenate([find(after, before)[0], after.size + rest]),
            np.concatenate([find(after, moved)[0], after.size + rest]),
        )
        return Terms(layout, self._digest(moved), places)

    def whole(self, version: int) -> Terms:
        """Of the whole vector of ``version``."""
        known = self.positions.known(version)
        return Terms(down_layout(self.layout, known.size), self._digest(known))

    def trained(self, mask: Mask) -> Terms:
        """Of what a client sends that trains ``mask``."""
        return Terms(up_layout(self.layout, mask.k), mask.digest)

    def _digest(self, indices: Indices) -> str:
        return Mask(indices, self.space, self.rule).digest


def pack_positions(
    positions: Positions, held: int, version: int, steps: bool, own: Indices | None, space: ParameterSpace
) -> bytes:
    """What a client that holds version ``held`` must be told to know the positions of ``version``.

    The entries that are new to it, and with ``steps`` for each version in between which of all known ones
    it changed (nothing where it is all of them). ``own``: int64, the client's mask, if it is known here: it
    need not be sent.
    """
    known = positions.known(version)
    new = without(known, union(positions.known(held), np.empty(0, np.int64) if own is None else own))
    packed = pack_indices(new, space.size, space.offsets)
    parts = [varint(held), varint(version), varint(int(own is not None)), varint(new.size)]
    parts += [varint(len(packed)), packed] if new.size else []
    parts.append(varint(int(steps)))
    for at in range(held + 1, version + 1) if steps else ():
        moved = positions.changed(at)
        ranks = b"" if moved.size == known.size else pack_indices(find(known, moved)[0], known.size)
        parts += [varint(len(ranks)), ranks]
    return b"".join(parts)


def new_entries(data: bytes) -> int:
    """How many entries ``pack_positions`` has told as new. Raises ``EnvelopeError``."""
    reader = Reader(data)
    return [reader.varint(what) for what in ("held", "version", "own", "new entries")][-1]


@dataclass(frozen=True)
class Told:
    """What ``pack_positions`` said, unread: ``held``, ``version``, whether the client's own mask counts."""

    held: int
    version: int
    own: bool
    new: Indices
    ranks: tuple[bytes, ...]


def read_positions(data: bytes, space: ParameterSpace) -> Told:
    """The first half of the inverse of ``pack_positions``. Raises ``EnvelopeError``."""
    reader = Reader(data)
    held, version, own, count = (reader.varint(what) for what in ("held", "version", "own", "new entries"))
    if held > version or own > 1 or count > space.size:
        raise Malformed(f"positions: versions {held} to {version} with {count} new entries make no sense")
    new = np.empty(0, np.int64)
    if count:
        new = unpack_indices(reader.take(reader.varint("indices"), "indices"), space.size, count=count)
    steps = reader.varint("steps")
    ranks = tuple(
        bytes(reader.take(reader.varint("ranks"), "ranks")) for _ in range(version - held if steps else 0)
    )
    reader.end("positions")
    return Told(held, version, bool(own), new, ranks)


def told_positions(told: Told, held: int, known: Indices, own: Indices) -> ByMessage:
    """The second half, for a client that holds version ``held``, its union ``known`` and its mask ``own``.

    int64, sorted; ``held`` from ``told.held`` on. Raises ``EnvelopeError``.
    """
    union_now = union(known, told.new, *([own] if told.own else []))
    positions = ByMessage({held: known, told.version: union_now}, {})
    if told.ranks:
        before = known
        for at in range(held + 1, told.version + 1):
            ranks = told.ranks[at - told.held - 1]
            moved = union_now if not ranks else union_now[unpack_indices(ranks, union_now.size)]
            positions.changes[at] = moved
            before = positions.unions[at] = union(before, moved)
    return positions
