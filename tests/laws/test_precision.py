"""bfloat16: the same mask, frozen bits that stay, float32 masters, exports that add to the stored weights."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmask.config import RunConfig, from_dict
from fedmask.errors import ConfigError
from fedmask.export import merged
from fedmask.layout import RESIDUAL
from fedmask.methods import METHODS, TASK_SPECIFIC
from fedmask.models import Backbone, load_backbone
from fedmask.precision import PRECISIONS, cast
from fedmask.settle import settle_precision
from fedmask.shared import SharedBackbone, load_shared
from fedmask.space import backbone_of, backbone_parameters, checkpoint_digest
from fedmask.stored import stored_reader
from fedmask.training import Stream, batch_loss, tuned
from fedmask.tuner import tuning_of
from fedmask.workspace import Workspace
from tests.support import BIASED, bits, make_model, random_state_untouched, save_checkpoint, save_task


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    for architecture in ("bert", "gpt2", "llama"):
        save_checkpoint(folder / architecture, architecture)
    save_task(folder / "mood.tsv", ("no", "yes", "so", "if"))
    return folder


def config(places: Path, architecture: str = "bert", **changes: Any) -> RunConfig:
    task = {"name": "mood", "source": str(places / "mood.tsv"), "text": "text", "label": "label",
            "clients": 2}  # fmt: skip
    train = {"steps": 4, "batch_size": 8, "max_tokens": 16} | changes.pop("train", {})
    values = {"model": str(places / architecture), "density": 0.05, "tasks": [task], "train": train}
    return from_dict({"precision": "bf16", **values, **changes})


def zeros(workspace: Workspace) -> np.ndarray:
    return np.zeros(workspace.layout("mood").size, np.float32)


def frozen_bits(workspace: Workspace) -> dict[str, bytes]:
    return {name: bits(p) for name, p in backbone_parameters(workspace.backbone.model).items()}


# The mask and the stored values ---------------------------------------------------------------------


def test_the_mask_comes_from_the_stored_values(places: Path) -> None:
    full, half = (Workspace(config(places, precision=precision)) for precision in PRECISIONS)
    assert next(half.backbone.model.parameters()).dtype == torch.bfloat16
    assert half.mask is not None and full.mask is not None
    assert half.mask.digest == full.mask.digest
    assert half.checkpoint_digest == full.checkpoint_digest
    assert half.recipe() == full.recipe()


@pytest.mark.parametrize("architecture", [*BIASED, "llama"])
def test_stored_values_survive_without_a_file(architecture: str, tmp_path: Path) -> None:
    """A model that no safetensors file at hand explains keeps what rounding would lose."""
    model = load_backbone(str(save_checkpoint(tmp_path / "a", architecture))).model
    with torch.no_grad():
        changed = next(p for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 2)
        changed.mul_(1.001)  # so that the file does not hold it any more
    digest, before = checkpoint_digest(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    cast(model, "bf16")
    read = stored_reader(model, dict(model.named_parameters()))
    for name, values in before.items():
        assert torch.equal(read(name), values)
    assert checkpoint_digest(model) == digest
    kept = sum(getattr(p, "stored_values", torch.zeros(0)).numel() for p in model.parameters())
    assert kept == changed.numel()


def test_heads_and_trained_values_are_float32(places: Path) -> None:
    workspace = Workspace(config(places))
    model = workspace.model("mood")
    assert model.head.weight.dtype == torch.float32  # type: ignore[union-attr]
    for trainable in tuning_of(model).trainables:
        assert trainable.values.dtype == torch.float32
    for parameter in backbone_parameters(model).values():
        assert parameter.dtype == torch.bfloat16


# Training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mean", "hf"])
@pytest.mark.parametrize(
    ("architecture", "method"),
    # Task-specific masks are trained as the others are, and have to be found first.
    [(architecture, method) for architecture in ("bert", "gpt2", "llama") for method in METHODS
     if method not in TASK_SPECIFIC
     and (architecture in BIASED or (METHODS[method].biases is None and method != "bitfit"))],
)  # fmt: skip
def test_training_moves_what_is_trained_and_no_other_bit(
    places: Path, architecture: str, head: str, method: str
) -> None:
    workspace = Workspace(config(places, architecture, method=method, head=head))
    before = frozen_bits(workspace)
    update = workspace.local_update(0, 1, zeros(workspace))
    assert frozen_bits(workspace) == before
    assert update.change.dtype == np.float32
    for segment, part in workspace.layout("mood").slices().items():
        assert np.any(update.change[part]) == (segment != RESIDUAL), segment  # the server's alone
        if segment == RESIDUAL:
            continue
        # Float32 masters: changes that bfloat16 could not hold.
        values = torch.from_numpy(update.change[part])
        assert not torch.equal(values, values.bfloat16().float()), segment
    again = Workspace(workspace.config).local_update(0, 1, zeros(workspace))
    np.testing.assert_array_equal(again.change, update.change)


@pytest.mark.parametrize("method", ["pafi", "ffn-bias", "full"])
def test_changes_below_the_resolution_add_up(places: Path, method: str) -> None:
    """With a learning rate of a millionth no step moves a bfloat16 weight; the masters move all the same."""
    workspace = Workspace(config(places, method=method, train={"lr": 1e-6, "epochs": 4.0, "steps": 20}))
    update = workspace.local_update(0, 1, zeros(workspace))
    steps = update.metrics["steps"]
    moved = np.abs(update.change[: workspace.layout("mood").shared_size])
    assert moved.max() > 0.5 * steps * 1e-6
    assert moved.max() < 2 * steps * 1e-6


@pytest.mark.parametrize("method", ["pafi+hiwi", "full", "head"])
def test_learns_as_in_float32(places: Path, method: str) -> None:
    losses = {}
    for precision in PRECISIONS:
        workspace = Workspace(
            config(places, method=method, precision=precision, train={"epochs": 6.0, "steps": 60})
        )
        vector = zeros(workspace)
        data = workspace.shard(0).train
        start = workspace.evaluate("mood", vector, data)["loss"]
        update = workspace.local_update(0, 1, vector)
        losses[precision] = workspace.evaluate("mood", vector + update.change, data)["loss"]
        assert losses[precision] < 0.8 * start or method == "head"
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)


def test_the_sum_is_rounded_once(places: Path) -> None:
    """What the model computes with is the stored value plus the change, rounded: never a sum of roundings."""
    for method in ("pafi", "ffn-bias", "full", "hiwi"):
        workspace = Workspace(config(places, method=method))
        vector = zeros(workspace)
        shared = workspace.layout("mood").shared_size
        vector[:shared] = np.random.default_rng(0).standard_normal(shared).astype(np.float32) * 1e-3
        half = merged_weights(workspace, vector)
        workspace.use_precision("fp32")
        full = merged_weights(workspace, vector)
        for name, values in full.items():
            assert torch.equal(half[name], values.bfloat16()), (method, name)


def merged_weights(workspace: Workspace, vector: np.ndarray) -> dict[str, torch.Tensor]:
    """The backbone at ``vector``, as its layers see it."""
    model = workspace.model("mood")
    seen = {}
    with tuned(model, vector, Stream(1, 1, 0)), torch.no_grad():
        for trainable in tuning_of(model).trainables:
            for index, slot in enumerate(trainable.slots):
                seen[slot.name] = trainable.effective(index, slot.tensor).clone()
    return {name: seen[name] for name in backbone_parameters(model) if name in seen}


def test_export_adds_the_change_to_the_stored_weights(places: Path) -> None:
    from fedmask.delta import Delta

    half = Workspace(config(places, method="pafi"))
    vector = half.local_update(0, 1, zeros(half)).change
    assert half.mask is not None
    full = Workspace(config(places, method="pafi", precision="fp32"))
    shared, own = full.layout("mood").slices().values()
    delta = Delta({"mask": vector[shared], "head/mood": vector[own]}, half.checkpoint_digest)
    model = backbone_parameters(merged(full, "mood", delta))
    stored = backbone_parameters(load_backbone(str(places / "bert")).model)
    changes = iter(np.split(vector[shared], np.cumsum([len(i) for i in half.mask.per_tensor().values()])))
    for name, index in half.mask.per_tensor().items():
        expected = stored[name].detach().clone()
        expected.view(-1)[torch.from_numpy(index)] += torch.from_numpy(next(changes))
        assert torch.equal(model[name], expected)


# Choosing -------------------------------------------------------------------------------------------


def test_measuring_leaves_nothing_behind(places: Path) -> None:
    workspace = Workspace(config(places, precision="auto", threads=2))
    before, threads = frozen_bits(workspace), torch.get_num_threads()
    with random_state_untouched():
        medians = settle_precision(workspace, seconds=0.1)
    assert set(medians) == set(PRECISIONS) and min(medians.values()) > 0
    assert workspace.precision == min(PRECISIONS, key=lambda precision: medians[precision])
    assert torch.get_num_threads() == threads
    workspace.use_precision("fp32")
    assert frozen_bits(workspace) == before


def test_the_precision_can_be_changed_back_and_forth(places: Path) -> None:
    workspace = Workspace(config(places))
    expected = workspace.local_update(0, 1, zeros(workspace)).change
    for precision in ("fp32", "bf16"):
        workspace.use_precision(precision)
        fresh = Workspace(config(places, precision=precision))
        vector = zeros(workspace)
        found = workspace.local_update(0, 1, vector).change
        np.testing.assert_array_equal(found, fresh.local_update(0, 1, vector).change)
    np.testing.assert_array_equal(found, expected)
    for parameter in backbone_of(workspace.model("mood")).parameters():
        assert parameter.dtype == torch.bfloat16


def test_a_rounded_backbone_from_elsewhere_is_not_used(places: Path) -> None:
    half, auto = Workspace(config(places)), Workspace(config(places, precision="auto"))
    auto.use_backbone(half.backbone)
    assert auto.backbone is not half.backbone
    assert {p.dtype for p in auto.backbone.model.parameters()} == {torch.float32}
    full = Workspace(config(places, precision="fp32"))
    auto.use_backbone(full.backbone)
    assert auto.backbone is full.backbone


def test_a_rounded_backbone_is_shared_with_what_it_was_before(places: Path) -> None:
    first = Workspace(config(places))
    with closing(SharedBackbone(first.backbone)) as shared:
        other = Workspace(config(places))
        other.use_backbone(load_shared(shared.descriptor))
        full = Workspace(config(places, precision="fp32"))
        full.use_backbone(load_shared(shared.descriptor))
    assert {p.dtype for p in other.backbone.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in full.backbone.model.parameters()} == {torch.float32}  # it loaded its own
    assert other.digest == first.digest == full.digest
    vector = zeros(first)
    expected, found = (one.local_update(0, 1, vector).change for one in (first, other))
    np.testing.assert_array_equal(found, expected)


def test_stored_values_that_no_file_holds_are_shared_too() -> None:
    model = make_model("bert")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with closing(SharedBackbone(Backbone(cast(model, "bf16"), None, ""))) as shared:
        again = load_shared(shared.descriptor).model
    read = stored_reader(again, dict(again.named_parameters()))
    for name, p in again.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(read(name), before[name])


def test_a_stated_precision_is_not_measured(places: Path) -> None:
    workspace = Workspace(config(places))
    assert settle_precision(workspace) == {}
    assert workspace.precision == "bf16"


def test_work_before_the_choice_is_refused(places: Path) -> None:
    workspace = Workspace(config(places, precision="auto"))
    assert workspace.mask is not None  # what does not depend on it is there
    with pytest.raises(ConfigError, match="precision 'auto' is not settled"):
        workspace.model("mood")
    with pytest.raises(ConfigError, match="the nearest is 'bf16'"):
        workspace.use_precision("bf61")  # type: ignore[arg-type]


# Work done ------------------------------------------------------------------------------------------


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products by the shape of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_dense_weight_gradient_and_no_needless_input_gradient(
    places: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward: one product a layer for its input; none for a weight, none below the first trained layer."""
    monkeypatch.setattr("fedmask.kernels.gradient.choose_kernel", lambda *_args, **_more: "sampled")
    workspace = Workspace(config(places, method="pafi", precision=precision))
    model, data = workspace.model("mood"), workspace.shard(0).train
    rows = np.arange(6)
    tokens = 6 * int(data.lengths[rows].max())
    layers = [m for m in backbone_of(model).encoder.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    with tuned(model, zeros(workspace), Stream(1, 1, 0)):
        model.train()
        loss = batch_loss(model, data, rows, 0)
        with Products() as products:
            loss.backward()  # type: ignore[no-untyped-call]
    inputs = [shape for shape in products.shapes if shape[0] == tokens]
    weights = [shape for shape in products.shapes if shape in {tuple(m.weight.shape) for m in layers}]
    assert len(layers) == 12
    assert weights == []
    assert len(inputs) == len(layers) - 3  # query, key and value of the first layer see frozen embeddings
