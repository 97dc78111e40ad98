"""Nodes without a number claim a seat: each seat once, its own again after a restart, and the same result."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from flwr.app import Context, Message

from clients.app import make_client_app
from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig
from fedmask.flower import SEAT
from server import joining
from server.journal import Journal, with_journal
from server.seats import whom_to_ask
from tests.apps.grids import TamperedGrid, only, read_rows, run_on

MakeConfig = Callable[..., RunConfig]


class Nodes:
    """Apps of nodes by their number; ``fixed`` are numbered, all others claim. Counts what each node does."""

    def __init__(self, config: RunConfig, folder: Path, patch: pytest.MonkeyPatch, fixed: dict[int, int]):
        self.app, self.folder, self.patch, self.fixed = make_client_app(config), folder, patch, fixed
        self.did: list[tuple[str, int, int]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        context.node_config = {"partition-id": self.fixed[number]} if number in self.fixed else {}
        self.patch.setenv("FEDMASK_STATE", str(self.folder))
        self.patch.setenv("FEDMASK_NODE", f"node {number}")
        reply = self.app(message, context)
        kept = context.state.config_records.get(SEAT)
        seat = self.fixed.get(number, kept[SEAT] if kept else -1)
        self.did.append((message.metadata.message_type, number, int(seat)))  # type: ignore[arg-type]
        return reply


class ClaimingGrid(InProcessGrid):
    """``count`` nodes that are known by their number alone.

    ``restarted``: before which round node 3 is started again, and whether under a new id (as nodes without a
    registered key are). What Flower kept for it is gone then.
    """

    def __init__(self, config: RunConfig, nodes: Nodes, count: int) -> None:
        super().__init__(config, 1, lambda _config: nodes)  # type: ignore[arg-type, return-value]
        self._partitions = {1000 + number: number for number in range(count)}
        self.round, self.restarted = 0, (0, False)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        if sent and sent[0].metadata.message_type == "train":
            self.round += 1
            if self.round == self.restarted[0]:
                self.states.put(1003, None)
                if self.restarted[1]:
                    self._partitions[2003] = 3
        return super().push_messages(sent)


@pytest.mark.parametrize("fixed", [{}, {1: 0, 3: 2}])
def test_claimed_seats_give_the_same_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixed: dict[int, int]
) -> None:
    config = make_config()
    expected = run_on(InProcessGrid(config)).summary["vector_sha256"]
    nodes = Nodes(config, tmp_path / "state", monkeypatch, fixed)
    run = run_on(ClaimingGrid(config, nodes, 7), engine="superlink")
    assert run.summary["vector_sha256"] == expected
    trained = {(number, seat) for kind, number, seat in nodes.did if kind == "train"}
    assert sorted(seat for _, seat in trained) == [0, 1, 2, 3, 4]
    assert len({number for number, _ in trained}) == 5  # two more were spare
    assert all((number, seat) in trained for number, seat in fixed.items())


@pytest.mark.parametrize("as_new", [False, True])
def test_a_node_that_was_started_again_gets_its_own_seat_again(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_new: bool
) -> None:
    """Under a new id while the old one still seems to be there, or under the old id without its state."""
    config = make_config(rounds=4, precision="auto")
    nodes = Nodes(config, tmp_path / "state", monkeypatch, {})
    grid = ClaimingGrid(config, nodes, 5)
    grid.restarted = 2, as_new
    run = run_on(grid, engine="superlink")
    seats = {seat for _, number, seat in nodes.did if number == 3 and seat >= 0}
    assert len(seats) == 1
    rows = read_rows(run.folder, "rounds")
    assert [len(row["replied"]) for row in rows] == [0, 5, 4, 5, 5]
    lost = rows[2]["rejected"]
    assert [one["client"] for one in lost] == sorted(seats)
    assert "this node has not joined the run" in lost[0]["reason"]
    again = [row for row in read_rows(run.folder, "ledger") if row["kind"] == "mask" and row["round"] == 3]
    assert {row["client"] for row in again if row["direction"] == "up"} == seats
    settled = json.loads((run.folder / "config.json").read_text())["config"]["precision"]
    others = without_in_round_2(make_config(name="others", rounds=4, precision=settled), *seats)
    assert run.summary["vector_sha256"] == others


class Processes(Nodes):
    """Numbered nodes. Node 3 works in a new process each time, which by itself follows ``own``."""

    def __init__(self, config: RunConfig, folder: Path, patch: pytest.MonkeyPatch, own: dict[str, str]):
        super().__init__(config, folder, patch, {number: number for number in range(5)})
        self.config, self.own, self.count, self.others = config, own, 0, self.app

    def __call__(self, message: Message, context: Context) -> Message:
        self.count += 1
        new = self.config.model_copy(update={"name": f"process-{self.count}", **self.own})
        self.app = make_client_app(new) if context.node_config["partition-id"] == 3 else self.others
        return super().__call__(message, context)


@pytest.mark.parametrize(
    ("settings", "own"),
    [({"method": "fish", "scores": {"samples": 8}}, {}), ({"method": "pafi"}, {"method": "random"})],
    ids=["an agreed mask", "other than its own"],
)
def test_a_numbered_node_that_lost_the_server_s_mask_is_sent_it_again(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    own: dict[str, str],
) -> None:
    """Under its old id, as with a registered key: without a word from it nobody would ask it to join."""
    config = make_config(rounds=3, **settings)
    grid = ClaimingGrid(config, Processes(config, tmp_path / "state", monkeypatch, own), 5)
    grid.restarted = 2, False
    run = run_on(grid, engine="superlink")
    rows = read_rows(run.folder, "rounds")
    assert [len(row["replied"]) for row in rows] == [0, 5, 4, 5]
    (lost,) = rows[2]["rejected"]
    assert lost["client"] == 3 and "this node has not joined the run: " in lost["reason"]
    down = [row["kind"] for row in read_rows(run.folder, "ledger")
            if (row["client"], row["round"], row["direction"]) == (3, 3, "down")]  # fmt: skip
    assert down == ["mask", "mask", "train"]  # offer, mask and vector
    assert run.summary["vector_sha256"] == without_in_round_2(make_config(name="w", rounds=3, **settings), 3)


def without_in_round_2(config: RunConfig, client: int) -> str:
    """The digest of the same run in which a client says nothing in round 2."""
    counted = {round: [one for one in range(5) if (one, round) != (client, 2)] for round in range(1, 5)}
    return str(run_on(TamperedGrid(config, only(counted))).summary["vector_sha256"])


def test_a_node_that_comes_back_with_nothing_is_sent_the_whole_at_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server hears at joining what it holds, and the mask that it needs stands in the round's account."""
    config = make_config(rounds=4, down="int4+delta", mask_transport="packed")
    nodes = Nodes(config, tmp_path / "state", monkeypatch, {})
    grid = ClaimingGrid(config, nodes, 5)
    grid.restarted = 3, False
    run = run_on(grid, engine="superlink")
    (seat,) = {seat for _, number, seat in nodes.did if number == 3 and seat >= 0}
    down = [row for row in read_rows(run.folder, "ledger")
            if (row["client"], row["round"], row["direction"]) == (seat, 4, "down")]  # fmt: skip
    assert [row["kind"] for row in down] == ["mask", "mask", "train"]  # offer, mask, and the vector once


def test_what_a_node_that_comes_back_costs_is_on_disk_before_its_round(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server killed between the two leaves it in the journal."""
    noted: list[tuple[int, str, int, int]] = []
    settle = Journal.settle

    def look(journal: Journal) -> None:
        rows = with_journal(journal.path.parent, [])
        noted.extend((one.round, one.direction, one.payload_bytes, one.message_bytes)
                     for one in rows if one.kind == "mask")  # fmt: skip
        settle(journal)

    monkeypatch.setattr(Journal, "settle", look)
    config = make_config(rounds=4, mask_transport="packed")
    grid = ClaimingGrid(config, Nodes(config, tmp_path / "state", monkeypatch, {}), 5)
    grid.restarted = 3, False
    run = run_on(grid, engine="superlink")
    entered = [
        (row["round"], row["direction"], row["payload_bytes"], row["message_bytes"])
        for row in read_rows(run.folder, "ledger")
        if row["kind"] == "mask" and row["round"] == 4
    ]
    assert len(entered) == 4  # offer and mask, both ways
    assert sorted(noted) == sorted(entered)


def test_a_node_that_never_answers_is_asked_less_and_less(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spare one, while another node's seat is free: each time costs a round the wait for it."""
    monkeypatch.setattr(joining, "REJOIN_SECONDS", 0.05)
    config = make_config(clients=(2,), rounds=9)
    nodes = Nodes(config, tmp_path / "state", monkeypatch, {})
    grid = ClaimingGrid(config, nodes, 3)
    asked: list[int] = []
    round, push = 0, grid.push_messages

    def without_the_mute(messages: Iterable[Message]) -> Iterable[str]:
        nonlocal round
        sent = list(messages)
        round += sent[0].metadata.message_type == "train"
        if round:  # since round 1 one client's node is gone, and the spare one is mute
            grid._partitions.pop(1001, None)
            asked.extend(round + 1 for one in sent if one.metadata.dst_node_id == 1002)
        names = list(push(sent))
        grid._queue = deque(entry for entry in grid._queue if not round or entry[2].node != 1002)
        return names

    monkeypatch.setattr(grid, "push_messages", without_the_mute)
    run = run_on(grid, engine="superlink")
    assert asked == [2, 4, 8]
    assert [row["replied"] for row in read_rows(run.folder, "rounds")[1:]] == [[0]] * 9


def test_whom_to_ask_between_rounds() -> None:
    nodes = {0: 10, 1: 11, 2: 12}
    assert whom_to_ask({10, 11, 12}, nodes, {10, 11, 12}, set(), 3) == ([], [])
    assert whom_to_ask({10, 11, 12, 13}, nodes, {10, 11, 12, 13}, set(), 3) == ([], [])  # a spare one
    assert whom_to_ask({10, 12, 13}, nodes, {10, 11, 12, 13}, set(), 3) == ([13], [1])
    assert whom_to_ask({10, 11, 12, 14}, nodes, {10, 11, 12}, set(), 3) == ([14], [])
    assert whom_to_ask({10, 11, 12}, nodes, {10, 11, 12}, {2}, 3) == ([12], [2])
