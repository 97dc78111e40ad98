"""SuperLinks and SuperNodes as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import httpx

SCRIPTS = Path(sysconfig.get_path("scripts"))


def free_port() -> int:
    """A port of the loopback that nobody listens on.

    Below those that Linux gives to connections (from 32768 on) and above Ray's: whoever asked binds it some
    seconds later, and it is not to be taken by then.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_768), 50):
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("expected a free port from 20000 to 32767, found none in 50 tries")


def start(home: Path, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    """A program of this environment in a session of its own; what it says is added to ``home/NAME.log``."""
    env = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.1"  # seconds, instead of one
    with (home / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [str(SCRIPTS / arguments[0]), *arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=home,
            env=env,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: it leads a session of its own."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """``kill -9`` for the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(15)


def members(home: Path) -> list[int]:
    """Processes that carry this test's FLWR_HOME, besides this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={home}".encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
    return found


def none_left(home: Path, seconds: float = 60.0) -> None:
    """AssertionError if some are still there after that time."""
    deadline = time.monotonic() + seconds
    while members(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert members(home) == []


def wait_for_health(port: int) -> None:
    """Until a SuperLink answers; AssertionError after three minutes."""
    deadline = time.monotonic() + 180
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        assert time.monotonic() < deadline, f"port {port} does not answer"
        time.sleep(0.2)
