"""A tuned model stays a model: copied, pickled, saved, merged and undone without a trace."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmask import magnitude_mask, merge, save_delta, sparsify, weight_adapters
from fedmask.errors import CheckpointError, ConfigError
from fedmask.layout import Segment
from fedmask.trainables import Slot, Trainable
from fedmask.tuner import attach, detach, tuning_of
from tests.support import (
    batch,
    bits,
    loss_of,
    make_model,
    outputs,
    state_bits,
    train_a_little,
)

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "mask": lambda m: sparsify(m, magnitude_mask(m, 0.05)),
    "mask over everything": lambda m: sparsify(m, magnitude_mask(m, 0.05, "all", per_tensor=True)),
    "mask and head": lambda m: sparsify(m, magnitude_mask(m, 0.05), head=True),
    "mask and biases": lambda m: sparsify(m, magnitude_mask(m, 0.05, "all"), ffn_bias=True, head=True),
    "mask and bias adapters": lambda m: sparsify(m, magnitude_mask(m, 0.05), bias_adapters=4, head=True),
    "weight adapters": lambda m: weight_adapters(m, bottleneck=4),
}
EACH_WAY = pytest.mark.parametrize("way", list(WAYS))


def trained(way: str, architecture: str = "bert") -> Any:
    model = WAYS[way](make_model(architecture, classes=3))
    train_a_little(model)
    return model


def vector(model: nn.Module) -> torch.Tensor:
    return tuning_of(model).vector()


@EACH_WAY
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_merging_leaves_the_same_kind_of_model_with_the_tuned_outputs(way: str, architecture: str) -> None:
    model = make_model(architecture, classes=3)
    some = next(iter(model.parameters()))
    some.requires_grad_(False)
    before = copy.deepcopy(model)
    tuned = WAYS[way](model)
    assert tuned is model
    train_a_little(tuned)
    wanted = outputs(tuned).detach()
    assert not torch.allclose(wanted, outputs(before), atol=1e-4)
    merged = merge(tuned)
    assert merged is model and type(merged) is type(before)
    assert torch.allclose(outputs(merged), wanted, atol=1e-6)
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in merged.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in before.named_parameters()
    ]
    assert list(merged.state_dict()) == list(before.state_dict())
    assert all(vars(module).keys() == vars(other).keys() for module, other in _pairs(merged, before))
    assert "fedmask" not in repr(merged)
    with pytest.raises(ConfigError, match="not being tuned"):
        merge(merged)


def _pairs(one: nn.Module, other: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    return list(zip(one.modules(), other.modules(), strict=True))


@EACH_WAY
def test_detaching_brings_every_bit_back(way: str) -> None:
    model = make_model("roberta", classes=3)
    before = state_bits(model)
    WAYS[way](model)
    train_a_little(model)
    detach(model)
    assert state_bits(model) == before
    loss_of(model).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "position" not in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_detaching_brings_every_bit_back_in_every_dtype(dtype: torch.dtype) -> None:
    model = make_model("gpt2", classes=3).to(dtype)
    if dtype == torch.float64:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-12)  # bits that float32 does not have
    before = state_bits(model)
    sparsify(model, magnitude_mask(model, 0.1, "all", per_tensor=True), ffn_bias=True)
    assert torch.isfinite(outputs(model)).all()
    with torch.no_grad():
        for parameter in tuning_of(model).parameters():
            parameter.normal_(0, 0.01)
    assert torch.isfinite(outputs(model)).all()
    detach(model)
    assert state_bits(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_untrained_model_is_the_pre_trained_one(dtype: torch.dtype) -> None:
    model = make_model("opt", classes=3).to(dtype)
    wanted = outputs(model)
    tuned = sparsify(model, magnitude_mask(model, 0.1, "all"), bias_adapters=4, head=True)
    assert torch.equal(outputs(tuned), wanted)
    assert not vector(tuned).any()


@EACH_WAY
def test_a_deep_copy_is_independent(way: str) -> None:
    tuned = trained(way)
    wanted, values = outputs(tuned).detach(), vector(tuned)
    other = copy.deepcopy(tuned)
    assert torch.equal(outputs(other), wanted)
    ours = {p.data_ptr() for p in tuned.parameters()}
    assert not ours & {p.data_ptr() for p in other.parameters()}
    train_a_little(other)
    assert not torch.equal(vector(other), values)
    assert torch.equal(vector(tuned), values) and torch.equal(outputs(tuned), wanted)
    merge(other)
    assert torch.equal(outputs(tuned), wanted)


@EACH_WAY
def test_pickles(way: str) -> None:
    tuned = trained(way)
    wanted = outputs(tuned).detach()
    other = pickle.loads(pickle.dumps(tuned))
    assert torch.equal(outputs(other), wanted) and torch.equal(vector(other), vector(tuned))
    train_a_little(tuned)
    train_a_little(other)
    assert torch.equal(vector(other), vector(tuned))
    assert torch.allclose(outputs(merge(other)), outputs(tuned), atol=1e-6)


@EACH_WAY
def test_training_goes_on_from_a_state_dict(way: str) -> None:
    tuned = trained(way)
    optimizer_free = copy.deepcopy(tuned)
    file = io.BytesIO()
    torch.save(tuned.state_dict(), file)
    file.seek(0)
    other = WAYS[way](make_model("bert", classes=3))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(vector(other), vector(tuned))
    assert torch.equal(outputs(other), outputs(tuned))
    train_a_little(other)
    train_a_little(optimizer_free)
    assert torch.equal(vector(other), vector(optimizer_free))
    detach(other)
    assert state_bits(other) == state_bits(make_model("bert", classes=3))


@EACH_WAY
def test_a_state_dict_saved_right_after_a_step_and_loaded_over_another_state(way: str) -> None:
    """Weights in it may be a step behind the values; the values decide."""
    tuned = trained(way)
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    wanted = outputs(tuned)
    train_a_little(tuned, 2)
    assert not torch.equal(outputs(tuned), wanted)
    tuned.load_state_dict(state)
    assert torch.equal(outputs(tuned), wanted)
    tuned.load_state_dict(state)
    assert torch.equal(outputs(tuned), wanted)
    tuned.load_state_dict(state, assign=True)
    assert torch.equal(outputs(tuned), wanted)
    train_a_little(tuned, 1)
    assert torch.equal(outputs(tuned), outputs(copy.deepcopy(tuned)))
    assert not torch.equal(outputs(tuned), wanted)


def test_a_merged_state_is_not_taken_for_a_tuned_one() -> None:
    """A trainer that resumes from ``save_pretrained``'s file loads leniently and would start again."""
    tuned = trained("mask and head")
    merged = merge(copy.deepcopy(tuned))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"no fedmask\.mask\.values: it is a merged model's"):
            tuned.load_state_dict(merged.state_dict(), strict=strict)


@EACH_WAY
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_saved_by_transformers_and_loaded_again(way: str, kind: str, tmp_path: Path) -> None:
    """Right after an optimizer step, and while the model is still being tuned."""
    tuned = trained(way, kind)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        tuned.save_pretrained(tmp_path)
        loaded, info = type(tuned).from_pretrained(tmp_path, output_loading_info=True)
    assert not heard and not any(info[key] for key in info), (heard, info)
    assert torch.allclose(outputs(loaded.eval()), outputs(tuned), atol=1e-6)
    assert state_bits(loaded) == state_bits(merge(copy.deepcopy(tuned)))
    train_a_little(tuned)  # and it still trains
    tuned.save_pretrained(tmp_path / "state", state_dict=tuned.state_dict())
    again = type(tuned).from_pretrained(tmp_path / "state")
    assert torch.allclose(outputs(again.eval()), outputs(tuned), atol=1e-6)
    merge(tuned)
    assert "save_pretrained" not in vars(tuned)


def _step_no_grad(values: nn.Parameter) -> None:
    with torch.no_grad():
        values.add_(0.05)


def _step_data(values: nn.Parameter) -> None:
    values.data.add_(0.05)


def _step_new_data(values: nn.Parameter) -> None:
    values.data = values.data + 0.05


def _step_inference(values: nn.Parameter) -> None:
    with torch.inference_mode():
        values.add_(0.05)


def _step_item(values: nn.Parameter) -> None:
    with torch.no_grad():
        values[0] += 0.5


def _step_optimizer(kind: Any, **options: Any) -> Callable[[nn.Parameter], None]:
    def step(values: nn.Parameter) -> None:
        values.grad = torch.ones_like(values)
        kind([values], lr=0.05, **options).step()
        values.grad = None

    return step


@pytest.mark.parametrize("way", ["mask", "mask over everything", "mask and bias adapters"])
@pytest.mark.parametrize(
    "step",
    [
        _step_no_grad,
        _step_data,
        _step_new_data,
        _step_inference,
        _step_item,
        _step_optimizer(torch.optim.SGD),
        _step_optimizer(torch.optim.AdamW, fused=True),
        _step_optimizer(torch.optim.AdamW, foreach=True),
        _step_optimizer(torch.optim.Adam, foreach=False, fused=False),
    ],
    ids=["no_grad", "data", "new data", "inference", "one item", "sgd", "fused", "foreach", "single"],
)
def test_a_step_is_seen_by_the_next_forward(way: str, step: Callable[[nn.Parameter], None]) -> None:
    tuned = WAYS[way](make_model("bert", classes=3))
    with torch.no_grad():
        for parameter in tuning_of(tuned).parameters():
            parameter += 0.01
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for trainable in tuning_of(tuned).trainables:
            outputs(tuned)
            step(trainable.values)
            with mode():
                seen = outputs(tuned).clone()
            fresh = copy.deepcopy(tuned)
            assert torch.allclose(outputs(merge(fresh)), seen, atol=1e-6)


def test_the_bundled_model_tuned_and_merged() -> None:
    """A real checkpoint: k values and adapters train, masked entries and feed-forward biases change."""
    from fedmask.models import load_backbone
    from fedmask.space import backbone_parameters

    model = load_backbone("minilm").model
    before = {name: p.detach().clone() for name, p in backbone_parameters(model).items()}
    mask = magnitude_mask(model)
    tuned = sparsify(model, mask, bias_adapters=4)
    inputs = batch(2, 6)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == 53_084 + 2 * 4 * 11_520
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    outputs(tuned, inputs).square().mean().backward()
    optimizer.step()
    wanted = outputs(tuned, inputs).detach()
    merged = merge(tuned)
    assert torch.allclose(outputs(merged, inputs), wanted, atol=1e-6)
    places, changed = mask.per_tensor(), 0
    for name, parameter in backbone_parameters(merged).items():
        different = (parameter != before[name]).view(-1).nonzero().view(-1)
        if name in places:
            assert set(different.tolist()) <= set(places[name].tolist()), name
            changed += len(different)
        else:
            assert not len(different) or name.endswith(("intermediate.dense.bias", "output.dense.bias")), name
    assert changed > 0.9 * mask.k


def test_a_second_attachment_is_refused() -> None:
    tuned = trained("mask")
    wanted = outputs(tuned)
    with pytest.raises(ConfigError, match="being tuned already"):
        sparsify(tuned, magnitude_mask(make_model("bert"), 0.01))
    with pytest.raises(ConfigError, match="being tuned already"):
        weight_adapters(tuned)
    assert torch.equal(outputs(tuned), wanted)


def test_two_parts_for_one_segment_are_refused_before_anything_changes() -> None:
    model = make_model("bert", classes=3)
    with pytest.raises(ConfigError, match="one segment"):
        sparsify(model, magnitude_mask(model, 0.01), ffn_bias=True, bias_adapters=4)
    assert all(p.requires_grad for p in model.parameters()) and "fedmask" not in repr(model)


def test_a_head_that_is_not_there_is_refused() -> None:
    model = make_model("gpt2")
    with pytest.raises(ConfigError, match=r"GPT2Model has no head to train; load it with its head"):
        sparsify(model, magnitude_mask(model, 0.01), head=True)
    assert "fedmask" not in repr(model)


def test_a_mask_for_other_weights_is_refused() -> None:
    mask = magnitude_mask(make_model("bert"), 0.01)
    other = make_model("bert", seed=1, classes=3)
    with pytest.raises(CheckpointError) as error:
        sparsify(other, mask)
    assert mask.space.checkpoint in str(error.value)
    assert magnitude_mask(other, 0.01).space.checkpoint in str(error.value)
    assert "fedmask" not in repr(other)


def test_merged_weights_can_be_tuned_again_with_a_mask_of_their_own() -> None:
    model = make_model("bert", classes=3)
    merge_once = merge(WAYS["mask"](model))
    tuned = sparsify(merge_once, magnitude_mask(merge_once, 0.02))
    train_a_little(tuned)
    wanted = outputs(tuned)
    assert torch.allclose(outputs(merge(tuned)), wanted, atol=1e-6)


def test_nothing_attached_is_said_in_one_line(tmp_path: Path) -> None:
    model = make_model("bert")
    for act in (lambda: save_delta(model, tmp_path / "x"), lambda: detach(model), lambda: merge(model)):
        with pytest.raises(ConfigError, match=r"call fedmask\.sparsify") as error:
            act()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


def test_layers_inside_torch_s_own_attention_are_refused() -> None:
    """Their fast path reads the weights past the layer's forward: nothing would train, silently."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.ModuleList([block]))
    with pytest.raises(ConfigError, match="cannot be tuned"):
        sparsify(model, magnitude_mask(model, 0.5))
    assert all(p.requires_grad for p in model.parameters())


def test_a_vector_of_another_length_is_refused() -> None:
    tuning = tuning_of(trained("mask"))
    for size in (0, tuning.layout.size - 1, tuning.layout.size + 1):
        with pytest.raises(CheckpointError, match=f"expected {tuning.layout.size} values"):
            tuning.begin(torch.zeros(size), lambda purpose: pytest.fail("no draw is due"))


class Shift(Trainable):
    """The example in the docs of ``fedmask.trainables.base``: one number added to every slot."""

    def __init__(self, slots: list[Slot], segment: str = "shift") -> None:
        super().__init__(segment, slots, size=1, local_size=1)

    def begin(self, change: torch.Tensor, draw: Any) -> None:
        self.values.data.copy_(change)

    def change(self) -> torch.Tensor:
        return self.values.detach().clone()

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.values


def test_a_trainable_of_one_s_own_and_segments_with_any_name() -> None:
    model = make_model("bert", classes=3)
    before = state_bits(model)
    slots = [Slot(model.classifier, "bias", "classifier.bias")]
    tuning = attach(model, [Shift(slots, "shift"), Shift(slots, "head/a.b-c_d")])
    assert tuning.layout.segments == (Segment("shift", 1), Segment("head/a.b-c_d", 1))
    plain = make_model("bert", classes=3)
    tuning.begin(torch.tensor([0.5, 0.25]), lambda purpose: pytest.fail("no draw is due"))
    assert torch.allclose(outputs(model), outputs(plain) + 0.75)
    loss_of(model, batch()).backward()
    assert all(t.values.grad is not None for t in tuning.trainables)
    assert torch.allclose(outputs(merge(copy.deepcopy(model))), outputs(plain) + 0.75)
    detach(model)
    assert state_bits(model) == before


def test_the_values_are_named_in_the_state_and_nothing_else_is_new() -> None:
    model = make_model("bert", classes=3)
    names = list(model.state_dict())
    tuned = sparsify(model, magnitude_mask(model, 0.05), bias_adapters=4, head=True)
    new = [name for name in tuned.state_dict() if name not in names]
    assert new == ["fedmask.mask.values", "fedmask.bias.values", "fedmask.head.values"]
    assert bits(tuned.state_dict()["fedmask.mask.values"]) == bits(torch.zeros(819))
