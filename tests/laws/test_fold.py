"""Adapters on weights and biases: start at the pre-trained model, fold exactly, travel as a change."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmask import Rule, magnitude_mask, merge, sparsify, weight_adapters
from fedmask.config import AdapterConfig, RunConfig, TaskConfig
from fedmask.errors import CheckpointError, ConfigError
from fedmask.masks import mask_from_indices
from fedmask.methods import METHODS, backbone_trainables, check_federated
from fedmask.space import backbone_of, backbone_parameters, parameter_space
from fedmask.trainables import (
    ACTIVATIONS,
    BiasAdapters,
    DenseTensors,
    MaskedEntries,
    MaskedWeightAdapters,
    Trainable,
    WeightAdapters,
    feed_forward_biases,
    feed_forward_layers,
)
from fedmask.trainables.adapters import draw_down
from fedmask.tuner import Tuning, attach, detach
from tests.support import ARCHITECTURES, BIASED, batch, draw, loss_of, make_model, outputs, train_a_little


def make(kind: str, model: nn.Module, **options: Any) -> Trainable:
    if kind == "bias":
        return BiasAdapters(model, **options)
    if kind == "weight":
        return WeightAdapters(model, **options)
    return MaskedWeightAdapters(model, magnitude_mask(model, 0.05, "all", per_tensor=True), **options)


KINDS = pytest.mark.parametrize("kind", ["bias", "weight", "masked weight"])


def begun(kind: str, architecture: str = "bert", round: int = 1, **options: Any) -> tuple[Any, Tuning]:
    model = make_model(architecture, classes=3)
    tuning = attach(model, [make(kind, model, **{"bottleneck": 4, **options})])
    tuning.begin(torch.zeros(tuning.layout.size), draw(round=round))
    return model, tuning


@KINDS
@pytest.mark.parametrize("architecture", BIASED)
def test_the_merged_model_is_the_tuned_one_and_the_start_is_the_pre_trained_one(
    kind: str, architecture: str
) -> None:
    model, tuning = begun(kind, architecture)
    assert torch.equal(outputs(model), outputs(make_model(architecture, classes=3)))
    assert not tuning.vector().any()
    train_a_little(model, 2, lr=0.05)
    wanted, change = outputs(model).detach(), tuning.vector()
    assert (wanted - outputs(make_model(architecture, classes=3))).abs().max() > 1e-3
    merged = merge(copy.deepcopy(model))
    assert torch.allclose(outputs(merged), wanted, atol=1e-6)
    # What travels is that very fold: another client that starts from it sees the same model.
    other, others = begun(kind, architecture, round=2)
    others.begin(change, draw(round=2))
    assert torch.allclose(outputs(other), wanted, atol=1e-6)
    assert torch.allclose(others.vector(), change, atol=1e-7)


@KINDS
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_second_round_starts_from_the_first_one_s_change(kind: str, activation: str) -> None:
    model, tuning = begun(kind, activation=activation)
    train_a_little(model, 1)
    first = tuning.vector()
    wanted = outputs(model).detach()
    tuning.restore()
    tuning.begin(first, draw(round=2))
    assert torch.allclose(outputs(model), wanted, atol=1e-6)
    train_a_little(model, 1)
    second = tuning.vector()
    assert not torch.allclose(second, first, atol=1e-4)
    merged = merge(copy.deepcopy(model))
    assert torch.allclose(outputs(merged), outputs(model), atol=1e-6)
    detach(model)
    tensors = dict(backbone_parameters(merged))
    if kind == "bias":
        names = feed_forward_biases(model)
        moved = torch.cat([(tensors[n] - backbone_parameters(model)[n]).flatten() for n in names])
        assert torch.allclose(moved, second, atol=1e-6)


@KINDS
def test_the_formula(kind: str) -> None:
    """b' = b + f(b W_down) W_up with numbers put in by hand, against NumPy."""
    model, tuning = begun(kind, "gpt2", activation="relu")
    rng = np.random.default_rng(0)
    trainable = tuning.trainables[0]
    numbers = (rng.standard_normal(trainable.values.numel()) * 0.2).astype(np.float32)
    with torch.no_grad():
        trainable.values.copy_(torch.from_numpy(numbers))
    plain = backbone_parameters(make_model("gpt2"))
    found = tuning.vector().numpy()
    at, wanted = 0, []
    if kind == "masked weight":
        at = trainable.size
    for name, _ in feed_forward_layers(model):
        if kind == "bias":
            rows = plain[f"{name}.bias"].detach().numpy()[None, :]
        else:
            rows = plain[f"{name}.weight"].detach().numpy().T  # Conv1D stores [inputs, outputs]
        size = rows.shape[1] * 4
        down, up = numbers[at : at + size].reshape(-1, 4), numbers[at + size : at + 2 * size].reshape(4, -1)
        at += 2 * size
        change = np.maximum(rows @ down, 0) @ up
        wanted.append(change if kind == "bias" else change.T)
    if kind == "masked weight":
        mask = trainable.mask  # type: ignore[union-attr]
        names = [f"{name}.weight" for name, _ in feed_forward_layers(model)]
        parts, start = [], 0
        for name, index in mask.per_tensor().items():
            direct = numbers[start : start + index.size]
            start += index.size
            extra = wanted[names.index(name)].ravel()[index] if name in names else 0
            parts.append(direct + extra)
        np.testing.assert_allclose(found, np.concatenate(parts), atol=1e-6)
    else:
        np.testing.assert_allclose(found, np.concatenate([w.ravel() for w in wanted]), atol=1e-6)
    assert at == trainable.values.numel()


@KINDS
def test_all_clients_of_a_round_draw_the_same_and_another_round_draws_anew(kind: str) -> None:
    start = [begun(kind, round=round)[1].trainables[0].values.detach() for round in (1, 1, 2)]
    assert torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])
    tail = start[0][-4:]
    assert not tail.any()  # W_up, the last part, starts at zero


@KINDS
def test_the_same_factors_wherever_the_adapters_stand(kind: str) -> None:
    """The order in which other parts drew before must not matter: each draw has a name of its own."""
    model = make_model("bert", classes=3)
    alone = begun(kind)[1].trainables[0].values
    trainable = make(kind, model, bottleneck=4)
    tuning = attach(model, [DenseTensors("head/x", model, ["classifier.weight"]), trainable])
    tuning.begin(torch.zeros(tuning.layout.size), draw())
    assert torch.equal(trainable.values, alone)


def test_a_dead_draw_is_drawn_again() -> None:
    """One value, one unit: ReLU lives only for a draw of the value's sign."""
    rows = torch.tensor([[-1.0]])
    signs = {name: draw(7)(f"adapter/{name}/0").standard_normal() > 0 for name in "abcdefgh"}
    assert len(set(signs.values())) == 2
    for name, positive in signs.items():
        down = draw_down(draw(7), name, rows, 1, ACTIVATIONS["relu"])
        attempts = [float(draw(7)(f"adapter/{name}/{i}").standard_normal()) for i in range(20)]
        wanted = next(number for number in attempts if number < 0)
        assert float(down) == pytest.approx(wanted * 2**0.5)
        assert (float(down) == pytest.approx(attempts[0] * 2**0.5)) is not positive
        assert bool(torch.relu(rows @ down).any())


def test_no_live_draw_in_a_hundred_is_an_error() -> None:
    def always_positive(purpose: str) -> Any:
        class Fixed:
            def standard_normal(self, shape: tuple[int, int]) -> np.ndarray:
                return np.ones(shape)

        return Fixed()

    with pytest.raises(CheckpointError, match="larger bottleneck"):
        draw_down(always_positive, "x", torch.tensor([[-1.0, -2.0]]), 2, ACTIVATIONS["relu"])


def test_biases_that_are_all_zero_are_refused() -> None:
    model = make_model("bert", classes=3)
    name = "encoder.layer.1.output.dense.bias"
    backbone_of(model).get_parameter(name).detach().zero_()
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.bias: .*ffn-bias") as error:
        sparsify(model, magnitude_mask(model, 0.01), bias_adapters=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_an_architecture_without_biases_is_refused_with_a_remedy(architecture: str) -> None:
    model = make_model(architecture)
    mask = magnitude_mask(model, 0.01)
    for act in (
        lambda: sparsify(model, mask, bias_adapters=4),
        lambda: sparsify(model, mask, ffn_bias=True),
        lambda: BiasAdapters(model),
    ):
        with pytest.raises(ConfigError, match=r"no feed-forward biases.*use method 'pafi'") as error:
            act()
        assert "\n" not in str(error.value)
    assert "fedmask" not in repr(model)
    assert all(p.requires_grad for p in model.parameters())
    tuned = weight_adapters(model, bottleneck=2)  # weights it has
    train_a_little(tuned, 1)
    wanted = outputs(tuned)
    assert torch.allclose(outputs(merge(tuned)), wanted, atol=1e-6)


def test_a_mask_without_feed_forward_entries_is_refused_for_weight_adapters() -> None:
    model = make_model("bert")
    space = parameter_space(model)
    assert space.names[0] == "encoder.layer.0.attention.self.query.weight"
    mask = mask_from_indices(np.arange(5, dtype=np.int64), space, Rule("given"))
    with pytest.raises(ConfigError, match="no entry of a feed-forward matrix"):
        MaskedWeightAdapters(model, mask)


def test_feed_forward_layers_by_architecture() -> None:
    ends = {
        "bert": ("intermediate.dense", "output.dense"),
        "roberta": ("intermediate.dense", "output.dense"),
        "distilbert": ("ffn.lin1", "ffn.lin2"),
        "gpt2": ("mlp.c_fc", "mlp.c_proj"),
        "opt": ("fc1", "fc2"),
        "t5": ("DenseReluDense.wi", "DenseReluDense.wo"),
        "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    }
    for architecture in ARCHITECTURES:
        names = [name for name, _ in feed_forward_layers(make_model(architecture))]
        assert len(names) == 2 * len(ends[architecture])
        for i, name in enumerate(names):
            assert name.endswith(ends[architecture][i % len(ends[architecture])]), name
            assert "attention" not in name


@KINDS
def test_the_gradient_of_the_factors_is_that_of_autograd(kind: str) -> None:
    """Against the same formula written out over a functional call of an untouched copy."""
    model, tuning = begun(kind)
    trainable = tuning.trainables[0]
    with torch.no_grad():
        trainable.values.add_(
            torch.randn(trainable.values.shape, generator=torch.Generator().manual_seed(0)) * 0.1
        )
    loss_of(model).backward()
    found = trainable.values.grad
    assert found is not None

    plain = make_model("bert", classes=3)
    values = trainable.values.detach().clone().requires_grad_()
    tensors = backbone_parameters(plain)
    seen = {}
    at = trainable.size if kind == "masked weight" else 0
    direct: dict[str, torch.Tensor] = {}
    places: dict[str, torch.Tensor] = {}
    if isinstance(trainable, MaskedEntries):
        start = 0
        for name, index in trainable.mask.per_tensor().items():
            places[name] = torch.from_numpy(index)
            direct[name] = values[start : start + index.size]
            start += index.size
    for layer, _ in feed_forward_layers(plain):
        name = f"{layer}.bias" if kind == "bias" else f"{layer}.weight"
        if kind == "masked weight" and name not in places:
            continue
        rows = tensors[name].detach()
        if kind == "masked weight":  # the adapter reads the weights that the round starts from
            rows = rows.clone()
        width = rows.shape[-1]
        down = values[at : at + 4 * width].view(width, 4)
        up = values[at + 4 * width : at + 8 * width].view(4, width)
        at += 8 * width
        seen[name] = torch.relu(rows @ down) @ up
    if kind == "masked weight":
        everything = {}
        for name, index in places.items():
            change = direct[name] + (seen[name].reshape(-1)[index] if name in seen else 0)
            everything[name] = torch.zeros(tensors[name].numel()).index_put((index,), change)
        seen = {name: change.view(tensors[name].shape) for name, change in everything.items()}
    prefix = "bert."
    changed = {prefix + name: tensors[name].detach() + change for name, change in seen.items()}
    out = torch.func.functional_call(plain, changed, (), batch())
    weights = torch.linspace(-1.0, 1.0, out.logits.numel()).reshape(out.logits.shape)
    loss = (out.logits * weights).mean() + (out.logits * out.logits).mean()
    (wanted,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@KINDS
def test_autocast_changes_neither_the_fold_nor_what_travels(kind: str) -> None:
    model, tuning = begun(kind)
    with torch.no_grad():
        tuning.trainables[0].values.add_(0.013)
    wanted = tuning.vector()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
        inside = tuning.vector()
    assert torch.equal(inside, wanted)
    seen = outputs(model)  # were the weights written in bfloat16 above, they would not fit now
    assert torch.allclose(outputs(merge(copy.deepcopy(model))), seen, atol=1e-6)


@KINDS
def test_training_with_adapters_lowers_the_loss(kind: str) -> None:
    model, _ = begun(kind)
    before = loss_of(model).item()
    train_a_little(model, 6, lr=0.02)
    assert loss_of(model).item() < before


# Methods --------------------------------------------------------------------------------------------


def test_weight_adapters_alone_cannot_be_sent_each_round() -> None:
    model = make_model("bert")
    adapter = AdapterConfig(target="weight")
    config = RunConfig(tasks=(TaskConfig(name="bbc", clients=1),), adapter=adapter)
    for act in (
        lambda: check_federated(METHODS["hiwi"], adapter),
        lambda: backbone_trainables(METHODS["hiwi"], model, None, config),
    ):
        with pytest.raises(ConfigError, match=r"cannot be sent each round; use method 'pafi\+hiwi'") as error:
            act()
        assert "\n" not in str(error.value)


def test_the_mean_of_folded_changes_is_exact_and_that_of_factors_is_not() -> None:
    """Why the fold travels: two clients from the same draw, averaged both ways."""
    changes, factors = [], []
    for seed in (1, 2):
        _, tuning = begun("bias")
        moves = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            values = tuning.trainables[0].values
            values += torch.randn(values.shape, generator=moves)
        changes.append(tuning.vector())
        factors.append(tuning.trainables[0].values.detach().clone())
    _, tuning = begun("bias")
    mean = (changes[0] + changes[1]) / 2
    tuning.begin(mean, draw())
    assert torch.allclose(tuning.vector(), mean, atol=1e-7)
    with torch.no_grad():
        tuning.begin(torch.zeros_like(mean), draw())
        tuning.trainables[0].values.copy_((factors[0] + factors[1]) / 2)
    assert (tuning.vector() - mean).abs().max() > 0.05 * mean.abs().max()
