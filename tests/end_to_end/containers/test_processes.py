"""On a real SuperLink, as processes of this machine: a server app that is killed, and a reply that is late.

They take a minute, so they run with the other slow tests (``make test-containers``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.engines import run_superlink
from experiments.inprocess import InProcessGrid
from server.journal import JOURNAL
from tests.apps.grids import TamperedGrid, only, read_rows, run_on
from tests.apps.test_resume import assert_aborted_as_sent, timeless, totals
from tests.end_to_end.link import Site, remote_config, superlink_at
from tests.end_to_end.processes import members, stop

ROUNDS = 3


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A SuperLink with two SuperNodes that keep what their clients remember on disk."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    monkeypatch.setenv("FEDMASK_STATE", str(tmp_path / "state"))
    with superlink_at(tmp_path / "flower") as made:
        yield made


@pytest.mark.timeout(900)
def test_a_server_app_killed_three_times_goes_on_through_the_superlink(site: Site, tmp_path: Path) -> None:
    """kill -9 before a reply has come, between two replies, and as a round ends; each time resumed.

    With error feedback and changes sent down, so that the clients' memory counts too.
    """
    ways = {"up": "int4+ef", "down": "int4+delta"}
    config = remote_config(tmp_path).model_copy(
        update={"rounds": ROUNDS, "precision": "fp32", "overlap_batches": 0, "eval_rows": 20, **ways}
    )
    (tmp_path / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    folder = Path(config.runs_dir) / config.name

    def noted(round: int, way: str) -> Callable[[], bool]:
        return lambda: any((row[0], row[2]) == (round, way) for row in _open_rows(folder / JOURNAL))

    def ended(round: int) -> Callable[[], bool]:
        return lambda: (folder / "rounds.jsonl").is_file() and len(read_rows(folder, "rounds")) > round

    for number, moment in enumerate((noted(1, "down"), noted(2, "up"), ended(2))):
        run = _started(tmp_path / "run.json", resume=number > 0)
        try:
            if number == 1:  # one of the two clients holds still in round 2
                _until(ended(1), run)
                os.killpg(site.nodes[1].pid, signal.SIGSTOP)
            _until(moment, run)
            (server,) = _server_apps(site.home)
            os.kill(server, signal.SIGKILL)
        finally:
            os.killpg(site.nodes[1].pid, signal.SIGCONT)
            stop(run)
    remote = run_superlink(config, "here", resume=True)
    assert remote.folder == folder
    went_on = [one["after_round"] for one in json.loads((folder / "config.json").read_text())["resumed"]]
    assert went_on[:2] == [0, 1] and went_on[2] in (1, 2)  # the last state may not have been there yet
    with InProcessGrid(config.model_copy(update={"name": "whole"})) as grid:
        whole = run_on(grid, engine="superlink", client_evaluation=True)
    assert remote.summary is not None
    assert remote.summary["vector_sha256"] == whole.summary["vector_sha256"]
    assert timeless(read_rows(folder, "rounds"))[1:] == timeless(read_rows(whole.folder, "rounds"))[1:]
    assert totals(folder) == totals(whole.folder)
    broken = assert_aborted_as_sent(folder, whole.folder)
    assert {one for one in broken if one[0] < 2} == {(1, 0, "down"), (1, 1, "down")}
    assert set(broken) >= {(2, 0, "down"), (2, 1, "down"), (2, 0, "up")}


@pytest.mark.timeout(600)
def test_a_straggler_s_late_reply_through_the_superlink(site: Site, tmp_path: Path) -> None:
    """One of two clients is held in round 1 until it is over: what it answers then is counted, not used.

    The mask moves too: each message is a new process there, which must know the union that it tunes, and
    what it was sent.
    """
    config = remote_config(tmp_path)
    server = config.server.model_copy(update={"timeout": 25.0, "min_replies": 1})
    changes = {
        "name": "late",
        "server": server,
        "mask_schedule": "rotate",
        "up": "int8",
        "down": "int8+delta",
    }
    config = config.model_copy(
        update=changes | {"rounds": 3, "precision": "fp32", "overlap_batches": 0, "eval_rows": 20}
    )
    (tmp_path / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    folder = Path(config.runs_dir) / config.name
    run = _started(tmp_path / "run.json", resume=False)
    try:
        _until(lambda: (1, "down") in {(row[0], row[2]) for row in _open_rows(folder / JOURNAL)}, run)
        os.killpg(site.nodes[1].pid, signal.SIGSTOP)
        _until(lambda: len(read_rows(folder, "rounds")) > 1, run)
        os.killpg(site.nodes[1].pid, signal.SIGCONT)
        assert run.wait(240) == 0
    finally:
        os.killpg(site.nodes[1].pid, signal.SIGCONT)
        stop(run)
    rounds = read_rows(folder, "rounds")
    counted = {row["round"]: set(row["replied"]) for row in rounds}
    assert rounds[1]["rejected"] == [{"client": 1, "reason": "no answer within 25 s"}]
    assert counted[1] == {0}
    late = {"client": 1, "reason": "a late reply: it answers round 1"}
    (where,) = [row["round"] for row in rounds if late in row["rejected"]]
    paid = [row for row in read_rows(folder, "ledger") if row["status"] == "rejected"]
    assert [(row["round"], row["client"], row["direction"]) for row in paid] == [(where, 1, "up")]
    assert paid[0]["payload_bytes"] > 0
    with TamperedGrid(config.model_copy(update={"name": "here"}), only(counted)) as grid:
        here = run_on(grid, engine="superlink", client_evaluation=True)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["vector_sha256"] == here.summary["vector_sha256"]


def _started(config: Path, *, resume: bool) -> subprocess.Popen[bytes]:
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


def _until(moment: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not moment():
        assert run.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.005)


def _open_rows(journal: Path) -> list[list[int | str]]:
    with contextlib.suppress(OSError, ValueError):
        return [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    return []


def _server_apps(home: Path) -> list[int]:
    """The server app's process, among those of this test's SuperLink."""
    found = []
    for process in members(home):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(b"flwr-serverapp") for word in words):
                found.append(process)
    return found
