"""Who watches a run: the command line draws progress bars with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Observer(Protocol):
    """Called by the server from its own thread; must not raise and must not block for long."""

    def on_start(self, folder: Path, rounds: int, clients: int) -> None:
        """The run begins: where it writes, how many rounds, how many clients in all."""

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        """Round ``round`` asks these clients.

        Without any: they join, before round 1 (``round`` 0) or to go on after ``round``.
        """

    def on_reply(self, client: int) -> None:
        """A client answered or failed (-1: a node whose partition is not known)."""

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        """The round's row, as written to ``rounds.jsonl``."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run is over and its folder is complete."""


class Silent:
    """An observer that does nothing."""

    def on_start(self, folder: Path, rounds: int, clients: int) -> None:
        """Nothing."""

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        """Nothing."""

    def on_reply(self, client: int) -> None:
        """Nothing."""

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Nothing."""


class Several:
    """Tells each of several observers, in order; one may be added while it watches."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def on_start(self, folder: Path, rounds: int, clients: int) -> None:
        """See ``Observer``."""
        for one in self.observers:
            one.on_start(folder, rounds, clients)

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        """See ``Observer``."""
        for one in self.observers:
            one.on_round_start(round, clients)

    def on_reply(self, client: int) -> None:
        """See ``Observer``."""
        for one in self.observers:
            one.on_reply(client)

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        """See ``Observer``."""
        for one in self.observers:
            one.on_round_end(row)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """See ``Observer``."""
        for one in self.observers:
            one.on_end(summary)
