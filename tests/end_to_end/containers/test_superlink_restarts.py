"""The SuperLink is killed under a run and started again with its database: processes of this machine.

No containers are needed for it, but time: it runs with the other slow tests (``make test-containers``).
"""

from __future__ import annotations

import json
import queue
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
from tests.apps.grids import run_on
from tests.end_to_end.processes import free_port, kill, none_left, start, stop, wait_for_health
from tests.support import save_two_tasks

ROUNDS = 2


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


class Attempt:
    """A run that somebody follows, until it ends well or badly."""

    def __init__(self, config: RunConfig) -> None:
        self.lines: queue.Queue[str] = queue.Queue()
        self.log: list[str] = []
        self.result: RemoteRun | None = None
        self.failure = ""
        self._thread = threading.Thread(target=self._run, args=(config,), daemon=True)
        self._thread.start()

    def _run(self, config: RunConfig) -> None:
        try:
            self.result = run_superlink(config, "here", show=self.lines.put)
        except FederationError as error:
            self.failure = str(error)
        self.lines.put("THE END")

    def wait_for(self, text: str, seconds: float = 300.0) -> None:
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
            "partition": {"kind": "iid", "held_out": 0.0},
            "train": {"steps": 2, "batch_size": 8, "max_tokens": 16},
            "runs_dir": str(tmp_path / "runs"),
        }
    )


@pytest.mark.timeout(500)
def test_a_superlink_killed_and_started_again_with_its_database(link: Link, config: RunConfig) -> None:
    attempt = Attempt(config)
    attempt.wait_for(f"round 1 of {ROUNDS}, 2 of 2 replies")
    time.sleep(1.0)
    kill(link.link)  # inside round 2: its messages are out
    time.sleep(2.0)
    link.start_link()
    attempt.end()
    assert attempt.result is not None, attempt.failure
    assert attempt.result.summary is not None
    folder = Path(config.runs_dir) / config.name
    record = json.loads((folder / "config.json").read_text())
    assert "resumed" not in record  # it went on by itself
    with InProcessGrid(from_dict(record["config"] | {"name": "undisturbed"})) as grid:
        here = run_on(grid, engine="superlink", client_evaluation=True)
    assert attempt.result.summary["vector_sha256"] == here.summary["vector_sha256"]
    there, ours = (Ledger.read_jsonl(one / "ledger.jsonl") for one in (folder, here.folder))
    assert sorted(map(repr, there)) == sorted(map(repr, ours))
