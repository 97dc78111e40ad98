"""Thousands of clients: what one costs at rest, and that joining and dealing count every one."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

import fedmask.mask_cache
import fedmask.run_data
import fedmask.workspace
from experiments.inprocess import InProcessGrid
from fedmask.config import PartitionConfig, RunConfig
from fedmask.ledger import Ledger
from fedmask.tasks import tokenize
from fedmask.workspace import Workspace, get_workspace
from server.joining import join
from tests.apps.grids import read_rows, run_on
from tests.support import save_task

MakeConfig = Callable[..., RunConfig]
App = Callable[[Message, Context], Message]
K = 5_000

SLACK = 200


def keeper(_config: RunConfig) -> App:
    """Keeps a vector of K values of its own when it is told to, else nothing."""

    def app(message: Message, context: Context) -> Message:
        if "keep" in message.content:
            partition = int(context.node_config["partition-id"])
            own = np.full(K, partition, np.float32)
            if "own" in context.state:
                held = context.state.array_records["own"]["v"].numpy()
                assert held[0] == partition  # every node finds its own again
                own = held + 0
            context.state["own"] = ArrayRecord({"v": Array(own)})
        return Message(RecordDict(), reply_to=message)

    return app


def _ask_all(grid: InProcessGrid, content: RecordDict) -> None:
    nodes = list(grid.get_node_ids())
    for start in range(0, len(nodes), 100):
        some = [Message(content, dst_node_id=n, message_type="train") for n in nodes[start : start + 100]]
        assert not any(reply.has_error() for reply in grid.send_and_receive(some))


@pytest.mark.parametrize("stateful", [True, False])
def test_memory_of_clients_at_rest(make_config: MakeConfig, stateful: bool) -> None:
    count = 400
    grid = InProcessGrid(make_config(clients=(count,)), make_app=keeper)  # type: ignore[arg-type]
    content = RecordDict({"keep": ArrayRecord()} if stateful else {})
    tracemalloc.start()
    try:
        used = []
        for sent in (RecordDict(), RecordDict(), content, content):
            _ask_all(grid, sent)
            gc.collect()
            used.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # Bytes a client that libraries' own caches and other threads may take meanwhile: far below a vector.
    assert abs(used[1] - used[0]) / count < SLACK  # nothing is kept of what was said
    for grown in (used[2] - used[1], used[3] - used[1]):
        assert (K * 4 <= grown / count <= 1.2 * K * 4) if stateful else (grown / count < SLACK)


def test_shards_that_were_used_do_not_pile_up(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedmask.run_data, "SHARD_BYTES", 12_000)
    workspace = Workspace(make_config(clients=(60,)))
    first = workspace.shard(0)
    assert workspace.shard(0) is first
    for client in range(60):
        workspace.shard(client)
    assert 1 <= len(workspace._shards) < 10
    again = workspace.shard(0)
    assert again is not first and again.train.tokens.tobytes() == first.train.tokens.tobytes()


@pytest.mark.parametrize("regression", [False, True])
def test_rows_are_tokenized_as_their_own_data_set_would_be(make_config: MakeConfig, regression: bool) -> None:
    changes = {"metric": "spearman"} if regression else {}
    config = make_config(clients=(3,))
    if regression:
        path = Path(config.tasks[0].source).parent / "numbers.tsv"
        save_task(path, ("0.25", "0.5"), seed=1)
        task = config.tasks[0].model_copy(update={"source": str(path), **changes})
        config = config.model_copy(update={"tasks": (task,)})
    workspace = Workspace(config)
    for client in range(3):
        shard = workspace.shard(client)
        for part, rows in zip((shard.train, shard.held_out), workspace.split(client), strict=True):
            data = workspace.data("mood").train.select(rows)
            wanted = tokenize(data, workspace.backbone.tokenizer, config.train.max_tokens)
            for name in ("tokens", "offsets", "token_types", "labels"):
                one, other = getattr(part, name), getattr(wanted, name)
                if one is None:  # a tokenizer that tells no pair apart gives no token types
                    assert other is None
                else:
                    assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "shard", "pathological"])
def test_dealing_makes_no_data_set_a_client(
    make_config: MakeConfig, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of data sets that are made does not grow with the clients."""
    import datasets

    made: list[int] = []
    select = datasets.Dataset.select

    def counted(self: datasets.Dataset, *args: object, **kwargs: object) -> datasets.Dataset:
        made.append(1)
        return select(self, *args, **kwargs)

    workspace = Workspace(make_config(clients=(30,), partition={"kind": kind, "alpha": 50.0}))
    workspace.data("mood")
    monkeypatch.setattr(datasets.Dataset, "select", counted)
    rows = np.sort(np.concatenate([workspace.rows(client) for client in range(30)]))
    assert np.array_equal(rows, np.arange(len(workspace.data("mood").train)))
    assert len(made) <= 4
    assert workspace.config.partition == PartitionConfig(kind=kind, alpha=50.0)  # type: ignore[arg-type]


def test_every_node_is_asked_once_and_the_mask_is_derived_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(clients=(100, 50))
    derived: list[int] = []
    derive = fedmask.mask_cache.derive_mask

    def counted(*args: object) -> object:
        derived.append(1)
        return derive(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(fedmask.mask_cache, "derive_mask", counted)
    fedmask.workspace._workspace.cache_clear()
    ledger, workspace = Ledger(), get_workspace(config)
    roster = join(InProcessGrid(config), workspace, ledger, node_timeout=5.0, arrived=lambda _client: None)
    assert sorted(roster.nodes) == list(range(150)) and roster.failed == []
    assert len(ledger) == 300 and derived == [1]


def test_a_round_asks_its_sample_alone(make_config: MakeConfig) -> None:
    config = make_config(clients=(150,), server={"clients_per_round": 5, "strategy": "mean"})
    result = run_on(InProcessGrid(config))
    rows = read_rows(result.folder, "rounds")
    assert [len(row["sampled"]) for row in rows] == [0, 5, 5]
    assert rows[1]["sampled"] != rows[2]["sampled"]
