"""A run on a SuperLink of this machine that a test follows from outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def started(config: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    """``fedmask run`` as a user starts it, in a session of its own."""
    where = ["--engine", "superlink", "--connection", "here", "--config", str(config)]
    command = [sys.executable, "-m", "experiments.cli", "run", *where, *["--resume"] * resume]
    with (config.parent / "said").open("ab") as said:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[3],
            start_new_session=True,
        )


def until(moment: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    """Wait for ``moment``; AssertionError if the run ends before, or after four minutes."""
    deadline = time.monotonic() + 240
    while not moment():
        assert run.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.02)


def open_rows(journal: Path) -> list[list[int | str]]:
    """The journal's rows of the round that is open."""
    with contextlib.suppress(OSError, ValueError):
        return [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    return []
