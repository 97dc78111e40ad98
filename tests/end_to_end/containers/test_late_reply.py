"""A client that answers too late on a real SuperLink: processes of this machine.

No containers are needed for it, but time: it runs with the other slow tests (``make test-containers``).
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from server.journal import JOURNAL
from tests.apps.grids import TamperedGrid, messages_that_count, only, read_rows, run_on
from tests.end_to_end.containers.remote import open_rows, started, until
from tests.end_to_end.link import Site, remote_config
from tests.end_to_end.processes import stop


@pytest.mark.timeout(600)
def test_a_straggler_s_late_reply_through_the_superlink(site: Site, tmp_path: Path) -> None:
    """One of two clients is held in round 1 until it is over: what it answers then is counted, not used.

    The mask moves too: each message is a new process there, which must know the union that it tunes, and
    what it was sent.
    """
    config = remote_config(tmp_path, held_out=0.0)
    # Not longer: a node is gone a minute after its last heartbeat, which may be 22 s ago.
    server = config.server.model_copy(update={"timeout": 30.0, "min_replies": 1})
    changes = {
        "name": "late",
        "server": server,
        "mask_schedule": "rotate",
        "up": "int8",
        "down": "int8+delta",
    }
    config = config.model_copy(
        update=changes | {"rounds": 2, "precision": "fp32", "overlap_batches": 0, "eval_rows": 20}
    )
    (tmp_path / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    folder = Path(config.runs_dir) / config.name
    run = started(tmp_path / "run.json", resume=False)
    try:
        until(lambda: (1, "down") in {(row[0], row[2]) for row in open_rows(folder / JOURNAL)}, run)
        os.killpg(site.nodes[1].pid, signal.SIGSTOP)
        until(lambda: len(read_rows(folder, "rounds")) > 1, run)
        os.killpg(site.nodes[1].pid, signal.SIGCONT)
        assert run.wait(240) == 0
    finally:
        os.killpg(site.nodes[1].pid, signal.SIGCONT)
        stop(run)
    rounds = read_rows(folder, "rounds")
    counted = {row["round"]: set(row["replied"]) for row in rounds}
    assert rounds[1]["rejected"] == [{"client": 1, "reason": "no answer within 30 s"}]
    assert counted[1] == {0}
    # On a busy machine it may not catch up, and answer the next round too late as well.
    late = [
        (row["round"], one["reason"]) for row in rounds for one in row["rejected"] if "late" in one["reason"]
    ]
    assert late[0][1] == "a late reply: it answers round 1"
    paid = [row for row in read_rows(folder, "ledger") if row["status"] == "rejected"]
    assert [(row["round"], row["client"], row["direction"]) for row in paid] == [
        (at, 1, "up") for at, _ in late
    ]
    assert all(row["payload_bytes"] > 0 for row in paid)
    with TamperedGrid(config.model_copy(update={"name": "here"}), only(counted)) as grid:
        here = run_on(grid, engine="superlink", client_evaluation=True)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["vector_sha256"] == here.summary["vector_sha256"]
    there, ours = (read_rows(where, "ledger") for where in (folder, here.folder))
    assert messages_that_count(there, counted) == messages_that_count(ours, counted)
