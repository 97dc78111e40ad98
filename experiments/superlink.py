"""A run over a SuperLink: submit it with ``flwr run``, follow it, and find out how it really ended."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedmask._env  # noqa: F401  (its switches are passed on to flwr)

from experiments.bundle import app_folder
from experiments.runs import WIRE
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError
from server.app import FOLDER_LINE
from server.record import write_json

# Run as a module of this interpreter: the script `flwr` need not be on the PATH.
_FLWR = [sys.executable, "-c", "from flwr.cli.app import app; app()"]
_STARTED = re.compile(r"Successfully started run (\d+)")
_FOLDER = re.compile(re.escape(FOLDER_LINE) + r" (.+) on (\S+)")
_ERROR = re.compile(r"(?:fedmask\.errors\.|\b)(\w*Error): (.+)")
_UNKNOWN_CONNECTION = re.compile(r"SuperLink connection '.*' not found in .*\.")
_BOX = "│╭╮╰╯─ "  # what flwr draws around its errors
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_SETTLE_SECONDS = 60.0


@dataclass(frozen=True)
class RemoteRun:
    """A run that ended well on a SuperLink.

    The ServerApp wrote ``folder`` on ``host``. ``summary`` is there when that is this machine, else None.
    ``traffic``: the SuperLink's own counters of the run in bytes, ``inbound`` (from the SuperNodes) and
    ``outbound``; also in the folder's ``wire.json`` when it is on this machine.
    """

    run_id: str
    folder: Path
    host: str
    summary: dict[str, Any] | None
    traffic: dict[str, int]


def run_superlink(
    config: RunConfig,
    connection: str | None = None,
    *,
    show: Callable[[str], None] | None = None,
    options: Sequence[str] = (),
) -> RemoteRun:
    """Submit a run to a SuperLink and wait for its end.

    ``connection``: a name from Flower's config.toml (None: its default). ``show`` is called with each line
    of the run's log. ``options``: more options for ``flwr run``, such as ``--federation-config``. The whole
    config travels as one JSON string. Raises ``FederationError`` when the run did not complete, whatever
    exit code ``flwr run`` has (0 even for a failed run), and ``ConfigError`` for an unknown connection.
    """
    where = [connection] if connection else []
    with app_folder() as folder, tempfile.TemporaryDirectory(prefix="fedmask-run-") as scratch:
        settings = Path(scratch) / "run.toml"
        settings.write_text(run_config_toml(config), encoding="utf-8")
        command = ["run", str(folder), *where, "--stream", "--run-config", str(settings), *options]
        code, lines = _follow(command, show)
    text = "\n".join(lines)
    started = _STARTED.search(text)
    if started is None:
        unknown = _UNKNOWN_CONNECTION.search(text)
        if unknown is not None:
            raise ConfigError(
                f"--connection: {unknown.group().rstrip('.')}; name one of its [superlink.NAME] tables"
            )
        raise FederationError(f"the SuperLink took no run: {_last(lines) or f'flwr run ended with {code}'}")
    run_id = started.group(1)
    status, traffic = _final_status(run_id, where)
    if status != "finished:completed":
        errors = _ERROR.findall(text)
        why = ": ".join(errors[-1]) if errors else "its log says why (flwr log " + run_id + ")"
        raise FederationError(f"run {run_id} ended as {status}: {why}")
    found = _FOLDER.findall(text)
    if not found:
        raise FederationError(f"run {run_id} completed, but its log does not say where the results are")
    path, host = Path(found[-1][0]), found[-1][1]
    summary = _summary(path, host)
    if summary is not None and traffic:
        write_json(path / WIRE, {"run_id": run_id, **traffic})
    return RemoteRun(run_id, path, host, summary, traffic)


def run_config_toml(config: RunConfig) -> str:
    """``config = "..."``: the whole config as one JSON string, quoted for TOML."""
    # A JSON string is a TOML string, but for one character that TOML wants escaped.
    quoted = json.dumps(config.model_dump_json(), ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"config = {quoted}\n"


def _follow(arguments: Sequence[str], show: Callable[[str], None] | None) -> tuple[int, list[str]]:
    lines: list[str] = []
    with subprocess.Popen(
        [*_FLWR, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=_environment(),
    ) as process:
        try:
            for line in process.stdout or ():
                plain = _COLOURS.sub("", line).rstrip()
                lines.append(plain)
                if plain.startswith(tuple("│╭╰")):  # told again, in one line, when the command ends
                    continue
                if show is not None and plain:
                    show(plain)
        except BaseException:
            process.terminate()
            raise
    return process.returncode, lines


def _final_status(run_id: str, where: Sequence[str]) -> tuple[str, dict[str, int]]:
    """``finished:...`` as the SuperLink says it, and its traffic counters.

    The log's stream can end a little earlier.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        asked = subprocess.run(
            [*_FLWR, "ls", *where, "--run-id", run_id, "--format", "json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=_environment(),
            check=False,
        )
        status, traffic = _listed(asked.stdout)
        if status.startswith("finished:"):
            return status, traffic
        if time.monotonic() > deadline:
            said = status or f"unknown ({_last(asked.stderr.splitlines()) or 'no answer'})"
            return said, traffic
        time.sleep(1.0)


def _listed(text: str) -> tuple[str, dict[str, int]]:
    """Status and traffic of the run that ``flwr ls --run-id`` lists; empty for any other answer."""
    try:
        run = json.loads(text)["runs"][0]
        counted = run["network-traffic"]
        return str(run["status"]), {way: int(counted[f"{way}-bytes"]) for way in ("inbound", "outbound")}
    except (ValueError, LookupError, TypeError):
        return "", {}


def _environment() -> dict[str, str]:
    # Wide, or rich would wrap the lines that are read here.
    return {**os.environ, "COLUMNS": "1000", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


def _last(lines: Sequence[str]) -> str:
    """The last line that says something, without the box that may be around it."""
    inner = (line.strip(_BOX) for line in reversed(lines) if not line.startswith(("╭", "╰")))
    return next(filter(None, inner), "")


def _summary(folder: Path, host: str) -> dict[str, Any] | None:
    path = folder / "summary.json"
    if host != socket.gethostname() or not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
