"""The gradient of the k values is the dense gradient of an untouched copy, gathered."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from fedmask import Mask, magnitude_mask, sparsify
from fedmask.kernels import available_kernels
from fedmask.masks import Rule, mask_from_indices
from fedmask.space import backbone_parameters, parameter_space
from fedmask.tuner import tuning_of
from tests.support import ARCHITECTURES, batch, config_of, fill, loss_of, make_model, outputs

KERNELS = available_kernels()
NO_HEAD_FOR_T5 = [a for a in ARCHITECTURES if a != "t5"]


def values_of(tuned: nn.Module) -> nn.Parameter:
    return tuning_of(tuned).trainables[0].values


def start(model: nn.Module, mask: Mask, **options: Any) -> tuple[nn.Module, nn.Module, nn.Parameter]:
    """A tuned model whose k values are not zero, an untouched copy with the same weights, the values."""
    plain = copy.deepcopy(model)
    tuned = sparsify(model, mask, **options)
    values = values_of(tuned)
    with torch.no_grad():
        values.copy_(torch.linspace(-0.1, 0.1, mask.k))
        at = 0
        for name, index in mask.per_tensor().items():
            flat = backbone_parameters(plain)[name].data.view(-1)
            where = torch.from_numpy(index)
            flat[where] = (flat[where].float() + values[at : at + len(where)]).to(flat.dtype)
            at += len(where)
    return tuned, plain, values


def gathered(plain: nn.Module, mask: Mask) -> torch.Tensor:
    """The dense gradients at the mask's entries, after a backward pass of the copy."""
    parts = []
    for name, index in mask.per_tensor().items():
        gradient = backbone_parameters(plain)[name].grad
        assert gradient is not None, name
        parts.append(gradient.reshape(-1)[torch.from_numpy(index)].float())
    return torch.cat(parts)


def close(found: torch.Tensor | None, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert found is not None and found.dtype == torch.float32 and found.shape == wanted.shape
    assert wanted.abs().max() > 1e-5, "nothing to compare"
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("eligible", ["linear", "linear+embeddings", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_kind_of_tensor(architecture: str, eligible: Any, kernel: str) -> None:
    model = make_model(architecture, classes=0 if architecture == "t5" else 3)
    mask = magnitude_mask(model, 0.1, eligible, per_tensor=True)
    tuned, plain, values = start(model, mask, kernel=kernel)
    assert torch.allclose(outputs(tuned), outputs(plain), atol=1e-6)
    loss_of(tuned).backward()
    loss_of(plain).backward()
    close(values.grad, gathered(plain, mask))


def test_only_the_k_values_require_a_gradient() -> None:
    model = make_model("bert", classes=3)
    mask = magnitude_mask(model, 0.02)
    tuned = sparsify(model, mask)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(mask.k,)]
    loss_of(tuned).backward()
    assert all(p.grad is None for name, p in tuned.named_parameters() if not name.startswith("fedmask."))


def test_what_is_asked_for_besides_trains_as_in_the_copy() -> None:
    model = make_model("roberta", classes=3)
    mask = magnitude_mask(model, 0.05)
    tuned, plain, values = start(model, mask, head=True, ffn_bias=True)
    loss_of(tuned).backward()
    loss_of(plain).backward()
    close(values.grad, gathered(plain, mask))
    for trainable in tuning_of(tuned).trainables[1:]:
        owner = plain if trainable.segment == "head" else plain.base_model
        gradients = [owner.get_parameter(name).grad.reshape(-1) for name in trainable.names]
        close(trainable.values.grad, torch.cat(gradients))
    heads = list(tuning_of(tuned).trainables[2].names)
    assert heads == [
        "classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, nn.Module, nn.Parameter, Mask]]:
    """Linear layers, embeddings, normalisations and biases, all masked."""
    model = make_model(request.param, classes=3)
    mask = magnitude_mask(model, 0.1, "all", per_tensor=True)
    yield *start(model, mask), mask


@pytest.fixture
def fresh(
    pair: tuple[nn.Module, nn.Module, nn.Parameter, Mask],
) -> tuple[nn.Module, nn.Module, nn.Parameter, Mask]:
    tuned, plain, values, mask = pair
    values.grad = None
    plain.zero_grad()
    tuned.eval()
    plain.eval()
    return tuned, plain, values, mask


def test_gradients_accumulate_over_two_batches(fresh: Any) -> None:
    tuned, plain, values, mask = fresh
    for model in (tuned, plain):
        for seed in (1, 2):
            loss_of(model, batch(seed=seed)).backward()
    close(values.grad, gathered(plain, mask))


def test_two_forwards_and_then_two_backwards(fresh: Any) -> None:
    tuned, plain, values, mask = fresh
    for model in (tuned, plain):
        one, two = loss_of(model, batch(seed=1)), loss_of(model, batch(2, 5, seed=2))
        one.backward()
        two.backward()
    close(values.grad, gathered(plain, mask))


def test_one_loss_over_two_forwards(fresh: Any) -> None:
    tuned, plain, values, mask = fresh
    for model in (tuned, plain):
        (loss_of(model, batch(seed=1)) * loss_of(model, batch(seed=2))).backward()
    close(values.grad, gathered(plain, mask))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(fresh: Any, reentrant: bool) -> None:
    """On copies, as transformers leaves hooks behind; it makes the embeddings' output require a gradient."""
    tuned, plain, mask = copy.deepcopy(fresh[0]), copy.deepcopy(fresh[1]), fresh[3]
    for model in (tuned, plain):
        model.train()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # a name to come in transformers 6; GPT-2 says that it stops caching
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            for seed in (1, 2):
                loss_of(model, batch(seed=seed)).backward()
    close(values_of(tuned).grad, gathered(plain, mask))


def test_autocast_to_bfloat16(fresh: Any) -> None:
    tuned, plain, values, mask = fresh
    for model in (tuned, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
    close(values.grad, gathered(plain, mask), 2e-2)
    values.grad = None
    loss_of(tuned).backward()  # and nothing of it is left behind
    plain.zero_grad()
    loss_of(plain).backward()
    close(values.grad, gathered(plain, mask))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_two_steps(fresh: Any, mode: Any) -> None:
    tuned, plain, values, mask = fresh
    for model in (tuned, plain):
        before = loss_of(model, batch(seed=1))
        with mode():
            seen = outputs(model)
        assert not seen.requires_grad
        before.backward()
        loss_of(model, batch(seed=2)).backward()
    close(values.grad, gathered(plain, mask))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_new_values_are_first_seen_by_an_evaluation(fresh: Any, mode: Any) -> None:
    """The weights are then written in inference mode; training must go on as if nothing had happened."""
    tuned, plain, values, mask = fresh
    before = values.detach().clone()
    try:
        with torch.no_grad():
            values.add_(0.05)
        moved = copy.deepcopy(plain)
        at = 0
        for name, index in mask.per_tensor().items():
            flat = backbone_parameters(moved)[name].data.view(-1)
            flat[torch.from_numpy(index)] += 0.05
            at += len(index)
        with mode():
            assert torch.allclose(outputs(tuned), outputs(moved), atol=1e-5)
        loss_of(tuned).backward()
        loss_of(moved).backward()
        close(values.grad, gathered(moved, mask), 1e-4)
    finally:
        with torch.no_grad():
            values.copy_(before)


def test_a_weight_that_changes_between_forward_and_backward_is_noticed(fresh: Any) -> None:
    """Nothing may be computed silently from other weights than the forward pass saw."""
    tuned, _, values, _ = fresh
    loss = loss_of(tuned)
    with torch.no_grad():
        values.mul_(1.5)
    outputs(tuned)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.no_grad():
        values.div_(1.5)
    outputs(tuned)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_model_in_bfloat16(architecture: str) -> None:
    model = make_model(architecture, classes=3).bfloat16()
    mask = magnitude_mask(model, 0.1, "all", per_tensor=True)
    tuned, plain, values = start(model, mask)
    assert values.dtype == torch.float32
    for one in (tuned, plain):
        loss_of(one).backward()
    wanted = gathered(plain, mask)
    assert values.grad is not None
    error = (values.grad - wanted).norm() / wanted.norm()
    assert error < 0.05


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_model_in_float64(architecture: str) -> None:
    model = make_model(architecture, classes=3).double()
    mask = magnitude_mask(model, 0.1, "all", per_tensor=True)
    tuned, plain, values = start(model, mask)
    for one in (tuned, plain):
        outputs(one).square().mean().backward()
    close(values.grad, gathered(plain, mask), 1e-6)


class TwoNames(nn.Module):
    """Two layers of one block share a weight, one is called by keyword, and one with more than one input."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        second.weight = first.weight
        self.block = nn.ModuleList([first, second, nn.Linear(6, 4)])
        fill(self, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.block[0](input=x))
        x = torch.tanh(self.block[1](x))
        out: torch.Tensor = self.block[2](input=x)
        return out


@pytest.mark.parametrize("kernel", KERNELS)
def test_shared_weights_and_calls_by_keyword(kernel: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 6)
    model = TwoNames()
    plain = copy.deepcopy(model)
    mask = magnitude_mask(model, 0.5)
    assert mask.k == 30 and mask.space.names == ("block.0.weight", "block.2.weight")
    tuned = sparsify(model, mask, kernel=kernel)
    values = values_of(tuned)
    for _ in range(2):  # the second time from other values
        plain.zero_grad()
        values.grad = None
        assert torch.allclose(tuned(x), plain(x), atol=1e-6)
        tuned(x).square().sum().backward()
        plain(x).square().sum().backward()
        close(values.grad, gathered(plain, mask))
        with torch.no_grad():
            values += 0.1
            at = 0
            for name, index in mask.per_tensor().items():
                plain.get_parameter(name).view(-1)[torch.from_numpy(index)] += 0.1
                at += len(index)


def test_a_language_model_whose_output_layer_is_the_embedding() -> None:
    """The output layer is no backbone, but its weight is: its part of the gradient counts."""
    model = GPT2LMHeadModel(config_of("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    fill(model.transformer, 0)
    mask = magnitude_mask(model, 0.1, "linear+embeddings", per_tensor=True)
    tuned, plain, values = start(model, mask)
    for one in (tuned, plain):
        loss_of(one).backward()
    close(values.grad, gathered(plain, mask))


def test_a_tensor_that_takes_no_part_gets_zeros() -> None:
    """A row of the embedding that no token names."""
    model = make_model("bert", classes=3)
    space = parameter_space(model, "linear+embeddings")
    mask = mask_from_indices(
        torch.arange(32, space.offsets[1]).numpy(), space, Rule("given", eligible="linear+embeddings")
    )
    tuned, _, values = start(model, mask)
    inputs = batch()
    loss_of(tuned, inputs).backward()
    assert values.grad is not None
    rows = values.grad.view(-1, 32)  # token 1 first: the padding token's row is not eligible
    used = sorted(set(inputs["input_ids"].unique().tolist()) - {0})
    assert rows.abs().sum(1).nonzero().flatten().tolist() == [token - 1 for token in used]


def test_training_and_evaluation_mode_reach_the_modules(fresh: Any) -> None:
    tuned, _, _, _ = fresh
    tuned.train()
    assert all(module.training for module in tuned.modules())
    tuned.eval()
    assert not any(module.training for module in tuned.modules())


def test_frozen_and_thawed_again(fresh: Any) -> None:
    tuned, plain, values, mask = fresh
    values.requires_grad_(False)
    assert not loss_of(tuned).requires_grad
    values.requires_grad_(True)
    loss_of(tuned).backward()
    loss_of(plain).backward()
    close(values.grad, gathered(plain, mask))
