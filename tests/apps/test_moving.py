"""Masks that move: the whole flow, what travels, and the laws that every run keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.engines import run_inprocess
from fedmask.config import RunConfig
from fedmask.delta import apply_delta, read_delta
from fedmask.errors import ConfigError
from fedmask.export import merged, open_run
from fedmask.ledger import Ledger
from fedmask.models import load_backbone
from fedmask.space import backbone_parameters
from fedmask.workspace import Workspace
from server.app import RunResult
from tests.apps.test_resume import assert_same, broken_and_resumed

MakeConfig = Callable[..., RunConfig]


def moving(make_config: MakeConfig, **changes: Any) -> RunConfig:
    return make_config(**{"method": "pafi", "mask_schedule": "rotate", "rounds": 4} | changes)


def changed_entries(result: RunResult) -> np.ndarray:
    found = read_delta(result.folder / "delta.safetensors").indices
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["pafi+hiwi", "random"])
def test_each_round_trains_its_own_band_and_the_others_keep_their_change(
    make_config: MakeConfig, method: str
) -> None:
    config = moving(make_config, clients=(1,), method=method, mask_bands=3)
    workspace = Workspace(config)
    k, masks = workspace.k, [workspace.schedule.mask(round).indices for round in range(1, 5)]
    states = [run_inprocess(config.model_copy(update={"rounds": n, "name": f"r{n}"}),
                            client_evaluation=False) for n in (1, 2, 3, 4)]  # fmt: skip
    before: dict[int, float] = {}
    for round, result in enumerate(states, 1):
        union = np.unique(np.concatenate(masks[:round]))
        np.testing.assert_array_equal(changed_entries(result), union)
        assert union.size == (min(round, 3) * k if method != "random" else union.size) > (round > 1) * k
        now = dict(zip(union.tolist(), result.state.shared[: union.size].tolist(), strict=True))
        mine = set(masks[round - 1].tolist())
        assert all(now[at] == value for at, value in before.items() if at not in mine)
        assert sum(now[at] != before.get(at, 0.0) for at in mine) > 0.9 * k
        before = now


def test_bytes_are_one_band_a_round_and_no_indices(make_config: MakeConfig) -> None:
    """Up: k entries. Down: what the last round changed. A client that was away gets what it missed."""
    config = moving(make_config, rounds=5)
    workspace = Workspace(config)
    result = run_inprocess(config)
    head = {task: workspace.layout(task).size for task in config_tasks(config)}
    for row in Ledger.read_jsonl(result.folder / "ledger.jsonl"):
        if row.kind == "mask":
            assert row.payload_bytes < 256
            continue
        own = head[workspace.task_of(row.client)]
        wanted = 4 * (workspace.k + own)
        if row.kind == "train" and row.direction == "down" and row.round == 1:
            wanted = 0
        if row.kind == "evaluate" and row.direction == "up":
            wanted = 0
        assert row.payload_bytes == wanted, row


def config_tasks(config: RunConfig) -> list[str]:
    return [task.name for task in config.tasks]


def test_who_comes_late_gets_the_union_or_what_it_missed(make_config: MakeConfig) -> None:
    config = moving(make_config, clients=(4,), rounds=6, server={"clients_per_round": 1})
    workspace = Workspace(config)
    k, head = workspace.k, workspace.layout("mood").size
    folder = run_inprocess(config, client_evaluation=False).folder
    ledger = Ledger.read_jsonl(folder / "ledger.jsonl")
    rows = [row for row in ledger if row.kind == "train" and row.direction == "down"]
    held: dict[int, int] = {}
    late = 0
    for row in rows:
        version, since = row.round - 1, held.get(row.client, 0)
        whole, missed = 4 * (version * k + head), 4 * (version - since) * (k + head)
        assert row.payload_bytes == min(whole if version else 0, missed)
        late += version - since > 1
        held[row.client] = version
    assert late  # somebody was away for more than a round


@pytest.mark.parametrize("codecs", [{"up": "fp16"}, {"up": "int4+ef", "down": "int8+delta"}])
def test_resuming_changes_no_bit(make_config: MakeConfig, codecs: dict[str, str]) -> None:
    config = moving(make_config, mask_bands=2, method="pafi+hiwi", server={"clients_per_round": 3}, **codecs)
    whole = run_inprocess(config)
    assert whole.summary["unscored"] == []
    resumed = broken_and_resumed(config)
    assert_same(resumed.folder, whole.folder)


def test_anneal_settles(make_config: MakeConfig) -> None:
    config = moving(make_config, mask_schedule="anneal")
    workspace = Workspace(config)
    assert changed_entries(run_inprocess(config, client_evaluation=False)).size == 3 * workspace.k
    assert workspace.schedule.mask(2) == workspace.schedule.mask(3) != workspace.schedule.mask(4)


@pytest.mark.parametrize("strategy", ["mean", "fedmedian"])
def test_strategies_without_a_memory_work_on_the_rounds_mask(make_config: MakeConfig, strategy: str) -> None:
    config = moving(make_config, clients=(3,), rounds=2, server={"strategy": strategy})
    result = run_inprocess(config, client_evaluation=False)
    assert result.state.round == 2
    assert np.abs(result.state.shared).max() > 0


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_strategies_with_a_memory_are_refused(make_config: MakeConfig, strategy: str) -> None:
    config = moving(make_config, server={"strategy": strategy})
    with pytest.raises(ConfigError, match=r"keeps a state for each trained entry.*use 'fedavg'"):
        run_inprocess(config)
    assert not Path(config.runs_dir).exists()


def test_what_cannot_move_is_refused(make_config: MakeConfig) -> None:
    for method in ("full", "hiwi", "gradient"):
        with pytest.raises(ConfigError, match=f"mask_schedule: method '{method}' has no mask that every"):
            moving(make_config, method=method)
    with pytest.raises(ConfigError, match="expected mask_transport 'recipe'"):
        moving(make_config, mask_transport="packed")


def test_the_exported_model_is_the_scored_one(make_config: MakeConfig) -> None:
    config = moving(make_config, clients=(2, 1), method="pafi+hiwi")
    result = run_inprocess(config)
    workspace, delta = open_run(result.folder)
    own = merged(workspace, "mood", delta)
    plain = apply_delta(load_backbone(config.model).model, delta)
    fresh = load_backbone(config.model).model
    theirs, applied = backbone_parameters(own), backbone_parameters(plain)
    moved = 0
    for name, start in backbone_parameters(fresh).items():
        assert torch.equal(theirs[name], applied[name])
        moved += int((theirs[name] != start).sum())
    assert moved > 3.9 * Workspace(config).k
