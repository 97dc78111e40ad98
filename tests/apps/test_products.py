"""FedEx-LoRA through the apps: exact, what it costs, and the same residual with every party."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.budget import fit_budget
from experiments.engines import run_inprocess
from fedmask.channel import Received, payload_bytes, receive
from fedmask.config import RunConfig
from fedmask.errors import ConfigError
from fedmask.export import export_run, merged, open_run
from fedmask.flower import ARRAYS, record_bytes
from fedmask.ledger import Ledger
from fedmask.products import Products
from fedmask.tuner import tuning_of
from fedmask.workspace import Workspace
from server.downlink import down_contents
from tests.apps.test_resume import Cuts, PowerCut, assert_same

MakeConfig = Callable[..., RunConfig]
LORA = {"rank": 2, "alpha": 4.0}


def fedex(make_config: MakeConfig, **changes: Any) -> RunConfig:
    train = {"steps": 2, "batch_size": 8, "max_tokens": 16, "lr": 0.05, "dropout": 0.0}
    return make_config(**{"clients": (3,), "method": "fedex-lora", "lora": LORA, "train": train} | changes)


def backbone(workspace: Workspace, result: Any) -> dict[str, torch.Tensor]:
    _, delta = open_run(result.folder)
    return merged(workspace, "mood", delta).base_model.state_dict()


def test_the_weights_after_a_round_are_the_mean_of_the_clients_weights(make_config: MakeConfig) -> None:
    """Each client's model as a dense one, averaged by rows: W + mean(B_i A_i)."""
    config = fedex(make_config, rounds=1)
    result = run_inprocess(config)
    workspace = Workspace(config)
    zeros = np.zeros(workspace.layout("mood").size, np.float32)
    updates = [workspace.local_update(client, 1, zeros) for client in range(3)]
    rows = sum(update.examples for update in updates)
    dense: dict[str, torch.Tensor] = {}
    for update in updates:
        assert not update.change[: workspace.products.residual_size].any()  # type: ignore[union-attr]
        model = workspace.model("mood")
        tuning = tuning_of(model)
        tuning.begin(torch.from_numpy(update.change), lambda _: np.random.default_rng(0))
        lora = tuning.trainables[1]
        for slot, one in enumerate(lora.slots):
            weight = lora.effective(slot, one.tensor).detach().double() * (update.examples / rows)
            dense[one.name] = dense.get(one.name, torch.zeros(())) + weight
        tuning.restore()
    found = backbone(Workspace(config), result)
    pristine = workspace.backbone.model.state_dict()
    assert len(dense) == 4
    for name, wanted in dense.items():
        assert torch.allclose(found[name].double(), wanted, rtol=0, atol=1e-6)
        assert (wanted - pristine[name]).abs().max() > 1e-4
    residual = result.state.shared[: sum(weight.numel() for weight in dense.values())]
    assert np.abs(residual).max() > 1e-5  # without it this would be plain LoRA


def test_what_travels(make_config: MakeConfig) -> None:
    """Up: the factors and the head. Down: with them (n - 1) r products; nothing before the first mean."""
    config = fedex(make_config, rounds=3)
    result = run_inprocess(config)
    products = Workspace(config).products
    assert products is not None and products.sent_size == 2 * 2 * 4 * (32 + 32) < products.residual_size
    own = 4 * (4 * 2 * (32 + 32) + 2 * 33)
    for row in Ledger.read_jsonl(result.folder / "ledger.jsonl"):
        wanted = own if row.kind == "train" or row.direction == "down" else 0
        if row.direction == "down":
            wanted = 0 if row.kind == "train" and row.round == 1 else own + 4 * products.sent_size
        if row.kind != "mask":
            assert row.payload_bytes == wanted, row
    cost = result.summary["costs"]["this-run"]
    assert (cost["up_bytes"], cost["down_bytes"]) == (9 * own, 6 * (own + 4 * products.sent_size))

    # Where products would be more than the residual itself, that is sent; and every time without changes.
    for name, changes in (("many", {"lora": {"rank": 8}}), ("whole", {"down": "fp32"})):
        config = fedex(make_config, name=name, **changes)
        found = run_inprocess(config)
        values = Workspace(config).layout("mood").size
        rows = [r for r in Ledger.read_jsonl(found.folder / "ledger.jsonl") if r.direction == "down"]
        last = [r.payload_bytes for r in rows if r.kind == "train" and r.round == 2]
        assert last == [4 * values] * 3


def test_every_party_holds_the_same_residual(make_config: MakeConfig, tmp_path: Path) -> None:
    """Clients that miss rounds build on what they hold; one that comes late is sent the sum once."""
    config = fedex(make_config, clients=(4,), rounds=5, server={"clients_per_round": 2})
    result = run_inprocess(config)
    rows = list(Ledger.read_jsonl(result.folder / "ledger.jsonl"))
    assert {row.status for row in rows} == {"ok"}
    assert len([row for row in rows if row.kind == "train"]) == 5 * 2 * 2  # nobody had to be asked again
    workspace, public = Workspace(config), result.state.public["mood"]
    products = workspace.products
    assert products is not None and public.vector.size == workspace.layout("mood").size
    size = products.residual_size
    np.testing.assert_array_equal(public.vector[:size], result.state.shared[:size])
    assert public.vector[:size].any()
    missed = {int(row.payload_bytes) for row in rows if row.kind == "train" and row.direction == "down"}
    assert len(missed) > 2  # nothing, one change, or more of them

    late = record_bytes(down_contents(workspace, result.state, 5, {0: -1}, [0])[0][ARRAYS])
    nothing = Received(0, np.zeros(public.vector.size, np.float32))
    found = receive(late, nothing, 5, lambda at: workspace.change_terms(0, at), workspace.down_terms(0, 5))
    np.testing.assert_array_equal(found.vector, public.vector)
    assert payload_bytes(late) == 4 * public.vector.size
    (mood,) = export_run(result.folder, tmp_path / "out")
    assert not (mood / "peft").exists()  # the factors alone would be half of it


def test_only_what_is_sent_is_rounded(make_config: MakeConfig) -> None:
    """Where no client reads the factors, the server's residual is that of fp32; else it is theirs."""
    cases = {
        "whole": ("fp16", "fp32", 2),
        "many": ("fp16+delta", "fp32+delta", 8),
        "sent": ("fp16+delta", "", 2),
    }
    for name, (down, exact, rank) in cases.items():
        more = {"rounds": 1, "lora": {"rank": rank}}
        config = fedex(make_config, name=name, down=down, **more)
        found, size = run_inprocess(config).state, Workspace(config).products.residual_size  # type: ignore[union-attr]
        assert found.shared[:size].any()
        if exact:
            state = run_inprocess(fedex(make_config, name=f"{name}-exact", down=exact, **more)).state
            assert state.shared.tobytes() == found.shared.tobytes()
        else:
            assert found.public["mood"].vector[:size].tobytes() == found.shared[:size].tobytes()


def test_a_sum_reply_by_reply_has_the_bits_of_stacked_factors() -> None:
    rng = np.random.default_rng(4)
    products = Products(((5, 3), (4, 6)), (False, True), rank=2, scale=1.5, clients=4)
    changes = [rng.normal(0, 10.0 ** (i - 1), 36).astype(np.float32) for i in range(3)]  # one is missing
    weights = [0.5, 0.2, 0.3]
    mean = np.average(changes, axis=0, weights=weights)
    residual = rng.normal(0, 1, 39).astype(np.float32)
    stacked = products.stacked(changes, weights, mean)
    assert stacked.shape == (products.sent_size,) and stacked.dtype == np.float32
    found = products.summed(residual, changes, weights, mean)
    assert found.tobytes() == products.added(residual, stacked).tobytes() != residual.tobytes()
    # Of the layer that is stored as [outputs, inputs], in float64: the mean of B A is that of the sum.
    factors = [(one[:6].reshape(2, 3), one[6:16].reshape(5, 2)) for one in map(np.float64, changes)]
    exact = sum(w * up @ down for w, (down, up) in zip(weights, factors, strict=True))
    exact -= mean[6:16].reshape(5, 2) @ mean[:6].reshape(2, 3)
    np.testing.assert_allclose(found[:15], residual[:15] + 1.5 * exact.reshape(-1), rtol=1e-5, atol=1e-4)


def test_an_interrupted_run_goes_on_and_workers_do_not_matter(make_config: MakeConfig) -> None:
    coarse = {"down": "fp16+delta", "up": "int8+ef"}
    whole = run_inprocess(fedex(make_config, name="whole", rounds=3, workers=2, **coarse))
    config = fedex(make_config, rounds=3, **coarse)
    with pytest.raises(PowerCut):
        run_inprocess(config, Cuts("start", 3))
    assert_same(run_inprocess(config, existing="resume").folder, whole.folder)


def test_two_tasks_share_the_residual(make_config: MakeConfig) -> None:
    result = run_inprocess(fedex(make_config, clients=(2, 1), server={"sharing": "local-heads"}))
    assert result.state.shared.any() and not any(head.size for head in result.state.heads.values())
    with pytest.raises(ConfigError, match="--budget-bytes: method 'fedex-lora' allows few codecs down"):
        fit_budget(fedex(make_config), {"mood": 2}, 10_000)
