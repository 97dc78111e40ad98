"""A round ends at its deadline, whatever its clients are asked twice for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig
from server import exchange
from tests.apps.fakes import quick_app
from tests.apps.grids import read_rows, run_on

MakeConfig = Callable[..., RunConfig]
LOST, SILENT, ROUND = 1, 2, 3


class Grid(InProcessGrid):
    """Client ``LOST`` has lost its state before round 3 and says so after 0.6 s, by the server's clock.

    Its second answer in that round gets lost. ``silent``: client ``SILENT`` answers in no round from then on.
    """

    def __init__(self, config: RunConfig, *, silent: bool) -> None:
        super().__init__(config, 1, quick_app)  # type: ignore[arg-type]
        self.silent, self.round, self.asked = silent, 0, 0
        self.drops: set[str] = set()
        self.waits: dict[str, float] = {}

    def push_messages(self, messages: Iterable[object]) -> Iterable[str]:
        sent = list(messages)
        if sent[0].metadata.message_type == "train":  # type: ignore[attr-defined]
            self.round = sent[0].content["config"]["round"]  # type: ignore[attr-defined]
        names = list(super().push_messages(sent))  # type: ignore[arg-type]
        for message, name in zip(sent, names, strict=True):
            client = self._partitions[message.metadata.dst_node_id]  # type: ignore[attr-defined]
            if self.silent and client == SILENT and self.round >= ROUND:
                self.drops.add(name)
            if client == LOST and self.round == ROUND:
                self.asked += 1
                if self.asked == 1:
                    self.states.put(message.metadata.dst_node_id, None)  # type: ignore[attr-defined]
                    self.waits[name] = exchange.time.monotonic() + 0.6
                else:
                    self.drops.add(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[object]:  # type: ignore[override]
        now = exchange.time.monotonic()
        ready = {name for name in message_ids if name not in self.drops and self.waits.get(name, now) <= now}
        return super().pull_messages(ready)


@pytest.mark.usefixtures("server_s_clock")
def test_who_is_asked_again_has_what_is_left_of_the_round(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=4, down="int4+delta", server={"timeout": 1.0})
    grid = Grid(config, silent=False)
    rows = read_rows(run_on(grid).folder, "rounds")
    assert grid.asked == 2
    assert rows[3]["seconds"] == pytest.approx(1.0)
    assert rows[3]["rejected"] == [{"client": LOST, "reason": "no answer within 1 s"}]
    assert rows[4]["replied"] == [0, 1, 2, 3]


@pytest.mark.usefixtures("server_s_clock")
def test_who_is_behind_when_a_round_is_over_is_told_all_in_the_next(make_config: MakeConfig) -> None:
    """Another client never answers, so there is never a second message."""
    config = make_config(clients=(3, 1), rounds=4, down="int4+delta", server={"timeout": 1.0})
    grid = Grid(config, silent=True)
    rows = read_rows(run_on(grid).folder, "rounds")
    assert grid.asked == 1
    assert [row["seconds"] for row in rows[3:]] == pytest.approx([1.0, 1.0])
    assert rows[3]["replied"] == [0, 3]
    assert {one["client"]: one["reason"] for one in rows[3]["rejected"]} == {
        LOST: "it had lost what it was sent before, and the round had no time left",
        SILENT: "no answer within 1 s",
    }
    assert rows[4]["replied"] == [0, LOST, 3]
