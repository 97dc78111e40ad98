"""One message through a real SuperLink and a real SuperNode, as processes of this machine; for ``message``.

Without TLS, on the loopback. The client holds all of BBC's rows, so that one SuperNode is the whole
federation; what can be kept on disk is kept, and the first round, which fills that, is not counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import clocked
from experiments.options import build_config
from experiments.superlink import run_superlink
from fedmask.errors import FederationError

SCRIPTS = Path(sysconfig.get_path("scripts"))
# Each part ends with the mark of its name in the notes of `clocked`.
PARTS = {
    "until the SuperNode has a process started": "began",
    "start of the process": "entered",
    "pull": "pulled",
    "unpack and load the app": "loaded",
    "work": "worked",
    "push": "pushed",
    "until the server app has the reply": "got",
}
START_SECONDS = 120.0


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Median seconds by part and in all of ``repeats`` training messages, and peak megabytes by process.

    ``folder``: a new one, for all that is written. Raises ``FederationError`` when a process does not start
    or the run fails.
    """
    notes = folder / "notes.jsonl"
    settings = {"steps": 1, "rounds": repeats + 1, "eval_rows": 100, "runs_dir": str(folder / "runs")}
    config = build_config(None, settings, tasks=["bbc:1"])
    with federation(folder, notes) as (address, peaks):
        run_superlink(config, address)
        memory = peaks()
    found = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    seconds = parts_of(found)[1:]
    for program in clocked.PROGRAMS:
        memory[program] = max(line["peak"] for line in found if line["program"] == program and "peak" in line)
    return {
        "seconds": {part: statistics.median(one[part] for one in seconds) for part in seconds[0]},
        "memory": memory,
    }


def parts_of(notes: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Seconds by part of each training message, in the order of sending, from the notes of ``clocked``."""
    sent = {name: line["at"] for line in notes for name in line.get("sent", ())}
    got = {line["got"]: line["at"] for line in notes if "got" in line}
    found = []
    for line in notes:
        if line.get("kind") == "train":
            marks = {**line, "got": got[line["message"]]}
            times = [sent[line["message"]], *(marks[mark] for mark in PARTS.values())]
            parts = {part: end - start for part, start, end in zip(PARTS, times, times[1:], strict=False)}
            found.append((times[0], {**parts, "the whole message": times[-1] - times[0]}))
    return [parts for _, parts in sorted(found, key=lambda one: one[0])]


@contextlib.contextmanager
def federation(folder: Path, notes: Path) -> Iterator[tuple[str, Any]]:
    """A SuperLink, its SuperExec and a SuperNode: the SuperLink's address, and a function that tells their
    peak memory in megabytes. Nothing of them is left afterwards."""
    bin, link, node = folder / "bin", f"127.0.0.1:{_free_port()}", f"127.0.0.1:{_free_port()}"
    bin.mkdir(parents=True)
    for program in clocked.PROGRAMS:
        words = (sys.executable, "-P", clocked.__file__, str(notes), program)
        (bin / program).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        (bin / program).chmod(0o755)
    env = {**os.environ, "PATH": os.pathsep.join([str(bin), str(SCRIPTS), os.environ.get("PATH", "")]),
           "FLWR_HOME": str(folder / "home"), "FEDMASK_STATE": str(folder / "state"),
           "FEDMASK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    commands = {
        "flower-superlink": ["flower-superlink", "--insecure", "--isolation", "process", *_at(link),
                             "--database", str(folder / "superlink.db")],
        "flower-superexec": ["flower-superexec", "--insecure", "--runtime-api-address", link],
        "flower-supernode": [sys.executable, "-m", "clients.node", "--insecure", "--superlink", link,
                             *_at(node), "--node-config", "partition-id=0 num-partitions=1"],
    }  # fmt: skip
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                started[name] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=folder,
                    start_new_session=True,
                )  # fmt: skip
            if name == "flower-superlink":
                _wait_for(link, started[name], folder / f"{name}.log")
        yield link, lambda: {name: _peak(process.pid) for name, process in started.items()}
    finally:
        for process in reversed(started.values()):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):  # what it started: it leads a session of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(15)


def _at(address: str) -> list[str]:
    host, _, port = address.rpartition(":")
    return ["--host", host, "--port", port]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/health", timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(encoding="utf-8", errors="replace").split("\n")[-5:]
            raise FederationError(f"the SuperLink at {address} does not answer: {' '.join(said)}")
        time.sleep(0.2)


def _peak(pid: int) -> float:
    """The most memory that a running process has had, in megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
