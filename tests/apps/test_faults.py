"""Clients that fail: what the record says, and that the result is the mean of the replies that counted.

The table in docs/reliability.md names these tests. Malformed replies have tests of their own in
``test_rejections``; here the client app itself misbehaves, or its answer comes too late.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr.app import Context, Message

from experiments.inprocess import InProcessGrid
from experiments.options import build_config
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError
from fedmask.rng import rng_for
from fedmask.workspace import get_workspace
from server.app import RunResult
from server.bounds import LARGEST
from server.exchange import SURPLUS
from tests.apps.fakes import QuickApp, assert_mean_of_what_counted, quick_app
from tests.apps.grids import TamperedGrid, read_rows, run_on
from tests.apps.test_rejections import BAD_REPLIES, _changed, _repacked

MakeConfig = Callable[..., RunConfig]
BAD, ROUND = 1, 2


@pytest.fixture
def make_config(make_config: MakeConfig) -> MakeConfig:
    """Little to score."""
    return partial(make_config, eval_rows=2)


Fault = Callable[[Message], Message]
Faults = Mapping[int, Fault]
"""By round: the good reply -> what the client says instead."""


class FaultyApp(QuickApp):
    """A ClientApp in which one client does something else in some rounds."""

    def __init__(self, config: RunConfig, faults: Faults) -> None:
        super().__init__(config)
        self.faults = faults

    def __call__(self, message: Message, context: Context) -> Message:
        reply = super().__call__(message, context)
        if message.metadata.message_type == "train" and int(context.node_config["partition-id"]) == BAD:
            fault = self.faults.get(_round(message))
            return fault(reply) if fault else reply
        return reply


def run_with(config: RunConfig, faults: Faults, **options: Any) -> RunResult:
    grid = InProcessGrid(config, 1, lambda settings: FaultyApp(settings, faults))  # type: ignore[arg-type]
    return run_on(grid, **options)


def raises(_reply: Message) -> Message:
    raise RuntimeError("out of\ncoffee")


FAULTS: dict[str, tuple[Fault, str]] = {
    "raises": (raises, "RuntimeError: out of coffee"),
    **{
        name: BAD_REPLIES[name]
        for name in (
            "NaN",
            "infinity",
            "absurd value",
            "another layout",
            "wrong digest",
            "stale round",
            "truncated",
            "unknown version",
            "no rows",
            "negative rows",
            "absurd rows",
            "extra record",
        )
    },
}


def test_a_faulty_client_is_named_and_the_mean_is_of_the_others(make_config: MakeConfig) -> None:
    """One client misbehaves in every second round, each time in another way."""
    faults = list(FAULTS.items())
    config = make_config(clients=(3, 1), rounds=2 * len(faults))
    result = run_with(config, {2 * at + 2: fault for at, (_name, (fault, _said)) in enumerate(faults)})
    rows = read_rows(result.folder, "rounds")
    for at, (name, (_fault, said)) in enumerate(faults):
        good, bad = rows[2 * at + 1], rows[2 * at + 2]
        assert (good["replied"], good["rejected"]) == ([0, 1, 2, 3], []), name
        assert bad["replied"] == [0, 2, 3] and [one["client"] for one in bad["rejected"]] == [BAD], name
        reason = bad["rejected"][0]["reason"]
        assert said in reason and "\n" not in reason and len(reason) <= 300, reason
    assert_mean_of_what_counted(result, config)


def test_a_second_reply_changes_nothing(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=3)

    def twice(client: int, _round: int, reply: Message) -> list[Message]:
        return [reply, _changed(reply, **{"num-examples": 1})] if client == BAD else [reply]

    result = run_on(TamperedGrid(config, twice, quick_app))  # type: ignore[arg-type]
    assert read_rows(result.folder, "rounds")[1]["replied"] == [0, 1, 2, 3]
    assert_mean_of_what_counted(result, config)


def test_a_huge_change_counts_and_is_named(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """What a weight could change by is the strategy's affair: fedavg uses it, fedmedian does not care."""
    config = make_config(clients=(4,), rounds=3)

    def hundredfold(reply: Message) -> Message:
        layout = get_workspace(config).layout("mood")
        noise = rng_for(1, ROUND, BAD, "fake").standard_normal(layout.size).astype(np.float32)
        return _repacked(reply, vector=noise)

    with caplog.at_level(logging.INFO, "flwr"):
        result = run_with(config, {ROUND: hundredfold})
    rows = read_rows(result.folder, "rounds")
    assert rows[ROUND]["replied"] == [0, 1, 2, 3] and rows[ROUND]["rejected"] == []
    sizes = {one["client"]: one for one in rows[ROUND]["norms"]}
    size = get_workspace(config).layout("mood").size
    noise = rng_for(1, ROUND, BAD, "fake").standard_normal(size).astype(np.float32)
    assert sizes[BAD]["norm"] == pytest.approx(float(np.linalg.norm(noise)), rel=1e-6)
    median = np.median([one["norm"] for one in sizes.values()])
    assert sizes[BAD]["outlier"] == pytest.approx(sizes[BAD]["norm"] / median) and sizes[BAD]["outlier"] > 50
    assert all(0.5 < sizes[client]["outlier"] < 2 for client in (0, 2, 3))
    assert any("client 1's change is" in line and "the median" in line for line in caplog.messages)
    assert rows[0]["norms"] == [] and len(rows[1]["norms"]) == 4

    robust = run_with(
        make_config(clients=(4,), rounds=3, server={"strategy": "fedmedian"}), {ROUND: hundredfold}
    )
    assert np.abs(robust.state.shared).max() < 0.1 < np.abs(result.state.shared).max()


@pytest.mark.parametrize("ways", [{}, {"down": "int8+delta"}])
def test_the_largest_change_that_is_accepted_never_ends_a_run(
    make_config: MakeConfig, ways: dict[str, str]
) -> None:
    """Round after round: what would grow out of the range of a message is cut, and the round says so."""
    config = make_config(clients=(2,), rounds=4, **ways)

    def largest(reply: Message) -> Message:
        size = get_workspace(config).layout("mood").size
        return _repacked(reply, vector=np.full(size, 1e4, np.float32))

    result = run_with(config, dict.fromkeys((1, 2, 3, 4), largest))
    rows = read_rows(result.folder, "rounds")
    assert [row["replied"] for row in rows[1:]] == [[0, 1]] * 4
    assert "were cut" in rows[-1]["note"]
    assert np.abs(result.state.shared).max() == LARGEST


class SlowGrid(InProcessGrid):
    """Holds back one client's answer to one round until ``until`` says so."""

    def __init__(self, config: RunConfig, until: Callable[[int], bool], make_app: Any = quick_app) -> None:
        super().__init__(config, 1, make_app)
        self.until, self.round = until, 0
        self.slow: dict[str, Message] = {}
        self.asked: dict[str, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        names = list(super().push_messages(sent))
        for message in sent:
            if message.metadata.message_type == "train":
                self.round = int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]
                if self.round == ROUND and self._partitions[message.metadata.dst_node_id] == BAD:
                    self.asked[message.metadata.message_id] = BAD
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        out = []
        for reply in super().pull_messages(wanted):
            name = reply.metadata.reply_to_message_id
            if name in self.asked and not self.until(self.round):
                self.slow[name] = reply
            else:
                out.append(reply)
        for name in [name for name in self.slow if name in wanted and self.until(self.round)]:
            out.append(self.slow.pop(name))
        return out


@pytest.mark.usefixtures("server_s_clock")
def test_a_straggler_s_late_reply_is_counted_named_and_not_used(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=4, server={"timeout": 1.0})
    result = run_on(SlowGrid(config, lambda round: round > ROUND))
    rows = read_rows(result.folder, "rounds")
    assert [row["replied"] for row in rows[1:]] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert rows[2]["rejected"] == [{"client": BAD, "reason": "no answer within 1 s"}]
    assert rows[3]["rejected"] == [{"client": BAD, "reason": "a late reply: it answers round 2"}]
    assert rows[4]["rejected"] == []
    ledger = [
        row for row in read_rows(result.folder, "ledger") if row["client"] == BAD and row["kind"] == "train"
    ]
    late = [row for row in ledger if row["status"] == "rejected"]
    assert [(row["round"], row["direction"]) for row in late] == [(3, "up")]
    assert late[0]["payload_bytes"] == next(r["payload_bytes"] for r in ledger if r["direction"] == "up")
    assert rows[3]["bytes"]["up"] == rows[2]["bytes"]["up"] + 2 * late[0]["payload_bytes"]
    assert sum(row["direction"] == "down" for row in ledger) == 4
    assert_mean_of_what_counted(result, config)


@pytest.mark.usefixtures("server_s_clock")
def test_a_reply_that_comes_much_too_late_is_forgotten(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=6, server={"timeout": 1.0})
    result = run_on(SlowGrid(config, lambda round: round == 6))
    rejected = [row["rejected"] for row in read_rows(result.folder, "rounds")[3:]]
    assert rejected == [[], [], [], []]
    assert_mean_of_what_counted(result, config)


def test_over_selection_closes_with_the_first_replies(make_config: MakeConfig) -> None:
    """Five are asked for four, and the first count. Client 1 is slow in round 2, and late in round 3."""
    config = make_config(clients=(4, 1), rounds=4, server={"clients_per_round": 4, "over_select": 1.25})
    result = run_on(SlowGrid(config, lambda round: round > ROUND))
    rows = read_rows(result.folder, "rounds")
    assert [row["sampled"] for row in rows[1:]] == [[0, 1, 2, 3, 4]] * 4
    assert [row["replied"] for row in rows[1:]] == [[0, 1, 2, 3], [0, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert {"client": BAD, "reason": SURPLUS} in rows[2]["rejected"]
    assert {"client": BAD, "reason": "a late reply: it answers round 2"} in rows[3]["rejected"]
    for row in rows[3:]:
        assert {"client": 4, "reason": SURPLUS} in row["rejected"]
    assert_mean_of_what_counted(result, config)


def test_over_selection_makes_up_for_a_client_that_fails(make_config: MakeConfig) -> None:
    config = make_config(
        clients=(3, 1), rounds=2, server={"clients_per_round": 3, "over_select": 1.3, "min_replies": 3}
    )
    silent = BAD_REPLIES["error"][0]
    grid = TamperedGrid(
        config,
        lambda client, _r, reply: [silent(reply)] if client == BAD else [reply],
        quick_app,  # type: ignore[arg-type]
    )
    result = run_on(grid)
    assert [row["replied"] for row in read_rows(result.folder, "rounds")[1:]] == [[0, 2, 3], [0, 2, 3]]
    assert_mean_of_what_counted(result, config)


def test_a_client_that_lost_its_state_is_told_all_again(make_config: MakeConfig) -> None:
    """As after a restart of its SuperNode: the same vectors, for the bytes of one whole vector more."""
    settings: dict[str, Any] = {"clients": (3, 1), "rounds": 3, "down": "fp32+delta"}

    class Forgetful(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            sent = list(messages)
            if any(_round(message) == 3 for message in sent):
                for node, partition in self._partitions.items():
                    if partition == BAD:
                        self.states.put(node, None)
            return super().push_messages(sent)

    config = make_config(**settings)
    result = run_on(Forgetful(config, 1, quick_app))  # type: ignore[arg-type]
    whole = run_on(InProcessGrid(make_config(name="whole", **settings), 1, quick_app))  # type: ignore[arg-type]
    assert result.summary["vector_sha256"] == whole.summary["vector_sha256"]
    assert result.summary["bytes"]["down"] > whole.summary["bytes"]["down"]
    assert [row["replied"] for row in read_rows(result.folder, "rounds")[1:]] == [[0, 1, 2, 3]] * 3


def _round(message: Message) -> int:
    record: Mapping[str, Any] = message.content.config_records.get("config", {})
    return int(record.get("round", 0))


def test_too_few_replies_end_the_run_and_fewer_let_it_go_on(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=3, server={"min_replies": 4})
    with pytest.raises(FederationError, match=r"round 2: expected at least 4 usable replies .*out of coffee"):
        run_with(config, {ROUND: raises})
    less = make_config(clients=(3, 1), rounds=3, server={"min_replies": 3})
    result = run_with(less, {ROUND: raises}, existing="resume")
    assert [row["replied"] for row in read_rows(result.folder, "rounds")[1:]] == [
        [0, 1, 2, 3],
        [0, 2, 3],
        [0, 1, 2, 3],
    ]
    assert_mean_of_what_counted(result, less)


def test_the_options_of_the_command_line(tmp_path: Path) -> None:
    given = {"min_replies": 2, "over_select": 1.2, "round_deadline": 20.0, "clients_per_round": 5}
    server = build_config(None, given).server
    assert (server.min_replies, server.over_select, server.timeout) == (2, 1.2, 20.0)
    for bad, said in (
        ({"over_select": 1.2}, "expected server.clients_per_round with it, found none"),
        ({"over_select": 0.5, "clients_per_round": 5}, "at least 1"),
        ({"round_deadline": 0.0}, "greater than 0"),
        ({"min_replies": 99}, "expected at most the 8 clients of a round"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_config(None, bad)
