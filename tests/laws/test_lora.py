"""LoRA: one client's training is PEFT's own, merging changes no output, and only the factors move."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedmask import merge
from fedmask.config import TrainConfig
from fedmask.errors import ConfigError
from fedmask.models import Backbone, MeanHead, head_parameters, task_model
from fedmask.rng import rng_for
from fedmask.tasks import Tokenized, batches, collate
from fedmask.trainables import DenseTensors, LoRA, target_layers
from fedmask.training import Stream, local_update, tuned
from fedmask.tuner import Tuning, attach
from fedmask.workspace import Workspace
from tests.support import ARCHITECTURES, draw, make_model, outputs, run_config, save_run_files, tokens

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "llama": ["q_proj", "v_proj"],
}


def task(architecture: str) -> MeanHead:
    backbone = Backbone(make_model(architecture), None, architecture)
    model = task_model(backbone, "x", 3, head="mean", seed=1, dropout=0.0)
    assert isinstance(model, MeanHead)
    return model


def attached(model: nn.Module, *, head: bool = True, **options: Any) -> tuple[Tuning, LoRA]:
    lora = LoRA(model, draw(), **options)
    heads = [DenseTensors("head/x", model, head_parameters(model))] if head else []
    return attach(model, [lora, *heads]), lora


def under_peft(architecture: str, ours: LoRA, *, head: bool, frozen: bool = False) -> MeanHead:
    """The same model under PEFT, its own start of A replaced by ours."""
    from peft import LoraConfig, get_peft_model

    model = task(architecture).requires_grad_(False)
    model.head.requires_grad_(head)
    with warnings.catch_warnings():  # an old name that peft asks transformers for, and Conv1D noticed
        warnings.simplefilter("ignore")
        config = LoraConfig(r=ours.rank, lora_alpha=ours.alpha, target_modules=TARGETS[architecture])
        model.backbone = get_peft_model(model.backbone, config).base_model.model
    for i, layer in enumerate(ours.layers):
        start, up = peft_factors(model, layer)
        bound = start.shape[1] ** -0.5
        assert start.abs().max() <= bound and ours.factors(i)[0].abs().max() <= bound
        assert torch.allclose(start.std(), ours.factors(i)[0].std(), rtol=0.25)
        assert not up.any() and not ours.factors(i)[1].any()
        start.data.copy_(ours.factors(i)[0])
        start.requires_grad_(not frozen)
    return model.eval()


def peft_factors(model: MeanHead, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    state = dict(model.backbone.named_parameters())
    return state[f"{layer}.lora_A.default.weight"], state[f"{layer}.lora_B.default.weight"]


def plain_loop(model: nn.Module, data: Tokenized, plan: TrainConfig, stream: Stream) -> None:
    """What anybody would write around PEFT."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=plan.weight_decay)
    order = rng_for(stream.seed, stream.round, stream.client, "batches")
    for _ in range(int(plan.epochs)):
        for rows in batches(data, plan.batch_size, order):
            batch = collate(data, rows, 0)
            labels = batch.pop("labels")
            optimizer.zero_grad()
            functional.cross_entropy(model(**batch), labels).backward()
            nn.utils.clip_grad_norm_(trained, plan.clip_norm or np.inf)
            optimizer.step()


@pytest.mark.parametrize(
    ("architecture", "head", "decay"),
    # The head's decay is of its change, and so another thing than a plain loop's.
    [("bert", True, 0.0), ("bert", False, 0.1), ("gpt2", True, 0.0), ("t5", True, 0.0)],
)
def test_one_client_trains_as_under_peft(architecture: str, head: bool, decay: float) -> None:
    data, stream = tokens(17), Stream(1, 3, 2)
    plan = TrainConfig(epochs=2, batch_size=5, lr=0.01, weight_decay=decay, dropout=0.0)
    model = task(architecture)
    tuning, lora = attached(model, head=head, rank=4, alpha=6.0)
    other = under_peft(architecture, lora, head=head)
    before = other.head.weight.detach().clone()
    plain_loop(other, data, plan, stream)
    zeros = np.zeros(tuning.layout.size, np.float32)
    change = local_update(
        model, zeros, data, tokens(0), metric="accuracy", plan=plan, pad_id=0, stream=stream
    ).change
    with tuned(model, change, stream):
        for i, layer in enumerate(lora.layers):
            for ours, theirs in zip(lora.factors(i), peft_factors(other, layer), strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
                assert theirs.any()
        logits = outputs(model)
    assert torch.allclose(logits, outputs(other), atol=1e-5)
    assert head == (not torch.equal(before, other.head.weight))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merging_changes_no_output(architecture: str) -> None:
    model = make_model(architecture)
    tuning, lora = attached(model, head=False, rank=3)
    names = [name.rsplit(".", 1)[-1] for name in lora.layers]
    assert sorted(set(names)) == sorted(TARGETS[architecture])
    assert torch.allclose(outputs(model), outputs(make_model(architecture)), atol=1e-6)  # B is zero
    change = torch.from_numpy(rng_for(5, -1, -1, "test").standard_normal(tuning.layout.size)).float()
    tuning.begin(0.1 * change, draw())
    seen = outputs(model)
    assert not torch.allclose(seen, outputs(make_model(architecture)), atol=1e-3)
    assert torch.allclose(outputs(merge(copy.deepcopy(model))), seen, atol=1e-5)
    assert torch.allclose(tuning.vector(), 0.1 * change, atol=1e-7)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("query+value", 4), ("key", 2), ("attention", 8), ("feed-forward", 4), ("linear", 12), ("dense", 6)],
)
def test_targets_of_a_bert_of_two_layers(targets: str, layers: int) -> None:
    assert len(target_layers(make_model(), targets)) == layers


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown layers 'valeu'; the nearest is 'value' \(valid: query,"):
        target_layers(make_model(), "query+valeu")


def test_the_start_is_the_run_s_and_no_round_s(tmp_path: Path) -> None:
    """The change from the start travels: were the start a round's, no two rounds could be added."""
    folder = save_run_files(tmp_path / "run")
    first, again, other = (Workspace(run_config(folder, method="lora", seed=seed)) for seed in (1, 1, 2))
    starts = [_down(workspace, round) for workspace, round in ((first, 1), (first, 2), (again, -1))]
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], _down(other, 1))


def _down(workspace: Workspace, round: int) -> torch.Tensor:
    zeros = np.zeros(workspace.layout("mood").size, np.float32)
    with tuned(workspace.model("mood"), zeros, Stream(workspace.config.seed, round, 0)) as tuning:
        lora = tuning.trainables[0]
        assert isinstance(lora, LoRA)
        return lora.factors(0)[0].detach().clone()
