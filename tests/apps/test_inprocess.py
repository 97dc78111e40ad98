"""The in-process grid: real serialization, crashes that stay inside, clients that cost nothing at rest."""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig
from fedmask.flower import message_bytes
from tests.apps.fakes import QuickApp, assert_mean_of_what_counted
from tests.apps.grids import read_rows, run_on

MakeConfig = Callable[..., RunConfig]
App = Callable[[Message, Context], Message]


def echo(_config: RunConfig) -> App:
    """Answers with its process, partition and a counter kept in the state; some orders are special."""

    def app(message: Message, context: Context) -> Message:
        order = message.content.config_records["config"]["order"]
        if order == "raise":
            raise ValueError("bad\nthing")
        if order == "die":
            os._exit(7)
        if order == "sleep":
            time.sleep(30)
        if order == "threads":
            torch.set_num_threads(3)
        seen = context.state.metric_records.get("seen", MetricRecord({"count": 0}))
        context.state["seen"] = MetricRecord({"count": int(seen["count"]) + 1})  # type: ignore[arg-type]
        answer = {"pid": os.getpid(), "partition": context.node_config["partition-id"],
                  "count": int(seen["count"]) + 1}  # type: ignore[arg-type]  # fmt: skip
        return Message(RecordDict({"answer": ConfigRecord(answer)}), reply_to=message)

    return app


def ask(grid: InProcessGrid, order: str | dict[int, str], timeout: float = 200.0) -> dict[int, Message]:
    """Send an order to each partition; the replies by partition."""
    messages, owner = [], {}
    for node, partition in grid._partitions.items():
        said = order if isinstance(order, str) else order.get(partition, "hello")
        content = RecordDict({"config": ConfigRecord({"order": said})})
        messages.append(Message(content, dst_node_id=node, message_type="train"))
        owner[node] = partition
    return {
        owner[reply.metadata.src_node_id]: reply for reply in grid.send_and_receive(messages, timeout=timeout)
    }


def answers(replies: dict[int, Message], key: str) -> dict[int, int]:
    return {p: int(r.content.config_records["answer"][key]) for p, r in replies.items() if r.has_content()}  # type: ignore[arg-type]


def test_everything_is_serialized(make_config: MakeConfig) -> None:
    """No object of the sender reaches the receiver, and the counted bytes are what was serialized."""
    received = []

    def keep(_config: RunConfig) -> App:
        def app(message: Message, context: Context) -> Message:
            received.append(message)
            return Message(RecordDict({"same": message.content["arrays"]}), reply_to=message)

        return app

    grid = InProcessGrid(make_config(), make_app=keep)
    values = np.arange(1000, dtype=np.float32)
    sent = Message(
        RecordDict({"arrays": ArrayRecord({"a": Array(values)})}),
        dst_node_id=next(iter(grid.get_node_ids())),
        message_type="train",
    )
    (reply,) = grid.send_and_receive([sent])
    assert received[0] is not sent
    assert received[0].content["arrays"] is not sent.content["arrays"]
    assert reply.content["same"] is not received[0].content["arrays"]
    np.testing.assert_array_equal(reply.content["same"]["a"].numpy(), values)  # type: ignore[union-attr, index]
    assert reply.metadata.reply_to_message_id == sent.metadata.message_id == received[0].metadata.message_id
    assert message_bytes([sent]) == message_bytes([received[0]])
    assert 4000 < message_bytes([sent])[0] < 5500


def test_messages_that_share_content_are_counted_each(make_config: MakeConfig) -> None:
    grid = InProcessGrid(make_config())
    content = RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(500))})})
    several = [Message(content, dst_node_id=n, message_type="train") for n in grid.get_node_ids()]
    together = message_bytes(several)
    assert together == [message_bytes([one])[0] for one in several]


def test_an_exception_is_an_error_reply(make_config: MakeConfig) -> None:
    replies = ask(InProcessGrid(make_config(), make_app=echo), {1: "raise"})  # type: ignore[arg-type]
    assert replies[1].error.reason == "ValueError: bad thing"
    assert sorted(answers(replies, "partition")) == [0, 2, 3, 4]


def test_state_is_each_nodes_own(make_config: MakeConfig) -> None:
    grid = InProcessGrid(make_config(), make_app=echo)  # type: ignore[arg-type]
    ask(grid, "hello")
    counts = answers(ask(grid, {2: "raise"}), "count")
    assert counts == {0: 2, 1: 2, 3: 2, 4: 2}
    assert answers(ask(grid, "hello"), "count")[2] == 2  # what it kept before it failed


def test_the_drivers_threads_are_restored(make_config: MakeConfig) -> None:
    before = torch.get_num_threads()
    ask(InProcessGrid(make_config(), make_app=echo), "threads")  # type: ignore[arg-type]
    assert torch.get_num_threads() == before


def test_unknown_nodes_and_old_messages(make_config: MakeConfig) -> None:
    grid = InProcessGrid(make_config(), make_app=echo)  # type: ignore[arg-type]
    content = RecordDict({"config": ConfigRecord({"order": "hello"})})
    lost = Message(content, dst_node_id=5, message_type="train")
    assert list(grid.push_messages([lost])) == []
    node = next(iter(grid.get_node_ids()))
    late = Message(content, dst_node_id=node, message_type="train", ttl=0.001)
    names = list(grid.push_messages([late]))
    time.sleep(0.01)
    assert list(grid.pull_messages(names)) == []


def test_processes_work_fail_die_and_are_replaced(make_config: MakeConfig) -> None:
    with InProcessGrid(make_config(), workers=2, make_app=echo) as grid:  # type: ignore[arg-type]
        first = answers(ask(grid, "hello"), "pid")
        assert os.getpid() not in first.values()
        replies = ask(grid, {1: "raise", 3: "die"})
        assert replies[1].error.reason == "ValueError: bad thing"
        assert replies[3].error.reason == "the worker process died (exit code 7)"
        again = ask(grid, "hello")
        assert answers(again, "count") == {0: 3, 1: 2, 2: 3, 3: 2, 4: 3}
        assert not set(answers(again, "pid").values()) <= set(first.values())
        victim = grid._workers._workers[0].process  # type: ignore[union-attr]
        victim.kill()  # while it has nothing to do
        victim.join()
        failed = [reply.error.reason for reply in ask(grid, "hello").values() if reply.has_error()]
        assert failed == ["the worker process died (exit code -9)"]
        begun = time.monotonic()
        assert sorted(ask(grid, {0: "sleep"}, timeout=6.0)) == [1, 2, 3, 4]
        assert time.monotonic() - begun < 25.0  # the one that sleeps takes 30
        pids = _pids(grid)
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class DyingApp(QuickApp):
    """A ClientApp whose process dies as client 1 trains in round 2."""

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            number = message.content.config_records["config"]["round"]
            if (context.node_config["partition-id"], number) == (1, 2):
                os._exit(7)
        return super().__call__(message, context)


def test_a_run_goes_on_when_a_client_s_process_dies(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=3, eval_rows=2)
    with InProcessGrid(config, 2, DyingApp) as grid:  # type: ignore[arg-type]
        first = _pids(grid)
        result = run_on(grid)
        assert len(_pids(grid) - first) == 1 == len(first - _pids(grid))
    rows = read_rows(result.folder, "rounds")
    assert [row["replied"] for row in rows[1:]] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert rows[2]["rejected"] == [{"client": 1, "reason": "the worker process died (exit code 7)"}]
    assert_mean_of_what_counted(result, config)


def _pids(grid: InProcessGrid) -> set[int | None]:
    return {worker.process.pid for worker in grid._workers._workers}  # type: ignore[union-attr]


def test_a_client_at_rest_costs_nearly_nothing(make_config: MakeConfig) -> None:
    config = make_config(clients=(10_000, 10_000))
    gc.collect()
    tracemalloc.start()
    try:
        grid = InProcessGrid(config)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(list(grid.get_node_ids())) == 20_000
    assert used / 20_000 < 250  # bytes: a node id, a partition and their place in a dictionary
