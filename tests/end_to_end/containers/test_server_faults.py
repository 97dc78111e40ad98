"""The server's side is killed, as processes of this machine: no containers are needed for it.

One run: its server app is killed inside a round, between two rounds and inside another one, and its SuperLink
under it. Each time ``--resume`` goes on, or the run does so by itself; the end is that of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import fedmask._env  # noqa: F401  (before flwr is imported)

from experiments.engines import RemoteRun, run_superlink
from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig, from_dict
from fedmask.errors import FederationError
from fedmask.ledger import Ledger
from tests.apps.grids import read_rows, run_on
from tests.end_to_end.processes import called, free_port, kill, none_left, start, stop, wait_for_health
from tests.support import save_two_tasks

ROUNDS = 4


@dataclass
class Link:
    """A SuperLink with a database, a SuperExec for server apps, and two SuperNodes."""

    home: Path
    port: int = field(default_factory=free_port)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_link(self) -> None:
        here = ["--insecure", "--host", "127.0.0.1", "--port", str(self.port), "--isolation", "process"]
        words = ["flower-superlink", *here, "--database", str(self.home / "link.db")]
        self.link = start(self.home, "link", words)
        self.started.append(self.link)
        wait_for_health(self.port)

    def start_others(self) -> None:
        place = f"127.0.0.1:{self.port}"
        words = ["flower-superexec", "--insecure", "--runtime-api-address", place]
        self.started.append(start(self.home, "server", words))
        for node in range(2):
            words = ["flower-supernode", "--insecure", "--superlink", place, "--host", "127.0.0.1", "--port",
                     str(free_port()), "--node-config", f"partition-id={node} num-partitions=2"]  # fmt: skip
            self.started.append(start(self.home, f"node-{node}", words))

    def kill_server_app(self) -> None:
        found = called(self.home, "flwr-serverapp")
        assert len(found) == 1, found
        os.kill(found[0], signal.SIGKILL)


class Attempt:
    """A run that somebody follows, until it ends well or badly."""

    def __init__(self, config: RunConfig, resume: bool) -> None:
        self.lines: queue.Queue[str] = queue.Queue()
        self.log: list[str] = []
        self.result: RemoteRun | None = None
        self.failure = ""
        self._thread = threading.Thread(target=self._run, args=(config, resume), daemon=True)
        self._thread.start()

    def _run(self, config: RunConfig, resume: bool) -> None:
        try:
            self.result = run_superlink(config, "here", show=self.lines.put, resume=resume)
        except FederationError as error:
            self.failure = str(error)
        self.lines.put("THE END")

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Read on until a line of the log holds ``text``."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.log.append(self.lines.get(timeout=max(0.1, end - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"no {text!r} within {seconds} s: {self.log[-20:]}") from None
            if text in self.log[-1]:
                return
            assert self.log[-1] != "THE END", f"ended without {text!r}: {self.failure} {self.log[-20:]}"

    def end(self, seconds: float = 180.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"still running after {seconds} s: {self.log[-20:]}"


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """Started; nothing of it is left afterwards."""
    home = tmp_path / "flower"
    home.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(home))
    made = Link(home)
    (home / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{made.port}"\ninsecure = true\n'
    )
    try:
        made.start_link()
        made.start_others()
        yield made
    except BaseException:
        for log in sorted(home.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")
        raise
    finally:
        for process in reversed(made.started):
            stop(process)
        none_left(home)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    save_two_tasks(tmp_path)
    same = {"text": ["text"], "label": "label", "clients": 1}
    tasks = [same | {"name": name, "source": str(tmp_path / f"{name}.tsv")} for name in ("mood", "topic")]
    return from_dict(
        {
            "name": "killed",
            "model": str(tmp_path / "model"),
            "density": 0.02,
            "rounds": ROUNDS,
            "kernel": "dense",
            "workers": 1,
            "tasks": tasks,
            "partition": {"kind": "iid"},
            "train": {"steps": 2, "batch_size": 8, "max_tokens": 16},
            "runs_dir": str(tmp_path / "runs"),
        }
    )


@pytest.mark.timeout(400)
def test_a_server_app_killed_three_times_and_a_superlink_once(link: Link, config: RunConfig) -> None:
    attempts = [Attempt(config, resume=False)]
    attempts[-1].wait_for(f"round 0 of {ROUNDS}")
    time.sleep(1.0)  # inside round 1: its messages are out
    link.kill_server_app()

    attempts.append(Attempt(config, resume=True))
    attempts[-1].wait_for(f"round 1 of {ROUNDS}, 2 of 2 replies")
    link.kill_server_app()  # between two rounds, or at the very start of the second

    attempts.append(Attempt(config, resume=True))
    attempts[-1].wait_for(f"round 2 of {ROUNDS}, 2 of 2 replies")
    time.sleep(1.0)
    kill(link.link)  # inside round 3, the messages are out
    time.sleep(2.0)
    link.start_link()
    folder = Path(config.runs_dir) / config.name
    deadline = time.monotonic() + 90  # the stream of the log ended with the SuperLink; the run did not
    while len(read_rows(folder, "rounds")) < 4:
        assert time.monotonic() < deadline, attempts[-1].log[-20:]
        time.sleep(0.2)
    time.sleep(1.0)
    link.kill_server_app()  # inside round 4

    attempts.append(Attempt(config, resume=True))
    attempts[-1].end()
    for attempt in attempts[:-1]:  # each was told the truth
        attempt.end()
        assert "ended as finished:failed" in attempt.failure
    result = attempts[-1].result
    assert result is not None, attempts[-1].failure
    assert result.summary is not None
    assert result.folder == folder
    record = json.loads((folder / "config.json").read_text())
    assert [one["after_round"] for one in record["resumed"]] == [0, 1, 3]
    with InProcessGrid(from_dict(record["config"] | {"name": "undisturbed"})) as grid:
        here = run_on(grid, engine="superlink", client_evaluation=True)
    assert result.summary["vector_sha256"] == here.summary["vector_sha256"]
    rows = Ledger.read_jsonl(folder / "ledger.jsonl")
    there = [row for row in rows if row.status != "aborted" and row.round >= 0]
    ours = list(Ledger.read_jsonl(here.folder / "ledger.jsonl"))
    assert sorted(map(repr, there)) == sorted(map(repr, ours))
