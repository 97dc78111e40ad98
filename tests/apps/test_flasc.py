"""FLASC through the apps, against its rule in a few lines on the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from experiments.engines import run_inprocess
from fedmask.config import RunConfig
from fedmask.ledger import Ledger
from fedmask.tuner import tuning_of
from fedmask.workspace import Workspace
from tests.apps.grids import read_rows
from tests.apps.test_resume import assert_same, broken_and_resumed

MakeConfig = Callable[..., RunConfig]


def flasc(make_config: MakeConfig, **changes: Any) -> RunConfig:
    train = {"steps": 2, "batch_size": 8, "max_tokens": 16, "lr": 0.05, "dropout": 0.0}
    lora = {"rank": 2, "alpha": 4.0}
    return make_config(**{"clients": (3,), "method": "flasc", "lora": lora, "train": train} | changes)


def weights(workspace: Workspace, vector: np.ndarray) -> np.ndarray:
    """A and B, layer by layer, and the head, as the model has them at ``vector``."""
    model = workspace.model("mood")
    tuning = tuning_of(model)
    tuning.begin(torch.tensor(vector), lambda _: np.random.default_rng(0))
    lora, head = tuning.trainables
    found = [factor for layer in range(len(lora.layers)) for factor in lora.factors(layer)]  # type: ignore[operator,attr-defined,arg-type]
    found += [head.effective(slot, one.tensor) for slot, one in enumerate(head.slots)]
    tuning.restore()
    return np.concatenate([one.detach().numpy().flatten() for one in found])


def largest(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """``values`` where ``of`` is among the quarter of largest magnitude, zeros elsewhere."""
    out = np.zeros_like(values)
    kept = np.argsort(-np.abs(of), kind="stable")[: round(of.size / 4)]
    out[kept] = values[kept]
    return out


def test_each_client_starts_from_the_largest_weights_and_sends_its_largest_changes(
    make_config: MakeConfig,
) -> None:
    config = flasc(make_config)
    found = run_inprocess(config, client_evaluation=False)
    workspace = Workspace(config)
    zeros = np.zeros(workspace.layout("mood").size, np.float32)
    start, moved = weights(workspace, zeros), zeros
    for round in (1, 2):
        masked = largest(start + moved, start + moved)
        assert np.count_nonzero(masked) == masked.size // 4
        np.testing.assert_allclose(weights(workspace, masked - start), masked, rtol=0, atol=1e-8)
        assert not weights(workspace, masked - start)[masked == 0].any()  # of A, too: not its drawn start
        updates = [workspace.local_update(client, round, masked - start) for client in range(3)]
        rows = sum(update.examples for update in updates)
        sent = [largest(update.change, update.change) * (update.examples / rows) for update in updates]
        moved = (moved + sum(sent)).astype(np.float32)
    np.testing.assert_allclose(found.state.exact("mood"), moved, rtol=0, atol=1e-7)
    down = [row for row in Ledger.read_jsonl(found.folder / "ledger.jsonl") if row.direction == "down"]
    least = 4 * (zeros.size // 4)
    assert all(least < row.payload_bytes < least + zeros.size / 9 + 16 for row in down if row.kind == "train")


def test_workers_and_resuming_change_no_bit(make_config: MakeConfig) -> None:
    config = flasc(make_config, rounds=3, clients=(2, 1), server={"clients_per_round": 2})
    whole = run_inprocess(config)
    assert_same(broken_and_resumed(config, workers=2).folder, whole.folder)


@pytest.mark.parametrize("down", ["fp32", "topk:0.25/fp32+delta"])
def test_other_ways_down_send_changes(make_config: MakeConfig, down: str) -> None:
    """Where all is sent there is nothing to rank; a change is ranked by itself, what it lacks is carried."""
    config = flasc(make_config, down=down)
    assert Workspace(config).down_terms(0, 1).origin is None
    found = run_inprocess(config)
    assert [row["rejected"] for row in read_rows(found.folder, "rounds")] == [[], [], []]
