"""What a run costs its clients in CPU time, how much memory the process held, and where entries were told.

The ledger knows a message's values and positions together; which of it were positions is counted here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedmask.flower import CONFIG, INDICES, PLACES, TRAIN
from fedmask.positions import new_entries
from server.observer import Silent

_FILE = "clock.jsonl"
POSITIONS = ("bytes_up", "bytes_down", "masks_up", "masks_down", "entries_down")


class TimedApp(ClientApp):
    """A ClientApp around another one: a clock adds each answer's CPU seconds, and the positions in it."""

    def __init__(self, inner: ClientApp, clock: Clock) -> None:
        super().__init__()
        self._inner = inner
        self._clock = clock

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer, and count the CPU time of it, decoding and encoding included."""
        began = time.process_time()
        try:
            answer = self._inner(message, context)
        finally:
            self._clock.add(time.process_time() - began)
        if message.metadata.message_type == TRAIN:
            self._clock.see(message, answer)
        return answer


class Clock(Silent):
    """Sums the clients' CPU seconds and the peak of memory, round by round, in the run's folder.

    So a run that goes on after a break knows what it had cost by then.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self._open = 0.0
        self._told = dict.fromkeys(POSITIONS, 0.0)
        self._rows: list[dict[str, float]] = []

    def add(self, seconds: float) -> None:
        """CPU seconds of one answer."""
        self._open += seconds

    def see(self, message: Message, answer: Message) -> None:
        """Count what a training message and its answer say about where entries lie."""
        if places := _packed(message, PLACES):
            self._told["bytes_down"] += len(places)
            self._told["entries_down"] += new_entries(places)
            self._told["masks_down"] += new_entries(places) > 0
        if indices := _packed(answer, INDICES):
            self._told["bytes_up"] += len(indices)
            self._told["masks_up"] += 1

    def on_start(self, folder: Path, rounds: int, clients: int) -> None:
        """Read what an earlier part of the run has left."""
        with contextlib.suppress(OSError, ValueError):
            lines = self._file.read_text(encoding="utf-8").splitlines()
            self._rows = [json.loads(line) for line in lines]

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        """Close the round's account."""
        number = float(row["round"])
        self._rows = [one for one in self._rows if one["round"] < number]
        row = {"round": number, "client_seconds": self._open, "peak_memory_bytes": float(peak_memory() or 0)}
        self._rows.append(row | self._told)
        self._open, self._told = 0.0, dict.fromkeys(POSITIONS, 0.0)
        beside = self._file.with_name(_FILE + ".part")
        beside.write_text("".join(json.dumps(one) + "\n" for one in self._rows), encoding="utf-8")
        os.replace(beside, self._file)  # half a file would forget what the run had cost by then

    @property
    def client_seconds(self) -> float:
        """CPU seconds of all clients in all rounds, joining included."""
        return sum(row["client_seconds"] for row in self._rows)

    @property
    def positions(self) -> dict[str, int] | None:
        """Sums over the training messages: bytes of positions, how many masks or parts of a union they were,
        and the entries in those that went down. None where a part of the run was not counted.
        """
        if not all(row.keys() >= set(POSITIONS) for row in self._rows):
            return None
        return {key: int(sum(row[key] for row in self._rows)) for key in POSITIONS}

    @property
    def peak_memory_bytes(self) -> int | None:
        """Most resident memory of the process up to the last round; None where the system does not say."""
        found = max((row["peak_memory_bytes"] for row in self._rows), default=0.0)
        return int(found) or None


def _packed(message: Message, key: str) -> bytes:
    record = message.content.get(CONFIG) if message.has_content() else None
    found = record.get(key) if isinstance(record, ConfigRecord) else None
    return found if isinstance(found, bytes) else b""


def reset_peak_memory() -> None:
    """Begin a new peak: what an earlier run of this process held is given back first. Linux only."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int | None:
    """Peak of resident bytes since ``reset_peak_memory``; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
