"""Every message's bytes, by round, client, direction and kind: one row a message, one line of JSON a row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from fedmask.errors import DataError

Direction = Literal["up", "down"]
Kind = Literal["mask", "train", "evaluate"]
Status = Literal["ok", "rejected", "failed", "aborted"]
Column = Literal["payload_bytes", "message_bytes"]

_COUNTS = ("round", "client", "payload_bytes", "message_bytes")
_CHOICES = {"direction": get_args(Direction), "kind": get_args(Kind), "status": get_args(Status)}


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One message. ``round`` and ``client`` are -1 where there is none.

    ``payload_bytes``: values and indices alone. ``message_bytes``: the whole serialized message. ``status``:
    ``rejected`` for a reply that arrived and was refused, ``failed`` for one that never came (0 bytes) or
    said that the client could not do it; ``aborted``: both ways, in a round that broke off and was done
    again. Raises ``DataError`` for any other word or a negative size.
    """

    round: int
    client: int
    direction: Direction
    kind: Kind
    payload_bytes: int
    message_bytes: int
    status: Status = "ok"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value, least = getattr(self, name), 0 if name.endswith("_bytes") else -1
            if type(value) is not int or value < least:
                raise DataError(f"ledger: expected {name} to be an integer from {least}, found {value!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise DataError(f"ledger: expected {name} in {choices}, found {getattr(self, name)!r}")


@dataclass(frozen=True)
class Totals:
    """Sums over some rows."""

    messages: int = 0
    payload_bytes: int = 0
    message_bytes: int = 0


class Ledger:
    """Rows in the order in which they were added; sums over any of them."""

    def __init__(self, rows: Iterable[LedgerRow] = ()) -> None:
        self._rows = list(rows)
        self._written: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self._rows)

    def add(self, row: LedgerRow) -> None:
        """Append a row."""
        self._rows.append(row)

    def totals(self, *keys: str, **only: object) -> dict[tuple[int | str, ...], Totals]:
        """Sums by the values of ``keys`` (names of row fields), over the rows that match ``only``.

        ``totals("round", "direction", kind="train")`` -> ``{(1, "up"): Totals(...), ...}``, sorted by key.
        Raises ``DataError`` for a name that is no field.
        """
        _check_names((*keys, *only))
        sums: dict[tuple[int | str, ...], list[int]] = {}
        for row in self._rows:
            if all(getattr(row, name) == value for name, value in only.items()):
                entry = sums.setdefault(tuple(getattr(row, key) for key in keys), [0, 0, 0])
                entry[0] += 1
                entry[1] += row.payload_bytes
                entry[2] += row.message_bytes
        # A column holds numbers or words, never both, so the keys compare.
        return {key: Totals(*sums[key]) for key in sorted(sums)}

    def total(self, **only: object) -> Totals:
        """Sums over all rows that match ``only``, such as ``direction="up", kind="train"``."""
        return self.totals(**only).get((), Totals())

    def mean_per_client_round(self, direction: Direction, column: Column = "payload_bytes") -> float:
        """Bytes of all kinds in one direction, divided by the number of (round, client) pairs that trained.

        So what is sent once (a mask) is spread over the run. 0.0 when nobody trained.
        """
        pairs = self.totals("round", "client", direction=direction, kind="train")
        total: int = getattr(self.total(direction=direction), column)
        return total / len(pairs) if pairs else 0.0

    def write_jsonl(self, path: str | Path) -> None:
        """Append the rows that this ledger has not written to (or read from) ``path`` yet.

        Call it once a round: what is there stays. A last line that a crash left unfinished is cut off first.
        """
        target = Path(path).resolve()
        new = self._rows[self._written.get(target, 0) :]
        text = "".join(json.dumps(asdict(row), separators=(",", ":")) + "\n" for row in new)
        _cut_unfinished(target)
        with open(target, "ab") as file:
            file.write(text.encode())
        self._written[target] = len(self._rows)

    @classmethod
    def read_jsonl(cls, path: str | Path) -> Ledger:
        """The ledger in ``path``, ready to go on. Raises ``DataError`` naming the line that is not a row.

        A last line without its line break is the trace of an interrupted write and is left out.
        """
        source = Path(path).resolve()
        try:
            lines = source.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise DataError(f"{path}: expected a ledger, found none ({error.strerror})") from error
        ledger = cls(_read_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1))
        ledger._written[source] = len(ledger)
        return ledger


def _read_row(line: bytes, where: str) -> LedgerRow:
    try:
        return LedgerRow(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: expected a ledger row, found {line[:80]!r} ({error})") from error


def _cut_unfinished(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.truncate(path.read_bytes().rfind(b"\n") + 1)


def _check_names(names: Iterable[str]) -> None:
    valid = [field.name for field in fields(LedgerRow)]
    for name in names:
        if name not in valid:
            raise DataError(f"ledger: expected one of {', '.join(valid)}, found {name!r}")
