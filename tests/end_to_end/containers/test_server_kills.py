"""A server app is killed on a real SuperLink and goes on: processes of this machine.

No containers are needed for it, but time: it runs with the other slow tests (``make test-containers``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.engines import run_superlink
from experiments.inprocess import InProcessGrid
from server.journal import JOURNAL
from tests.apps.grids import read_rows, run_on
from tests.apps.test_resume import assert_aborted_as_sent, timeless, totals
from tests.end_to_end.containers.remote import open_rows, started, until
from tests.end_to_end.link import Site, remote_config
from tests.end_to_end.processes import members, stop

ROUNDS = 3


@pytest.mark.timeout(900)
def test_a_server_app_killed_three_times_goes_on_through_the_superlink(site: Site, tmp_path: Path) -> None:
    """kill -9 before a reply has come, between two replies, and as a round ends; each time resumed.

    With error feedback and changes sent down, so that the clients' memory counts too.
    """
    ways = {"up": "int4+ef", "down": "int4+delta"}
    config = remote_config(tmp_path, held_out=0.0).model_copy(
        update={"rounds": ROUNDS, "precision": "fp32", "overlap_batches": 0, "eval_rows": 20, **ways}
    )
    (tmp_path / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    folder = Path(config.runs_dir) / config.name

    def noted(round: int, way: str) -> Callable[[], bool]:
        return lambda: any((row[0], row[2]) == (round, way) for row in open_rows(folder / JOURNAL))

    def ended(round: int) -> Callable[[], bool]:
        return lambda: (folder / "rounds.jsonl").is_file() and len(read_rows(folder, "rounds")) > round

    for number, moment in enumerate((noted(1, "down"), noted(2, "up"), ended(2))):
        run = started(tmp_path / "run.json", resume=number > 0)
        try:
            if number == 1:  # one of the two clients holds still in round 2
                until(ended(1), run)
                os.killpg(site.nodes[1].pid, signal.SIGSTOP)
            until(moment, run)
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


def _server_apps(home: Path) -> list[int]:
    """The server app's process, among those of this test's SuperLink."""
    found = []
    for process in members(home):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(b"flwr-serverapp") for word in words):
                found.append(process)
    return found
