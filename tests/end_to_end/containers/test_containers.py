"""The compose file as a user runs it, and what happens when its parts are killed, cut off or restarted.

Two runs, because each message costs seconds here: in the first clients fail, in the second the server's side.
Each must end in the same vector as the same run in process over the replies that counted.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.containers.federation import Containers, until

SMALL = ["--steps", "6", "--set", "overlap_batches=0", "--eval-rows", "60"]
DEADLINE = 45


def counted(rows: list[dict[str, Any]], sent: dict[int, set[int]]) -> set[tuple[Any, ...]]:
    """The messages of training that count: those of the replies in ``sent``, by round."""
    return {
        (row["round"], row["client"], row["direction"], row["payload_bytes"], row["status"])
        for row in rows
        if row["kind"] == "train" and row["client"] in sent.get(row["round"], set())
    }


def same_as_in_process(containers: Containers, run: str, folder: Path) -> None:
    here = containers.again_in_process(run, folder)
    assert containers.summary(run)["vector_sha256"] == here.summary["vector_sha256"]
    sent = {row["round"]: set(row["replied"]) for row in containers.rows(run, "rounds")}
    ours = [json.loads(line) for line in (here.folder / "ledger.jsonl").read_text().splitlines()]
    theirs = [row for row in containers.rows(run, "ledger") if row["status"] != "aborted"]
    assert counted(theirs, sent) == counted(ours, sent) != set()


@pytest.mark.timeout(900)
def test_clients_fail_and_the_run_ends_as_it_would_have_without_them(
    containers: Containers, tmp_path: Path
) -> None:
    run = containers.start_run(
        "--name", "faults", "--rounds", "3", *SMALL, "--set", f"server.timeout={DEADLINE}"
    )
    run.wait_for("round 0 of 3")
    run.wait_for("round 1 of 3, 4 of 4 replies")
    held = {seat: containers.client_of(seat, "faults") for seat in range(4)}
    assert len(set(held.values())) == 4  # each partition claimed once
    # Round 2: one client is killed, one cut off; both when they have their message or will never get it.
    containers.docker("kill", "-s", "KILL", held[0])
    containers.cut(held[1])
    run.wait_for("round 2 of 3, 2 of 4 replies", DEADLINE + 60)
    # Round 3: the cut heals, and a third one is paused: a straggler beyond the deadline.
    containers.heal(held[1], "client")
    containers.docker("pause", held[2])
    assert run.end() == 0, run.lines[-20:]
    containers.docker("unpause", held[2])
    rounds = containers.rows("faults", "rounds")
    assert [set(row["replied"]) >= {3} for row in rounds[1:]] == [True] * 3
    assert set(rounds[2]["replied"]) == {2, 3}
    lost = {one["client"]: one["reason"] for one in rounds[2]["rejected"]}
    assert set(lost) == {0, 1}
    assert 2 in {one["client"] for one in rounds[3]["rejected"]}
    assert (containers.runs / "faults" / "report.md").is_file()
    assert any("Report: /runs/faults/report.md" in line for line in run.lines)
    same_as_in_process(containers, "faults", tmp_path)
    _healthy_again(containers)


def _healthy_again(containers: Containers) -> None:
    """All four clients run: the killed one was started again by its restart policy or is by ``up``."""
    containers.compose("up", "-d")
    until(lambda: len(containers.ids("client")) == 4, 60, "four clients")


@pytest.mark.timeout(900)
def test_the_server_s_side_fails_and_the_run_is_resumed(containers: Containers, tmp_path: Path) -> None:
    options = ["--name", "server", "--rounds", "4", *SMALL, "--set", f"server.timeout={2 * DEADLINE}"]
    run = containers.start_run(*options)
    # Inside a round, before the first one ends; between rounds; and in the last one.
    for number, pause in ((0, 6.0), (1, 0.0), (3, 4.0)):
        run.wait_for(f"round {number} of 4", 240)
        time.sleep(pause)
        containers.docker("kill", "-s", "KILL", *containers.ids("server"))
        if number == 0:  # the command tells the truth: it did not end well
            assert run.end() not in (0, None)
            assert any("ended as finished:failed" in line for line in run.lines)
        else:
            run.process.terminate()
        containers.compose("up", "-d")
        run = containers.start_run(*options, "--resume")
        if number == 0:  # the SuperLink is killed under the run and finds its database again
            run.wait_for("Start `flwr-serverapp` process", 120)
            containers.docker("kill", "-s", "KILL", *containers.ids("superlink"))
            containers.compose("up", "-d")
    assert run.end() == 0, run.lines[-20:]
    rounds = containers.rows("server", "rounds")
    assert [row["round"] for row in rounds] == [0, 1, 2, 3, 4]
    assert len(containers.record("server")["resumed"]) >= 3
    assert any(row["status"] == "aborted" for row in containers.rows("server", "ledger"))
    same_as_in_process(containers, "server", tmp_path)


def test_containers_are_small_and_may_do_little(containers: Containers) -> None:
    size = int(containers.docker("image", "inspect", "-f", "{{.Size}}", "fedmask:test"))
    assert size < 2_200_000_000
    (name, *_) = containers.ids("client")
    form = "{{.HostConfig.ReadonlyRootfs}} {{.Config.User}} {{.HostConfig.Memory}} {{.HostConfig.NanoCpus}}"
    said = containers.docker("inspect", "-f", form, name).split()
    assert said == ["true", "1000:1000", str(2**30), "1000000000"]
    for words in (["touch", "/usr/new"], ["gcc", "--version"], ["uv", "--version"]):
        assert "fedmask-ok" not in containers.docker(
            "exec", name, "sh", "-c", " ".join(words) + " && echo fedmask-ok", check=False
        )


def test_a_node_without_a_registered_key_or_without_tls_stays_out(containers: Containers) -> None:
    (name, *_) = containers.ids("client")
    base = (
        "timeout 20 flower-supernode --superlink superlink:8000 --host 127.0.0.1 --port 9300 --max-retries 1"
    )
    plain = containers.docker("exec", name, "sh", "-c", f"{base} --insecure", check=False)
    assert "SuperNode ID" not in plain
    stranger = containers.docker(
        "exec", name, "sh", "-c", f"{base} --root-certificates /keys/public/ca.crt", check=False
    )
    assert "SuperNode ID" not in stranger
