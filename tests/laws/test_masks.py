"""Masks: exactly k entries, the ones that a stable sort picks, and the same on every machine."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from fedmask import Mask, Rule, derive_mask, magnitude_mask
from fedmask.errors import CheckpointError, ConfigError
from fedmask.masks import RULES, Recipe, mask_from_indices, mask_size
from fedmask.space import ELIGIBLE, backbone_of, backbone_parameters, checkpoint_digest, parameter_space
from tests.support import ARCHITECTURES, make_model

LEVELS = (0, 1, 2, 7, 10_000)  # steps that weights are rounded to; 0: not at all


@cache
def model_of(architecture: str, levels: int = 0) -> nn.Module:
    """A backbone whose weights are rounded to a few values (many ties, many zeros of either sign)."""
    model = make_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if levels:
                parameter.copy_((parameter * levels * 10).round() / (levels * 10))
    return model


def eligible_tensors(model: nn.Module, eligible: str) -> dict[str, np.ndarray]:
    """The eligible tensors by name, found by the look of the names alone."""
    found = {}
    for name, parameter in backbone_of(model).named_parameters():
        in_block = re.search(r"\b(layer|layers|h|block)\.\d+\.", name) and "relative" not in name
        if (
            name.startswith("pooler")
            or (eligible == "linear" and not (in_block and parameter.dim() == 2))
            or (eligible == "linear+embeddings" and parameter.dim() != 2)
        ):
            continue
        found[name] = parameter.detach().numpy()
    return found


def padding(model: nn.Module, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Which entries, tensors laid end to end, are rows of padding tokens: bool ``[N]``."""
    modules = dict(backbone_of(model).named_modules())
    out = []
    for name, tensor in tensors.items():
        rows = np.zeros(tensor.shape, bool)
        row = getattr(modules[name.rpartition(".")[0]], "padding_idx", None)
        if row is not None:
            rows[row] = True
        out.append(rows.ravel())
    return np.concatenate(out)


def reference(model: nn.Module, density: float, eligible: str, *, largest: bool = False) -> np.ndarray:
    """The ten lines: a stable sort of |w|, ties by tensor order, then flat index."""
    tensors = eligible_tensors(model, eligible)
    scores = np.abs(np.concatenate([tensor.ravel() for tensor in tensors.values()]))
    allowed = np.flatnonzero(~padding(model, tensors))
    order = np.argsort(-scores[allowed] if largest else scores[allowed], kind="stable")
    k = max(1, round(density * allowed.size))
    return np.sort(allowed[order[:k]])


def reference_per_tensor(model: nn.Module, density: float, eligible: str) -> np.ndarray:
    """The same within each tensor, k split by largest remainder."""
    tensors = eligible_tensors(model, eligible)
    pads = padding(model, tensors)
    k = max(1, round(density * int((~pads).sum())))
    sizes, at = [], 0
    allowed = []
    for tensor in tensors.values():
        allowed.append(np.flatnonzero(~pads[at : at + tensor.size]))
        sizes.append(allowed[-1].size)
        at += tensor.size
    counts = [k * size // sum(sizes) for size in sizes]
    rest = [k * size % sum(sizes) for size in sizes]
    for i in sorted(range(len(sizes)), key=lambda i: (-rest[i], i))[: k - sum(counts)]:
        counts[i] += 1
    picked, at = [], 0
    for tensor, ok, count in zip(tensors.values(), allowed, counts, strict=True):
        order = np.argsort(np.abs(tensor.ravel()[ok]), kind="stable")[:count]
        picked.append(np.sort(ok[order]) + at)
        at += tensor.size
    return np.concatenate(picked)


def check_sound(mask: Mask, model: nn.Module, density: float, eligible: str) -> None:
    tensors = eligible_tensors(model, eligible)
    pads = padding(model, tensors)
    assert mask.space.names == tuple(tensors)
    assert mask.space.shapes == tuple(tensor.shape for tensor in tensors.values())
    assert mask.space.eligible_size == int((~pads).sum())
    assert mask.indices.dtype == np.int64
    assert mask.k == len(mask.indices) == max(1, round(density * mask.space.eligible_size))
    assert np.all(np.diff(mask.indices) > 0)
    assert not pads[mask.indices].any()


@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    levels=st.sampled_from(LEVELS),
    eligible=st.sampled_from(ELIGIBLE),
    density=st.one_of(st.floats(1e-9, 1.0), st.sampled_from([1e-12, 0.005, 0.5, 1.0])),
    largest=st.booleans(),
)
def test_the_mask_is_what_a_stable_sort_picks(
    architecture: str, levels: int, eligible: Any, density: float, largest: bool
) -> None:
    model = model_of(architecture, levels)
    mask = derive_mask(model, Rule("largest" if largest else "magnitude", density, eligible))
    check_sound(mask, model, density, eligible)
    assert np.array_equal(mask.indices, reference(model, density, eligible, largest=largest))


@settings(max_examples=40, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    levels=st.sampled_from(LEVELS),
    eligible=st.sampled_from(ELIGIBLE),
    density=st.one_of(st.floats(1e-9, 1.0), st.sampled_from([1e-12, 0.005, 0.5, 1.0])),
)
def test_a_threshold_for_each_tensor(architecture: str, levels: int, eligible: Any, density: float) -> None:
    model = model_of(architecture, levels)
    mask = magnitude_mask(model, density, eligible, per_tensor=True)
    check_sound(mask, model, density, eligible)
    assert np.array_equal(mask.indices, reference_per_tensor(model, density, eligible))


def test_one_entry_and_every_entry() -> None:
    model = model_of("roberta")
    assert magnitude_mask(model, 1e-12).k == 1
    everything = magnitude_mask(model, 1.0, "all")
    assert everything.k == everything.space.eligible_size == everything.space.size - 64
    assert (mask_size(0.5, 3), mask_size(0.1, 4), mask_size(1.0, 7)) == (2, 1, 7)


@settings(max_examples=25, deadline=None)
@given(
    density=st.floats(1e-4, 1.0),
    eligible=st.sampled_from(ELIGIBLE),
    seed=st.integers(0, 2**62),
    data=st.data(),
)
def test_random_masks_have_exactly_k_entries_too(
    density: float, eligible: Any, seed: int, data: st.DataObject
) -> None:
    model = model_of(data.draw(st.sampled_from(["roberta", "gpt2"])))
    rule = Rule("random", density, eligible, seed=seed)
    mask = derive_mask(model, rule)
    check_sound(mask, model, density, eligible)
    assert derive_mask(model, rule).digest == mask.digest
    if 0.01 < density < 0.99:
        assert derive_mask(model, Rule("random", density, eligible, seed=seed + 1)).digest != mask.digest


def test_random_masks_favour_no_part_of_the_space() -> None:
    model = model_of("bert")
    counts = np.zeros(magnitude_mask(model, eligible="linear+embeddings").space.size)
    for seed in range(200):
        counts[derive_mask(model, Rule("random", 0.1, "linear+embeddings", seed=seed)).indices] += 1
    assert not counts[:32].any()  # the padding token's row
    eighths = [part.mean() for part in np.array_split(counts[32:], 8)]
    assert max(abs(mean - 20) for mean in eighths) < 0.6  # expected 20; deviation 0.09


def test_tied_weights_count_once() -> None:
    from transformers import GPT2LMHeadModel

    from tests.support import config_of, fill

    model = GPT2LMHeadModel(config_of("gpt2"))
    fill(model.transformer, 0)
    assert model.lm_head.weight is model.transformer.wte.weight
    mask = magnitude_mask(model, 0.05, "all")
    assert mask.space.names.count("wte.weight") == 1
    assert not any("lm_head" in name for name in mask.space.names)
    assert mask.digest == magnitude_mask(model_of("gpt2"), 0.05, "all").digest


def test_a_padding_row_that_several_modules_share_is_left_out_once() -> None:
    from transformers import BartConfig, BartModel

    from tests.support import fill

    model = BartModel(
        BartConfig(
            vocab_size=67, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
            max_position_embeddings=40, pad_token_id=0,
        )
    )  # fmt: skip
    fill(model, 0)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    space = parameter_space(model, "all")
    assert space.names.count("shared.weight") == 1
    assert space.excluded == ((0, 32),)
    assert space.eligible_size == sum(p.numel() for p in model.parameters()) - 32
    mask = magnitude_mask(model, 1.0, "all")
    assert mask.k == space.eligible_size


# The same mask and digest everywhere ---------------------------------------------------------------


def digests(model: nn.Module) -> list[str]:
    masks = [magnitude_mask(model, 0.05, eligible) for eligible in ELIGIBLE]
    masks.append(magnitude_mask(model, 0.05, per_tensor=True))
    return [checkpoint_digest(model), *(mask.digest for mask in masks)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One BERT stored in several ways; ``half`` and ``brain`` are other values (rounded)."""
    root = tmp_path_factory.mktemp("stored")
    model = make_model("bert")
    model.save_pretrained(str(root / "plain"))
    model.save_pretrained(str(root / "shards"), max_shard_size="20KB")
    copy = make_model("bert")
    copy.half().save_pretrained(str(root / "half"))
    copy = make_model("bert")
    copy.bfloat16().save_pretrained(str(root / "brain"))
    assert len(list((root / "shards").glob("*.safetensors"))) > 3
    _reorder(root / "plain", root / "turned", list(load_file(root / "plain" / "model.safetensors"))[::-1])
    _old_names(root / "plain", root / "old")
    return {path.name: path for path in root.iterdir()}


def _reorder(source: Path, target: Path, order: list[str]) -> None:
    """Split over two files by hand, tensors in another order and shuffled between the files."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    weight_map = {}
    for part in (0, 1):
        name = f"model-{part + 1:05}-of-00002.safetensors"
        held = {key: tensors[key] for key in order[part::2]}
        save_file(held, target / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _old_names(source: Path, target: Path) -> None:
    """As BERT's first checkpoints: a prefix, and LayerNorm's gamma and beta."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors["bert." + old] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("stored", ["plain", "shards", "turned", "old"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_checkpoint_gives_one_mask_however_it_is_stored_and_loaded(
    checkpoints: dict[str, Path], stored: str, dtype: torch.dtype
) -> None:
    expected = digests(make_model("bert"))
    loaded = AutoModel.from_pretrained(checkpoints[stored], dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert digests(loaded) == expected
    headed = AutoModelForSequenceClassification.from_pretrained(checkpoints[stored], dtype=dtype)
    assert digests(headed) == expected


@pytest.mark.parametrize(("stored", "own"), [("half", torch.float16), ("brain", torch.bfloat16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_gives_one_mask_too(
    checkpoints: dict[str, Path], stored: str, own: torch.dtype, dtype: torch.dtype
) -> None:
    expected = make_model("bert")
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.to(own).float())
    assert digests(AutoModel.from_pretrained(checkpoints[stored], dtype=dtype)) == digests(expected)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "t5"])
def test_with_and_without_a_head(architecture: str) -> None:
    """What a head adds is neither in the space nor in the digest (T5 with a head has a decoder besides)."""
    bare, headed = model_of(architecture), make_model(architecture, classes=3)
    assert digests(bare) == digests(headed)
    other = make_model(architecture, classes=5, seed=0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if not name.startswith(other.base_model_prefix):
                parameter.add_(1.0)
    assert digests(bare) == digests(other)


def test_a_model_trained_after_loading_in_half_precision_counts_as_it_is(
    checkpoints: dict[str, Path],
) -> None:
    """The file is believed only where it still agrees with the loaded tensor."""
    loaded = AutoModel.from_pretrained(checkpoints["plain"], dtype=torch.bfloat16)
    before = checkpoint_digest(loaded)
    with torch.no_grad():
        loaded.encoder.layer[0].output.dense.weight[0, 0] += 1
    assert checkpoint_digest(loaded) != before


def test_half_precision_without_a_file_takes_the_given_tensors(checkpoints: dict[str, Path]) -> None:
    rounded = make_model("bert").bfloat16()
    expected = digests(make_model("bert").bfloat16().float())
    for nowhere in ("", "no-such/model", "not a name at all", "/no/such/folder", "../x"):
        rounded.config._name_or_path = rounded.name_or_path = nowhere
        assert digests(rounded) == expected


def test_another_checkpoint_has_another_digest() -> None:
    base = make_model("bert")
    names = list(backbone_parameters(base))
    seen = {checkpoint_digest(base)}
    for name in (names[0], names[len(names) // 2], names[-1]):
        other = make_model("bert")
        flat = other.get_parameter(name).detach().view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(10.0))  # one bit of one weight
        seen.add(checkpoint_digest(other))
    wide = make_model("bert", intermediate_size=128)
    assert len(seen | {checkpoint_digest(wide)}) == 5


def test_the_pooler_is_no_part_of_the_checkpoint() -> None:
    other = make_model("bert")
    with torch.no_grad():
        other.pooler.dense.weight.add_(1.0)
    assert checkpoint_digest(other) == checkpoint_digest(model_of("bert"))


def test_the_mask_digest_tells_space_and_indices_apart() -> None:
    masks = [
        magnitude_mask(model_of("bert"), 0.05),
        magnitude_mask(model_of("bert"), 0.06),
        magnitude_mask(model_of("bert"), 0.05, "all"),
        magnitude_mask(model_of("bert"), 0.05, per_tensor=True),
        magnitude_mask(make_model("bert", seed=1), 0.05),
        derive_mask(model_of("bert"), Rule("largest", 0.05)),
    ]
    assert len({mask.digest for mask in masks}) == len(masks)
    assert all(re.fullmatch("[0-9a-f]{64}", mask.digest) for mask in masks)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_values_that_are_no_numbers_are_refused(value: float, per_tensor: bool) -> None:
    model = make_model("bert")
    name = "encoder.layer.1.attention.self.key.weight"
    model.get_parameter(name).detach()[3, 4] = value
    with pytest.raises(CheckpointError, match=re.escape(name)):
        magnitude_mask(model, 0.01, per_tensor=per_tensor)


def test_a_checkpoint_too_large_for_half_precision_is_ranked_by_its_file(tmp_path: Path) -> None:
    """Loaded in float16 the weight is infinite; the stored one is not."""
    model = make_model("bert")
    model.encoder.layer[0].output.dense.weight.detach()[0, 0] = 1e6
    model.save_pretrained(str(tmp_path))
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert torch.isinf(loaded.encoder.layer[0].output.dense.weight[0, 0])
    assert digests(loaded) == digests(model)


# Recipes, and masks from elsewhere ------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(RULES)),
    density=st.one_of(st.floats(5e-324, 1.0, exclude_min=True), st.just(1.2345678901234567e-300)),
    eligible=st.sampled_from(ELIGIBLE),
    per_tensor=st.booleans(),
    seed=st.sampled_from([0, 1, 2**63 - 1]),
    digest=st.binary(min_size=32, max_size=32),
)
def test_recipes_are_small_and_come_back(
    name: str, density: float, eligible: Any, per_tensor: bool, seed: int, digest: bytes
) -> None:
    recipe = Recipe(Rule(name, density, eligible, per_tensor, seed), digest.hex(), digest[::-1].hex())
    text = recipe.to_json()
    assert len(text.encode()) < 256
    assert Recipe.from_json(text) == recipe


def test_a_recipe_derives_the_same_mask_on_another_copy() -> None:
    mask = magnitude_mask(model_of("opt"), 0.03, "linear+embeddings")
    recipe = Recipe.from_json(mask.recipe().to_json())
    other = derive_mask(make_model("opt", classes=2), recipe.rule)
    assert other.digest == recipe.mask and other.space.checkpoint == recipe.checkpoint
    recipe.check_checkpoint(other.space.checkpoint)
    with pytest.raises(CheckpointError) as error:
        recipe.check_checkpoint("ab" * 32)
    assert recipe.checkpoint in str(error.value) and "ab" * 32 in str(error.value)


GOOD = Recipe(Rule(), "ab" * 32, "cd" * 32).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]",
        "7",
        "null",
        "{}",
        GOOD.replace('"v":1', '"v":2'),
        GOOD.replace("checkpoint", "checkpint"),
        GOOD.replace('"v":1', '"v":1,"density":"0.5"'),
        GOOD.replace('"v":1', '"v":1,"density":2.0'),
        GOOD.replace('"v":1', '"v":1,"density":NaN'),
        GOOD.replace('"v":1', '"v":1,"density":true'),
        GOOD.replace('"v":1', '"v":1,"name":3'),
        GOOD.replace('"v":1', '"v":1,"eligible":"everything"'),
        GOOD.replace('"v":1', '"v":1,"per_tensor":"yes"'),
        GOOD.replace('"v":1', '"v":1,"seed":-1'),
        GOOD.replace('"v":1', '"v":1,"seed":1.5'),
        GOOD.replace('"v":1', '"v":1,"colour":"red"'),
        GOOD.replace('"mask":"', '"mask":"AA'),
        GOOD.replace('"mask":"', '"mask":"é'),
        json.dumps({"v": 1, "checkpoint": 5, "mask": None}),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="recipe") as error:
        Recipe.from_json(text)
    assert "\n" not in str(error.value)


def test_rules_are_checked() -> None:
    for density in (0.0, -0.1, 1.0000001, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="density"):
            Rule(density=density)
    with pytest.raises(ConfigError, match=r"nearest is 'linear'"):
        magnitude_mask(model_of("bert"), 0.1, "linaer")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"nearest is 'magnitude'"):
        derive_mask(model_of("bert"), Rule("magnitud"))


def test_a_model_without_blocks_is_refused_with_a_remedy() -> None:
    flat = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="use eligible='all'"):
        magnitude_mask(flat)
    assert magnitude_mask(flat, 0.5, "all").k == 4


@pytest.mark.parametrize(
    "indices",
    [
        np.array([], np.int64),
        np.array([3, 2], np.int64),
        np.array([2, 2], np.int64),
        np.array([-1, 2], np.int64),
        np.array([0, 10**9], np.int64),
        np.array([[1, 2]], np.int64),
        np.array([1, 2], np.int32),
        np.array([1.0, 2.0]),
        np.array([31, 40], np.int64),  # 31 lies in the padding token's row
        np.array([0, 32], np.int64),
    ],
)
def test_indices_from_elsewhere_are_checked(indices: np.ndarray) -> None:
    space = parameter_space(model_of("bert"), "linear+embeddings")
    with pytest.raises(CheckpointError, match="expected sorted unique int64"):
        mask_from_indices(indices, space, Rule("given"))
    assert mask_from_indices(np.array([32, 40], np.int64), space, Rule("given")).k == 2


def test_masks_compare_by_digest() -> None:
    one, same = magnitude_mask(model_of("bert"), 0.05), magnitude_mask(make_model("bert"), 0.05)
    other = magnitude_mask(model_of("bert"), 0.06)
    assert one == same and hash(one) == hash(same) and one != other and one != "mask"


def test_entries_by_tensor_lie_where_the_flat_indices_say() -> None:
    model = model_of("roberta")
    mask = magnitude_mask(model, 0.05, "all")
    parts = mask.per_tensor()
    assert sum(part.size for part in parts.values()) == mask.k
    parameters = backbone_parameters(model)
    everything = torch.cat([parameters[name].detach().reshape(-1) for name in mask.space.names])
    found = torch.cat(
        [parameters[name].detach().reshape(-1)[torch.from_numpy(i)] for name, i in parts.items()]
    )
    assert torch.equal(found, everything[torch.from_numpy(mask.indices)])
    threshold = everything[torch.from_numpy(mask.indices)].abs().max()
    kept = int((everything.abs() <= threshold).sum()) - 64  # the two padding rows are zeros
    assert kept == mask.k  # random floats: no ties
