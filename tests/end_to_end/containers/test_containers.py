"""The compose file as a user runs it, and clients that are killed, cut off, or do not go on; at last all.

One run, broken and resumed, because each message costs seconds here. It must end in the same vector, and the
same messages that count, as the same run in process over the replies that counted.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest

from tests.apps.grids import messages_that_count
from tests.end_to_end.containers.federation import CLIENTS, Containers, until

DEADLINE = int(os.environ.get("FEDMASK_TEST_DEADLINE", "30"))  # seconds a round; a busy machine needs more
ROUNDS = 3
# One line at the end: what libraries say of themselves is in the same stream.
_BUNDLED = """
from fedmask.models import load_backbone
from fedmask.tasks.bundled import bundled_table

values = sum(value.numel() for value in load_backbone("minilm").model.parameters())
print("minilm", values, *(f"{name} {len(bundled_table(name))}" for name in ("tweets", "bbc")))
"""
SETTINGS = ["--config", "/data/tiny.toml", "--name", "faults", "--rounds", str(ROUNDS)]


def same_as_in_process(containers: Containers, run: str, folder: Path) -> None:
    """The final vector, and the messages of the replies that counted."""
    here = containers.again_in_process(run, folder)
    assert containers.summary(run)["vector_sha256"] == here.summary["vector_sha256"]
    sent = {row["round"]: set(row["replied"]) for row in containers.rows(run, "rounds")}
    ours = [json.loads(line) for line in (here.folder / "ledger.jsonl").read_text().splitlines()]
    theirs = containers.rows(run, "ledger")
    assert messages_that_count(theirs, sent) == messages_that_count(ours, sent)
    assert len(messages_that_count(theirs, sent)) == 2 * sum(len(clients) for clients in sent.values())


@pytest.mark.timeout(2400)  # the first one builds the image, on a slow network too, and waits for the machine
def test_clients_fail_and_the_run_ends_as_it_would_have_without_them(
    containers: Containers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SETTINGS, "--min-replies", "1", "--round-deadline", str(DEADLINE)]
    run = containers.start_run(*options)
    run.wait_for(f"round 1 of {ROUNDS}, ")  # with all four, unless the machine is very busy
    held = {seat: containers.client_of(seat, "faults") for seat in range(CLIENTS)}
    assert len(set(held.values())) == CLIENTS  # each partition claimed once

    # Round 2: client 1 is cut off, 2 does not go on, and 0 is killed when it has its message.
    containers.cut(held[1])
    containers.hold(held[2])
    containers.wait_for_message(held[0], "train", 2, DEADLINE)
    containers.crash(held[0])

    # As soon as the last one has answered, all are off the network: round 3 has nobody, and the run fails.
    containers.wait_for_traffic("faults", 2, 3, "up", DEADLINE)
    for client in (3, 2, 0):
        containers.cut(held[client])
    run.wait_for(f"round 2 of {ROUNDS}, 1 of 4 replies", DEADLINE + 30)
    containers.go_on(held[2])
    assert run.end(DEADLINE * 4) == 1, run.lines[-20:]
    assert any("expected at least 1 usable replies" in line for line in run.lines), run.lines[-20:]

    # They are healed and come back when Flower lets them. In round 3 client 2 runs out of memory.
    for client in range(CLIENTS):
        containers.heal(held[client], "client")
    until(partial(containers.is_healthy, held[0]), 150, "the killed client, started again")
    resumed = time.time()
    run = containers.start_run(*options, "--resume", "--round-deadline", str(DEADLINE + 15))
    containers.wait_for_traffic("faults", 3, 2, "down", 240)
    containers.exhaust_memory(
        held[2], containers.apps(held[2])
    )  # not the one that still leaves after joining
    assert run.end(DEADLINE * 6) == 0, run.lines[-20:]
    assert containers.out_of_memory(held[2], resumed) > 0
    assert any("Report: /runs/faults/report.md" in line for line in run.lines)

    rounds = containers.rows("faults", "rounds")
    assert rounds[2]["replied"] == [3]
    assert {one["client"] for one in rounds[2]["rejected"]} == {0, 1, 2}
    assert rounds[3]["replied"] == [0, 1, 3]  # the killed one, and those that were cut off
    assert {one["client"] for one in rounds[3]["rejected"]} == {2}
    assert [one["after_round"] for one in containers.record("faults")["resumed"]] == [2]
    broken = [row for row in containers.rows("faults", "ledger") if row["status"] == "aborted"]
    assert {(row["round"], row["direction"]) for row in broken if row["payload_bytes"]} == {(3, "down")}
    assert (containers.runs / "faults" / "report.md").is_file()
    assert containers.client_of(0, "faults") == held[0]  # with the partition that it had
    for name, value in containers.own_data().items():
        monkeypatch.setenv(name, value)
    same_as_in_process(containers, "faults", tmp_path)


def test_containers_are_small_and_may_do_little(containers: Containers) -> None:
    size = int(containers.docker("image", "inspect", "-f", "{{.Size}}", "fedmask:test"))
    assert size < 1_900_000_000
    (name, *_) = containers.ids("client")
    form = "{{.HostConfig.ReadonlyRootfs}} {{.Config.User}} {{.HostConfig.Memory}} {{.HostConfig.NanoCpus}}"
    said = containers.docker("inspect", "-f", form, name).split()
    assert said == ["true", "1000:1000", str(1536 * 2**20), "1000000000"]
    for words in (
        "touch /usr/new",
        "gcc --version",
        "uv --version",
        "pip --version",
        "python -m pip --version",
    ):
        said = containers.docker("exec", name, "sh", "-c", f"{words} && echo fedmask-ok", check=False)
        assert "fedmask-ok" not in said
    # But a model can be fetched into its volume.
    containers.compose("run", "--rm", "-T", "--entrypoint", "touch", "run", "/models/new")
    for service in ("superlink", "server", "client"):
        for name in containers.ids(service):
            until(partial(containers.is_healthy, name), 60, f"{service}: healthy")


def test_the_image_holds_the_demo_s_model_and_texts(containers: Containers) -> None:
    (name, *_) = containers.ids("client")
    said = containers.docker("exec", name, "python", "-I", "-c", _BUNDLED)
    assert said.splitlines()[-1] == "minilm 22713216 tweets 38158 bbc 2225", said


def test_a_fifth_client_joins_and_leaves(containers: Containers) -> None:
    """There are keys for it already. Its check is asked here: the engine asks after 30 s first."""
    before = set(containers.ids("client"))
    assert len(before) == CLIENTS
    up = ("up", "-d", "--no-deps", "--no-recreate", "-t", "3", "--scale")
    containers.compose(*up, f"client={CLIENTS + 1}", "client")
    try:
        (fifth,) = set(containers.ids("client")) - before
        until(lambda: "SuperNode ID: " in containers.docker("logs", fifth), 60, "the fifth client has joined")
        check = ("python", "-IS", "/code/experiments/healthy.py", "http://127.0.0.1:9094/health")
        containers.docker("exec", fifth, *check)
    finally:
        containers.compose(*up, f"client={CLIENTS}", "client")
    assert len(containers.ids("client")) == CLIENTS


def test_a_node_without_a_registered_key_or_without_tls_stays_out(containers: Containers) -> None:
    (name, *_) = containers.ids("client")
    base = (
        "timeout 60 flower-supernode --superlink superlink:8000 --host 127.0.0.1 --port 9300 --max-retries 1"
    )
    for options, why in (
        ("--insecure", "Connection attempt failed"),
        ("--root-certificates /keys/public/ca.crt", "register"),
    ):
        said = containers.docker("exec", name, "sh", "-c", f"{base} {options}", check=False)
        assert "SuperNode ID" not in said
        assert why in said, said
