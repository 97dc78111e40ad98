"""A run over a SuperLink: submit it with ``flwr run``, follow it, and find out how it really ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
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
from server.record import FOLDER_LINE, write_json

# Run as a module of this interpreter: the script `flwr` need not be on the PATH.
_FLWR = [sys.executable, "-c", "from flwr.cli.app import app; app()"]
_STARTED = re.compile(r"Successfully started run (\d+)")
_FOLDER = re.compile(re.escape(FOLDER_LINE) + r" (.+) on (\S+)")
_ERROR = re.compile(r"(?:fedmask\.errors\.|\b)(\w*Error): (.+)")
_UNKNOWN_CONNECTION = re.compile(r"SuperLink connection '.*' not found in .*\.")
_ADDRESS = re.compile(r"\[?[A-Za-z0-9_.:-]+\]?:\d+")
_DIRECT = "direct"
_BOX = "│╭╮╰╯─ "  # what flwr draws around its errors
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_SETTLE_SECONDS = 60.0
_ANSWER_SECONDS = 30.0
_SURE = 5  # so often a run is said to be going on before that is believed


@dataclass(frozen=True)
class RemoteRun:
    """A run that ended well on a SuperLink.

    The ServerApp wrote ``folder`` on ``host``. ``summary`` is there when this machine sees that folder too.
    ``traffic``: the SuperLink's own counters of the run in bytes, ``inbound`` (from the SuperNodes) and
    ``outbound``; also in the folder's ``wire.json`` where that can be written from here.
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
    certificates: Path | None = None,
    resume: bool = False,
) -> RemoteRun:
    """Submit a run to a SuperLink and wait for its end.

    ``connection``: HOST:PORT (with TLS if ``certificates`` names the CA's file), or a name from Flower's
    config.toml (None: its default). ``show`` is called with each line of the run's log. ``options``: more
    options for ``flwr run``, such as ``--federation-config``. ``resume``: the ServerApp goes on with its
    newest unfinished run of the config's name; the settings must be those of then. The whole config travels
    as one JSON string. Raises ``FederationError`` when the run did not complete, whatever exit code
    ``flwr run`` has (0 even for a failed run), and ``ConfigError`` for an unknown connection.
    """
    with app_folder() as folder, tempfile.TemporaryDirectory(prefix="fedmask-run-") as scratch:
        settings = Path(scratch) / "run.toml"
        settings.write_text(run_config_toml(config, resume), encoding="utf-8")
        where, home = _connect(connection, certificates, Path(scratch))
        command = ["run", str(folder), *where, "--stream", "--run-config", str(settings), *options]
        return _end_of(*_follow(command, show, home), where, home, show)


def _end_of(
    code: int,
    lines: list[str],
    where: Sequence[str],
    home: dict[str, str],
    show: Callable[[str], None] | None,
) -> RemoteRun:
    """How a run really ended, that was followed to the end of its log."""
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
    status, traffic = _final_status(run_id, where, home)
    while status and not status.startswith(("finished:", "unknown")):  # the SuperLink was started again
        lines = _follow(["log", run_id, *where], show, home, len(lines))[1]
        text += "\n" + "\n".join(lines)
        status, traffic = _final_status(run_id, where, home)
    completed = status == "finished:completed"
    if status.startswith("finished:") and not (_FOLDER if completed else _ERROR).search(text):
        # It went on to its end while the SuperLink was on its way back, and nobody followed.
        text += "\n" + "\n".join(_follow(["log", run_id, *where], show, home, len(lines))[1])
    if not completed:
        errors = _ERROR.findall(text)
        why = ": ".join(errors[-1]) if errors else "its log says why (flwr log " + run_id + ")"
        raise FederationError(f"run {run_id} ended as {status}: {why}")
    found = _FOLDER.findall(text)
    if not found:
        raise FederationError(f"run {run_id} completed, but its log does not say where the results are")
    path, host = Path(found[-1][0]), found[-1][1]
    summary = _summary(path, run_id)
    if summary is not None and traffic:
        with contextlib.suppress(OSError):
            write_json(path / WIRE, {"run_id": run_id, **traffic})
    return RemoteRun(run_id, path, host, summary, traffic)


def _connect(
    connection: str | None, certificates: Path | None, scratch: Path
) -> tuple[list[str], dict[str, str]]:
    """What ``flwr`` is told about the SuperLink: arguments and environment."""
    if connection is None or not _ADDRESS.fullmatch(connection):
        if certificates is not None:
            raise ConfigError("--root-certificates: expected --connection HOST:PORT with it, found none")
        return [connection] if connection else [], {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": _own_port()}
    if certificates is not None and not certificates.is_file():
        raise ConfigError(f"--root-certificates: expected a file, found nothing at {certificates}")
    secured = f"root-certificates = {json.dumps(str(certificates.absolute()))}" if certificates else ""
    table = f"[superlink.{_DIRECT}]\naddress = {json.dumps(connection)}\n{secured or 'insecure = true'}\n"
    (scratch / "config.toml").write_text(table, encoding="utf-8")
    return [_DIRECT], {"FLWR_HOME": str(scratch)}


def _own_port() -> str:
    """The port of this user's local SuperLink: on Flower's own, ``:local:`` takes whatever answers there."""
    home = os.environ.get("FLWR_HOME") or str(Path.home() / ".flwr")
    number = int.from_bytes(hashlib.sha256(home.encode()).digest()[:4], "big")
    return os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(39100 + number % 20000))


def run_config_toml(config: RunConfig, resume: bool = False) -> str:
    """``config = "..."``: the whole config as one JSON string, quoted for TOML."""
    # A JSON string is a TOML string, but for one character that TOML wants escaped.
    quoted = json.dumps(config.model_dump_json(), ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"config = {quoted}\n" + ("resume = true\n" if resume else "")


def _follow(
    arguments: Sequence[str], show: Callable[[str], None] | None, home: dict[str, str], shown: int = 0
) -> tuple[int, list[str]]:
    """Exit code and lines of a ``flwr`` command; all but the first ``shown`` ones are shown."""
    lines: list[str] = []
    with subprocess.Popen(
        [*_FLWR, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=_environment() | home,
    ) as process:
        try:
            for line in process.stdout or ():
                plain = _COLOURS.sub("", line).rstrip()
                lines.append(plain)
                if plain.startswith(tuple("│╭╰")):  # told again, in one line, when the command ends
                    continue
                if show is not None and plain and len(lines) > shown:
                    show(plain)
        except BaseException:
            process.terminate()
            raise
    return process.returncode, lines


def _final_status(run_id: str, where: Sequence[str], home: dict[str, str]) -> tuple[str, dict[str, int]]:
    """``finished:...`` as the SuperLink says it, and its traffic counters.

    The log's stream can end a little earlier, and the SuperLink may be on its way back.
    """
    deadline, running = time.monotonic() + _SETTLE_SECONDS, 0
    while True:
        said, told = _ask(["ls", *where, "--run-id", run_id, "--format", "json"], home)
        status, traffic = _listed(said)
        if status.startswith("finished:"):
            return status, traffic
        running += bool(status)
        if running > _SURE:
            return status, traffic
        if time.monotonic() > deadline:
            return status or f"unknown ({_last(told.splitlines()) or 'no answer'})", traffic
        time.sleep(1.0)


def _ask(arguments: Sequence[str], home: dict[str, str]) -> tuple[str, str]:
    """What a ``flwr`` command says on its two streams; nothing if it has not ended in time."""
    try:
        asked = subprocess.run(
            [*_FLWR, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=_environment() | home,
            check=False,
            timeout=_ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:  # a SuperLink that takes calls and does not answer them
        return "", ""
    return asked.stdout, asked.stderr


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
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": programs, "COLUMNS": "1000", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


def _last(lines: Sequence[str]) -> str:
    """The last line that says something, without the box that may be around it."""
    inner = (line.strip(_BOX) for line in reversed(lines) if not line.startswith(("╭", "╰")))
    return next(filter(None, inner), "")


def _summary(folder: Path, run_id: str) -> dict[str, Any] | None:
    """The run's summary where its folder is to be seen, whatever this machine is called."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if str(record.get("flower_run")) != run_id:  # another machine's folder of the same name
            return None
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError, AttributeError):
        return None
