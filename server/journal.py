"""What a round has sent and heard so far, on disk at once: a server that is killed leaves it.

The ledger is written as a round ends, in the order of the clients. Until then its rows stand here in the
order in which they come about, short, one line a message. Replies are written as they arrive; what goes down
before it is sent, so that a server killed while it sends has counted too much rather than too little. Nobody
waits for the disk here: a machine that loses its power may lose what it says of the round that went on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from fedmask.errors import DataError
from fedmask.ledger import Direction, Kind, Ledger, LedgerRow
from server.exchange import Answer, row_of
from server.record import sync, writing

LEDGER, JOURNAL = "ledger.jsonl", "ledger.open.jsonl"


class Journal:
    """The rows of ``ledger`` that are not in its file yet. Raises ``FederationError`` on a full disk."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.path, self.ledger = folder / JOURNAL, ledger
        self.path.unlink(missing_ok=True)

    def note(self, round: int, kind: Kind, way: Direction, answers: Iterable[Answer]) -> None:
        """Append one line an answer: what was sent to it, or what came from it."""
        lines = [json.dumps(astuple(row_of(round, kind, way, answer))) for answer in answers]
        with writing(self.path.parent), self.path.open("ab", buffering=0) as file:
            if not file.tell():
                lines.insert(0, str(len(self.ledger)))
            file.write("".join(line + "\n" for line in lines).encode())

    def settle(self) -> None:
        """Write the ledger, which has all that was noted by now, and begin anew."""
        with writing(self.path.parent):
            self.ledger.write_jsonl(self.path.with_name(LEDGER))
            sync(self.path.with_name(LEDGER))
            self.path.unlink(missing_ok=True)

    def break_off(self) -> None:
        """The same in a round that did not end, of which the ledger may not have all. The disk may be why."""
        with suppress(OSError):
            rewrite_ledger(self.path.parent, with_journal(self.path.parent, list(self.ledger)))
            self.path.unlink(missing_ok=True)


def with_journal(folder: Path, rows: list[LedgerRow]) -> list[LedgerRow]:
    """``rows`` of the ledger's file, and after them what only the journal of a killed server has.

    The journal begins with how many rows there were before it. What the file has besides is the same messages
    (a round that failed, or a server killed while it wrote): then the longer account counts.
    """
    start, noted = _read(folder / JOURNAL)
    return rows[:start] + noted if len(noted) > len(rows[start:]) else rows


def rewrite_ledger(folder: Path, rows: Iterable[LedgerRow]) -> None:
    """Put ``rows`` in the place of the ledger's file, in one step."""
    part = folder / f"{LEDGER}.part"
    part.unlink(missing_ok=True)
    try:
        Ledger(rows).write_jsonl(part)
        sync(part)
        os.replace(part, folder / LEDGER)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[int, list[LedgerRow]]:
    """The journal up to its first unfinished line; nothing of one that is missing or damaged."""
    try:
        first, *lines = path.read_bytes().split(b"\n")[:-1]
        return int(first), list(_rows(lines))
    except (OSError, ValueError):
        return 0, []


def _rows(lines: Iterable[bytes]) -> Iterator[LedgerRow]:
    for line in lines:
        try:
            yield LedgerRow(*json.loads(line))
        except (ValueError, TypeError, DataError):
            return
