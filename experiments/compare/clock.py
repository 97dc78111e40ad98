"""What a run costs its clients in CPU time, and how much memory the process held."""

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
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from server.observer import Silent

_FILE = "clock.jsonl"


class TimedApp(ClientApp):
    """A ClientApp around another one that adds the CPU seconds of each answer to a clock."""

    def __init__(self, inner: ClientApp, clock: Clock) -> None:
        super().__init__()
        self._inner = inner
        self._clock = clock

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer, and count the CPU time of it, decoding and encoding included."""
        began = time.process_time()
        try:
            return self._inner(message, context)
        finally:
            self._clock.add(time.process_time() - began)


class Clock(Silent):
    """Sums the clients' CPU seconds and the peak of memory, round by round, in the run's folder.

    So a run that goes on after a break knows what it had cost by then.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self._open = 0.0
        self._rows: list[dict[str, float]] = []

    def add(self, seconds: float) -> None:
        """CPU seconds of one answer."""
        self._open += seconds

    def on_start(self, folder: Path, rounds: int, clients: int) -> None:
        """Read what an earlier part of the run has left."""
        with contextlib.suppress(OSError, ValueError):
            lines = self._file.read_text(encoding="utf-8").splitlines()
            self._rows = [json.loads(line) for line in lines]

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        """Close the round's account."""
        number = float(row["round"])
        self._rows = [one for one in self._rows if one["round"] < number]
        self._rows.append(
            {"round": number, "client_seconds": self._open, "peak_memory_bytes": float(peak_memory() or 0)}
        )
        self._open = 0.0
        beside = self._file.with_name(_FILE + ".part")
        beside.write_text("".join(json.dumps(one) + "\n" for one in self._rows), encoding="utf-8")
        os.replace(beside, self._file)  # half a file would forget what the run had cost by then

    @property
    def client_seconds(self) -> float:
        """CPU seconds of all clients in all rounds, joining included."""
        return sum(row["client_seconds"] for row in self._rows)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Most resident memory of the process up to the last round; None where the system does not say."""
        found = max((row["peak_memory_bytes"] for row in self._rows), default=0.0)
        return int(found) or None


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
