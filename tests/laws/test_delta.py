"""Delta files: what was trained comes back bit for bit on the same checkpoint, and on no other."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from fedmask import (
    FedmaskError,
    Rule,
    load_delta,
    magnitude_mask,
    merge,
    save_delta,
    sparsify,
    weight_adapters,
)
from fedmask.delta import apply_delta, read_delta, write_delta
from fedmask.errors import CheckpointError, ConfigError
from fedmask.masks import derive_mask, gradient_mask, mask_from_indices
from fedmask.space import backbone_parameters, parameter_space
from tests.support import ARCHITECTURES, BIASED, loss_of, make_model, outputs, state_bits, train_a_little


def tuned(architecture: str = "bert", *, classes: int = 3, eligible: Any = "linear", **options: Any) -> Any:
    model = make_model(architecture, classes=classes)
    model = sparsify(model, magnitude_mask(model, 0.05, eligible), **options)
    train_a_little(model)
    return model


def check_round_trip(model: nn.Module, fresh: nn.Module, path: Path) -> None:
    """``fresh`` with the file is ``model`` merged, in every bit of the state."""
    save_delta(model, path)
    before = state_bits(fresh)
    loaded = load_delta(fresh, path)
    assert loaded is fresh
    merged = merge(copy.deepcopy(model))
    assert state_bits(loaded) == state_bits(merged) != before
    assert torch.equal(outputs(loaded), outputs(merged))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("eligible", ["linear", "all"])
def test_round_trip_of_a_mask(architecture: str, eligible: Any, tmp_path: Path) -> None:
    classes = 0 if architecture == "t5" else 3
    model = tuned(architecture, classes=classes, eligible=eligible)
    check_round_trip(model, make_model(architecture, classes=classes), tmp_path / "d.safetensors")


@pytest.mark.parametrize("architecture", BIASED)
@pytest.mark.parametrize(
    "options",
    [
        {"head": True},
        {"ffn_bias": True},
        {"bias_adapters": 4, "head": True},
        {"ffn_bias": True, "head": True},
    ],
    ids=["head", "biases", "adapters", "biases and head"],
)
def test_round_trip_where_segments_meet_in_the_same_tensors(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """With everything eligible, mask and biases change the same entries; sums must round alike."""
    model = tuned(architecture, eligible="all", **options)
    check_round_trip(model, make_model(architecture, classes=3), tmp_path / "d.safetensors")


def test_round_trip_of_weight_adapters(tmp_path: Path) -> None:
    model = weight_adapters(make_model("gpt2", classes=3), bottleneck=4)
    train_a_little(model)
    save_delta(model, tmp_path / "d")
    loaded = load_delta(make_model("gpt2", classes=3), tmp_path / "d")
    assert state_bits(loaded) == state_bits(merge(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_in_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model("bert", classes=3).save_pretrained(tmp_path / "model")

    def load() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=dtype).eval()

    model = load()
    model = sparsify(model, magnitude_mask(model, 0.05, "all"), ffn_bias=True, head=True)
    train_a_little(model)
    check_round_trip(model, load(), tmp_path / "d")
    # Trained in one dtype, applied in full: the change is added to the stored weights.
    full = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    load_delta(full, tmp_path / "d")
    merged = merge(model).float()
    assert torch.allclose(outputs(full), outputs(merged), atol=0.05)


def test_only_masked_entries_change(tmp_path: Path) -> None:
    model = tuned()
    save_delta(model, tmp_path / "d")
    loaded, plain = load_delta(make_model("bert", classes=3), tmp_path / "d"), make_model("bert", classes=3)
    mask = magnitude_mask(plain, 0.05)
    places = mask.per_tensor()
    changed = 0
    for name, parameter in loaded.named_parameters():
        different = (parameter != plain.get_parameter(name)).view(-1).nonzero().view(-1).numpy()
        inside = places.get(name.removeprefix("bert."), np.array([], np.int64))
        assert np.isin(different, inside).all(), name
        changed += different.size
    assert changed > 0.9 * mask.k


def test_a_file_holds_k_values_and_a_recipe(tmp_path: Path) -> None:
    model = tuned(head=False)
    save_delta(model, tmp_path / "d")
    delta = read_delta(tmp_path / "d")
    assert {name: values.shape for name, values in delta.segments.items()} == {"mask": (819,)}
    assert delta.segments["mask"].dtype == np.float32
    assert delta.indices is None and delta.recipe is not None
    assert (
        delta.recipe.checkpoint
        == delta.checkpoint
        == magnitude_mask(make_model("bert"), 0.05).space.checkpoint
    )
    assert (tmp_path / "d").stat().st_size < 4 * 819 + 1500


def test_it_applies_to_the_bare_backbone_and_to_a_model_with_a_head(tmp_path: Path) -> None:
    save_delta(tuned(classes=0), tmp_path / "d")
    bare = load_delta(make_model("bert"), tmp_path / "d")
    headed = load_delta(make_model("bert", classes=5), tmp_path / "d")
    theirs = backbone_parameters(headed)
    assert all(torch.equal(p, theirs[name]) for name, p in backbone_parameters(bare).items())


def test_a_head_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    save_delta(tuned(head=True), tmp_path / "d")
    for other, said in (
        (make_model("bert"), r"'head' changes .*, which this model lacks"),
        (make_model("bert", classes=5), r"segment 'head': expected"),
    ):
        before = state_bits(other)
        with pytest.raises(CheckpointError, match=said):
            load_delta(other, tmp_path / "d")
        assert state_bits(other) == before


def test_heads_of_a_federation_are_left_out(tmp_path: Path) -> None:
    mask = magnitude_mask(make_model("bert"), 0.05)
    segments = {"mask": np.full(mask.k, 0.01, np.float32), "head/x": np.ones(99, np.float32)}
    write_delta(tmp_path / "d", segments, checkpoint=mask.space.checkpoint, mask=mask, more={"run": "x"})
    delta = read_delta(tmp_path / "d")
    assert delta.more == {"run": "x"}
    assert np.array_equal(delta.segments["head/x"], segments["head/x"])
    model = apply_delta(make_model("bert", classes=3), delta)
    plain = make_model("bert", classes=3)
    assert torch.equal(model.classifier.weight, plain.classifier.weight)
    assert not torch.equal(outputs(model), outputs(plain))


def test_another_checkpoint_is_refused_untouched(tmp_path: Path) -> None:
    model = tuned()
    save_delta(model, tmp_path / "d")
    for other in (make_model("bert", classes=3, seed=1), make_model("roberta", classes=3), merge(model)):
        before = state_bits(other)
        with pytest.raises(CheckpointError) as error:
            load_delta(other, tmp_path / "d")
        digests = re.findall("[0-9a-f]{64}", str(error.value))
        found = parameter_space(other).checkpoint
        assert digests == [read_delta(tmp_path / "d").checkpoint, found] and digests[0] != found
        assert "\n" not in str(error.value)
        assert state_bits(other) == before


def test_a_second_time_is_refused(tmp_path: Path) -> None:
    save_delta(tuned(), tmp_path / "d")
    model = load_delta(make_model("bert", classes=3), tmp_path / "d")
    with pytest.raises(CheckpointError, match="made for the checkpoint"):
        load_delta(model, tmp_path / "d")


def given(model: nn.Module) -> Any:
    space = parameter_space(model, "all")
    indices = np.unique(np.random.default_rng(0).integers(40, space.size, 300))
    return mask_from_indices(indices, space, Rule("given", 0.01, "all"))


def by_gradient(model: nn.Module) -> Any:
    return gradient_mask(model, [lambda: loss_of(model)], Rule("gradient", 0.01))


@pytest.mark.parametrize("choose", [given, by_gradient])
def test_a_mask_that_no_recipe_gives_travels_with_its_indices(choose: Any, tmp_path: Path) -> None:
    model = make_model("distilbert", classes=3)
    mask = choose(model)
    model = sparsify(model, mask)
    train_a_little(model)
    check_round_trip(model, make_model("distilbert", classes=3), tmp_path / "d")
    delta = read_delta(tmp_path / "d")
    assert delta.indices is not None and np.array_equal(delta.indices, mask.indices)
    with pytest.raises(ConfigError, match="unknown mask rule"):
        derive_mask(make_model("distilbert"), mask.rule)


@pytest.mark.parametrize("rule", [Rule("random", 0.02, seed=3), Rule("largest", 0.02, per_tensor=True)])
def test_masks_of_other_rules(rule: Rule, tmp_path: Path) -> None:
    model = make_model("opt", classes=3)
    model = sparsify(model, derive_mask(model, rule))
    train_a_little(model)
    check_round_trip(model, make_model("opt", classes=3), tmp_path / "d")
    assert read_delta(tmp_path / "d").indices is None


def test_indices_that_claim_a_rule_they_do_not_follow_are_refused(tmp_path: Path) -> None:
    model = make_model("bert", classes=3)
    space = parameter_space(model)
    wrong = mask_from_indices(np.arange(10, dtype=np.int64), space, Rule("magnitude", 10 / space.size))
    save_delta(sparsify(model, wrong), tmp_path / "d")
    with pytest.raises(CheckpointError, match="made for the mask"):
        load_delta(make_model("bert", classes=3), tmp_path / "d")


# Damage ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of content."""
    model = make_model("bert", classes=3)
    space = parameter_space(model)
    mask = mask_from_indices(np.arange(0, 300, 7, dtype=np.int64), space, Rule("given", 0.003))
    path = tmp_path_factory.mktemp("delta") / "d"
    segments = {"mask": np.arange(mask.k, dtype=np.float32), "head/x": np.ones(3, np.float32)}
    write_delta(
        path,
        segments,
        checkpoint=space.checkpoint,
        mask=mask,
        names={"head/x": ["head.weight"]},
        more={"run": "demo"},
    )
    assert read_delta(path).segments.keys() == segments.keys()
    return path.read_bytes()


def test_every_damaged_bit_is_noticed(file: bytes, tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "d"
    for at in range(len(file)):
        damaged = bytearray(file)
        damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(FedmaskError):
            read_delta(path)


def test_every_cut_is_noticed(file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "d"
    for size in [*range(0, len(file), 13), len(file) - 1]:
        path.write_bytes(file[:size])
        with pytest.raises(FedmaskError):
            read_delta(path)
    path.write_bytes(file + b"x")
    with pytest.raises(FedmaskError):
        read_delta(path)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_delta(tmp_path / "missing")
    with pytest.raises(ConfigError, match="no such file"):
        read_delta(tmp_path)
    make_model("bert").save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"expected fedmask-delta version 1, found pt None"):
        read_delta(tmp_path / "model" / "model.safetensors")
    assert AutoModel.from_pretrained(tmp_path / "model") is not None


def test_a_file_of_a_later_version_is_refused(file: bytes, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    (tmp_path / "d").write_bytes(file)
    with safe_open(str(tmp_path / "d"), framework="numpy") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
    save_file(tensors, tmp_path / "d", metadata={**metadata, "version": "2"})
    with pytest.raises(CheckpointError, match="version 1, found fedmask-delta 2"):
        read_delta(tmp_path / "d")


def test_a_count_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    mask = magnitude_mask(make_model("bert"), 0.05)
    for size in (mask.k - 1, mask.k + 1):
        write_delta(tmp_path / "d", {"mask": np.ones(size)}, checkpoint=mask.space.checkpoint, mask=mask)
        with pytest.raises(
            CheckpointError, match=rf"expected {size} values, found {mask.k}|expected {mask.k}"
        ):
            load_delta(make_model("bert"), tmp_path / "d")
    write_delta(tmp_path / "d", {"mask": np.ones(mask.k)}, checkpoint=mask.space.checkpoint)
    with pytest.raises(CheckpointError, match="without a recipe"):
        load_delta(make_model("bert"), tmp_path / "d")
