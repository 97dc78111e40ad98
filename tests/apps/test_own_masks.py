"""A mask a client: what is averaged, what travels, and the laws that every run keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr.app import Context, Message, RecordDict

from clients.app import make_client_app
from experiments.engines import run_inprocess
from experiments.inprocess import InProcessGrid
from fedmask.codecs import pack_indices
from fedmask.config import RunConfig
from fedmask.delta import read_delta
from fedmask.errors import ConfigError
from fedmask.flower import INDICES, PLACES
from fedmask.ledger import Ledger
from fedmask.methods import TASK_SPECIFIC
from fedmask.workspace import Workspace, get_workspace
from server.resume import STATE
from tests.apps.grids import TamperedGrid, read_rows, run_on
from tests.apps.test_resume import Cuts, PowerCut, assert_same, broken_and_resumed, spoil

MakeConfig = Callable[..., RunConfig]
SCORES = {"samples": 24, "batches": 1, "steps": 2}


def own(make_config: MakeConfig, **changes: Any) -> RunConfig:
    return make_config(**{"method": "gradient", "placement": "client", "scores": SCORES} | changes)


def masks_of(config: RunConfig) -> dict[int, np.ndarray]:
    workspace = Workspace(config)
    rule = workspace.rule
    assert rule is not None
    return {c: workspace.scores(rule.name, c).mask(rule).indices for c in range(config.clients)}


@pytest.mark.parametrize("ways", [{}, {"up": "int4+ef", "down": "int8+delta"}])
def test_an_older_state_of_the_server_goes_on(make_config: MakeConfig, ways: dict[str, str]) -> None:
    """Its newest state is damaged, so clients hold a version that the run has not come to."""
    whole = run_inprocess(own(make_config, name="whole", rounds=3, **ways))
    config = own(make_config, rounds=3, **ways)
    with pytest.raises(PowerCut):
        run_inprocess(config, Cuts("end", 2))
    folder = Path(config.runs_dir) / config.name
    spoil(folder / STATE, "flip")
    found = run_inprocess(config, existing="resume")
    assert [len(row["replied"]) for row in read_rows(folder, "rounds")[1:]] == [config.clients] * 3
    np.testing.assert_allclose(found.state.shared, whole.state.shared, atol=1e-2)
    assert ways or found.summary["vector_sha256"] == whole.summary["vector_sha256"]


@pytest.mark.parametrize("method", sorted(TASK_SPECIFIC))
def test_every_message_of_two_rounds(make_config: MakeConfig, method: str) -> None:
    """Values of the union and the indices that are new go down; k values, and the mask once, come up."""
    config = own(make_config, method=method, overlap_batches=2)
    result = run_inprocess(config)
    masks, workspace = masks_of(config), Workspace(config)
    space, union = workspace.space, np.unique(np.concatenate(list(masks.values())))
    assert len({mask.tobytes() for mask in masks.values()}) == config.clients
    rows = [row for row in Ledger.read_jsonl(result.folder / "ledger.jsonl") if row.kind == "train"]
    for row in rows:
        mask, head = masks[row.client], workspace.layout(workspace.task_of(row.client)).size
        new = np.setdiff1d(union, mask)
        positions = {
            ("down", 1): 5,  # versions, no own mask, nothing new, no steps
            ("up", 1): len(pack_indices(mask, space.size, space.offsets)),
            ("down", 2): len(pack_indices(new, space.size, space.offsets)),
            ("up", 2): 0,
        }[row.direction, row.round]
        values = {("down", 1): 0, ("down", 2): 4 * (union.size + head)}.get(
            (row.direction, row.round), 4 * (workspace.k + head)
        )
        assert 0 <= row.payload_bytes - values - positions <= 9, row  # a few bytes say how long things are
    search = result.summary["mask_search"]
    assert (search["placement"], search["rule"], search["clients"]) == ("client", method, config.clients)
    assert search["seconds"] > 0
    assert result.summary["unscored"] == []
    overlap = result.summary["overlap"]
    assert (overlap["rule"], overlap["clients"], overlap["union"]) == (method, config.clients, union.size)
    delta = read_delta(result.folder / "delta.safetensors")
    np.testing.assert_array_equal(delta.indices, union)
    np.testing.assert_array_equal(delta.segments["mask"], result.state.shared)


def test_the_mean_of_an_entry_is_over_those_that_hold_it(make_config: MakeConfig) -> None:
    """Two clients, one round: against a dense mean by hand, from each client's run alone."""
    both = own(make_config, clients=(2,), rounds=1)
    changes = {}

    def note(client: int, round: int, reply: Message) -> list[Message]:
        from fedmask.codecs import read_header, unpack_update
        from fedmask.flower import ARRAYS, record_bytes

        data = record_bytes(reply.content.array_records[ARRAYS])
        head = read_header(data)
        changes[client] = unpack_update(data, layout=head.layout, digest=head.digest, round=round)
        return [reply]

    result = run_on(TamperedGrid(both, note))
    masks, workspace = masks_of(both), Workspace(both)
    rows = [len(workspace.split(client)[0]) for client in (0, 1)]
    dense, weight = np.zeros(workspace.space.size), np.zeros(workspace.space.size)
    for client in (0, 1):
        dense[masks[client]] += rows[client] * changes[client][: workspace.k].astype(np.float64)
        weight[masks[client]] += rows[client]
    union = np.flatnonzero(weight)
    np.testing.assert_allclose(result.state.shared, dense[union] / weight[union], rtol=1e-6, atol=1e-9)
    head = sum(rows[c] * changes[c][workspace.k :].astype(np.float64) for c in (0, 1)) / sum(rows)
    np.testing.assert_allclose(result.state.heads["mood"], head, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("codecs", "workers"), [({"up": "fp16"}, 1), ({"up": "int4+ef", "down": "int8+delta"}, 2)]
)
def test_workers_and_resuming_change_no_bit(
    make_config: MakeConfig, codecs: dict[str, str], workers: int
) -> None:
    config = own(make_config, rounds=4, server={"clients_per_round": 2}, **codecs)
    whole = run_inprocess(config)
    assert whole.summary["unscored"] == []
    resumed = broken_and_resumed(config, workers=workers)
    assert_same(resumed.folder, whole.folder)


class Forgetful:
    """A client whose node loses its state before the third round, as a SuperNode that is restarted does."""

    def __init__(self, config: RunConfig) -> None:
        self.real = make_client_app(config)

    def __call__(self, message: Message, context: Context) -> Message:
        record = message.content.config_records.get("config")
        if message.metadata.message_type == "train" and record is not None and record["round"] == 3:
            context.state = RecordDict()
        return self.real(message, context)


@pytest.mark.parametrize("schedule", ["rotate", "fixed"])
def test_clients_that_lose_their_state_are_told_all_again(make_config: MakeConfig, schedule: str) -> None:
    changes = {"method": "pafi", "mask_schedule": "rotate"} if schedule == "rotate" else {}
    config = own(make_config, clients=(2,), rounds=4, **changes)
    whole = run_inprocess(config, client_evaluation=False)
    told = run_on(InProcessGrid(config, 1, Forgetful))  # type: ignore[arg-type]
    assert told.summary["vector_sha256"] == whole.summary["vector_sha256"]
    assert told.summary["bytes"]["down"] > whole.summary["bytes"]["down"]
    assert all(row["rejected"] == [] for row in read_rows(told.folder, "rounds"))


def test_bad_masks_are_refused_by_name(make_config: MakeConfig) -> None:
    config = own(make_config, clients=(3,), rounds=2)
    bad = {0: b"", 1: b"\xff" * 20}

    def tamper(client: int, round: int, reply: Message) -> list[Message]:
        record = reply.content.config_records.get("config")
        if round == 1 and client in bad and record is not None:
            record[INDICES] = bad[client] or 5
        return [reply]

    rows = read_rows(run_on(TamperedGrid(config, tamper)).folder, "rounds")
    assert rows[1]["replied"] == [2]
    assert "expected the client's mask with its first update" in rows[1]["rejected"][0]["reason"]
    assert rows[2]["replied"] == [0, 1, 2]  # they bring their masks again


def test_a_client_says_what_it_misses(make_config: MakeConfig) -> None:
    config = own(make_config, clients=(1,))
    app, asked = make_client_app(config), []

    class Grid(InProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            sent = list(messages)
            asked.extend(m for m in sent if m.metadata.message_type == "train")
            return super().push_messages(sent)

    run_on(Grid(config))
    for places, wanted in (
        (b"\x01", "positions|varint|expected"),
        (5, "expected the positions of the union"),
    ):
        message = asked[-1]
        message.content.config_records["config"][PLACES] = places  # type: ignore[assignment]
        context = Context(1, 1, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {})
        with pytest.raises(Exception, match=wanted):
            app(message, context)
    assert get_workspace(config).mask is None


@pytest.mark.parametrize("strategy", ["fedavgm", "fedmedian", "krum"])
def test_strategies_over_whole_vectors_are_refused(make_config: MakeConfig, strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"with placement 'client' every client's has other entries: use"):
        run_inprocess(own(make_config, server={"strategy": strategy}))
