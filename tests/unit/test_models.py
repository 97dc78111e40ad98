"""Loading backbones and putting heads on them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmask.errors import ConfigError
from fedmask.models import (
    Backbone,
    MeanHead,
    OwnHead,
    head_parameters,
    load_backbone,
    model_source,
    set_dropout,
    task_model,
)
from fedmask.space import backbone_of, backbone_parameters
from tests.support import (
    BIASED,
    batch,
    bits,
    fill,
    make_model,
    random_state_untouched,
    save_checkpoint,
    state_bits,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_checkpoint(root / name, name) for name in (*BIASED, "llama")}


@pytest.fixture(scope="module")
def bert(folders: dict[str, Path]) -> Backbone:
    return load_backbone(str(folders["bert"]))


def headed(backbone: Backbone, kind: Any = "mean", task: str = "x", outputs: int = 3, seed: int = 1) -> Any:
    return task_model(backbone, task, outputs, head=kind, seed=seed, dropout=0.1)


# Loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*BIASED, "llama"])
def test_a_local_folder(folders: dict[str, Path], architecture: str) -> None:
    with random_state_untouched():
        backbone = load_backbone(str(folders[architecture]))
    model = backbone.model
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    plain = make_model(architecture)
    assert all(
        torch.equal(p, backbone_parameters(plain)[name]) for name, p in backbone_parameters(model).items()
    )
    assert backbone.pad_id == 0 and model.config.pad_token_id == 0
    for kind in ("mean", "hf"):
        logits = headed(backbone, kind).eval()(**batch())
        assert logits.shape == (3, 3) and torch.isfinite(logits).all()


def test_a_checkpoint_in_half_precision_is_widened(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m")
    from transformers import AutoModel

    AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    model = load_backbone(str(folder)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(
        model.embeddings.word_embeddings.weight.bfloat16().float(), model.embeddings.word_embeddings.weight
    )


def test_parts_that_a_checkpoint_lacks_are_the_same_in_every_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_checkpoint(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    first = load_backbone(str(folder))
    torch.manual_seed(77)
    second = load_backbone(str(folder))
    assert state_bits(first.model) == state_bits(second.model)
    assert state_bits(headed(first, "hf")) == state_bits(headed(second, "hf"))


def test_a_tokenizer_without_a_padding_token_takes_its_end(folders: dict[str, Path], tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(folders["gpt2"], folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    backbone = load_backbone(str(folder))
    assert backbone.pad_id == 2  # </s>
    assert headed(backbone, "hf")(**batch()).shape == (3, 3)
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no padding token; set one") as error:
        load_backbone(str(folder))
    assert "\n" not in str(error.value)


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folders["bert"] / "config.json").read_text())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no-such-architecture"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    cases = {
        str(tmp_path / "missing"): "not found; give an existing folder",
        "./missing": "not found; give an existing folder",
        "~/no-such-folder-here": "not found; give an existing folder",
        "a/b/c": "not found; give an existing folder",
        str(tmp_path / "empty"): "expected a config.json in it",
        str(tmp_path / "bare"): "cannot be loaded",
        str(tmp_path / "odd"): "cannot be loaded",
        str(tmp_path / "broken"): "cannot be loaded",
        "no-such-model-of-ours": "cannot be loaded",
        "nobody/no-such-model": "cannot be loaded",
        "not a name": "cannot be loaded",
    }
    for name, said in cases.items():
        with pytest.raises(ConfigError, match=re.escape(said)) as error:
            load_backbone(name)
        assert "\n" not in str(error.value) and name in str(error.value), name


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    """Where transformers would fall back to them: for the backbone, and for the architecture's own head."""
    from transformers import AutoModel

    folder = save_checkpoint(tmp_path / "m")
    backbone = load_backbone(str(folder))
    torch.save(backbone.model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert AutoModel.from_pretrained(folder) is not None  # nothing is wrong with the file
    for attempt in (lambda: load_backbone(str(folder)), lambda: headed(backbone, "hf")):
        with pytest.raises(
            ConfigError, match=r"expected its weights in safetensors.*convert them by"
        ) as error:
            attempt()
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_peft_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """transformers opens ``adapter_model.bin`` where peft is installed, and says nothing elsewhere."""
    folder = save_checkpoint(tmp_path / "m")
    load_backbone(str(folder))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(ConfigError, match=r"found a PEFT adapter with it.*merge_and_unload") as error:
        load_backbone(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_weights_of_another_architecture_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers fills in random numbers and only logs it."""
    folder = save_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").write_bytes((folders["gpt2"] / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"its checkpoint lacks embeddings\.LayerNorm\.bias and 36 more"):
        load_backbone(str(folder))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama"])
def test_a_model_without_its_tokenizer_is_refused(architecture: str, tmp_path: Path) -> None:
    """transformers makes up an empty one, to which every text is the same."""
    make_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"knows no words|cannot be loaded") as error:
        load_backbone(str(tmp_path))
    assert "\n" not in str(error.value)


def test_weights_that_are_cut_off_or_have_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        load_backbone(str(folder))
    assert "\n" not in str(error.value)
    other = save_checkpoint(tmp_path / "other", hidden_size=64)
    (folder / "config.json").write_text((other / "config.json").read_text())
    file.write_bytes((save_checkpoint(tmp_path / "m2") / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_backbone(str(folder))


def test_names_and_folders(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_source(str(folders["bert"])) == str(folders["bert"])
    monkeypatch.chdir(folders["bert"].parent)
    assert model_source("bert") == "bert" and model_source("./bert") == "bert"
    assert model_source("some/hub-name") == "some/hub-name"
    assert Path(model_source("minilm"), "model.safetensors").is_file()


# Heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "hf"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_padding_has_no_influence(folders: dict[str, Path], architecture: str, kind: Any) -> None:
    model = headed(load_backbone(str(folders[architecture])), kind).eval()
    padded = batch(3, 9)
    together = model(**padded)
    other = dict(padded)
    wide = nn.functional.pad(padded["input_ids"], (0, 4))
    other = {"input_ids": wide, "attention_mask": nn.functional.pad(padded["attention_mask"], (0, 4))}
    assert torch.allclose(model(**other), together, atol=1e-6)
    for row in range(3):
        length = int(padded["attention_mask"][row].sum())
        alone = {name: values[row : row + 1, :length] for name, values in padded.items()}
        assert torch.allclose(model(**alone)[0], together[row], atol=1e-6)


def test_the_mean_head_by_hand(bert: Backbone) -> None:
    model = headed(bert).eval()
    inputs = batch(2, 5)
    states = bert.model(**inputs).last_hidden_state
    mean = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    wanted = mean @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(**inputs), wanted, atol=1e-6)
    nothing = {**inputs, "attention_mask": torch.zeros(2, 5, dtype=torch.int64)}
    assert torch.isfinite(model(**nothing)).all()


def test_a_head_is_drawn_from_seed_and_task(bert: Backbone) -> None:
    for kind in ("mean", "hf"):
        drawn = {
            (task, seed): bits(_head(headed(bert, kind, task, seed=seed)))
            for task in ("a", "b")
            for seed in (1, 2)
        }
        assert len(set(drawn.values())) == 4
        torch.manual_seed(5)
        with random_state_untouched():
            again = headed(bert, kind, "a", seed=1)
        assert bits(_head(again)) == drawn["a", 1]
    assert not headed(bert).head.bias.any()
    assert 0.01 < headed(bert, outputs=50).head.weight.std() < 0.03


def _head(model: Any) -> torch.Tensor:
    return model.head.weight if isinstance(model, MeanHead) else model.model.classifier.weight


def test_a_head_is_the_same_in_another_process(folders: dict[str, Path]) -> None:
    code = (
        "import sys, hashlib, torch\n"
        "from fedmask.models import load_backbone, task_model\n"
        "torch.manual_seed(int(sys.argv[2]))\n"
        "backbone = load_backbone(sys.argv[1])\n"
        "for kind in ('hf', 'mean'):\n"
        "    model = task_model(backbone, 'x', 3, head=kind, seed=1, dropout=0.1)\n"
        "    state = model.state_dict()\n"
        "    text = ''.join(f'{n}{v.numpy().tobytes().hex()}' for n, v in sorted(state.items()))\n"
        "    print(hashlib.sha256(text.encode()).hexdigest())\n"
    )
    folder = str(folders["roberta"])
    run = subprocess.run(
        [sys.executable, "-c", code, folder, "123"], capture_output=True, text=True, check=True, timeout=120
    )
    backbone = load_backbone(folder)
    for kind, found in zip(("hf", "mean"), run.stdout.split(), strict=True):
        state = headed(backbone, kind).state_dict()
        text = "".join(f"{n}{v.numpy().tobytes().hex()}" for n, v in sorted(state.items()))
        assert hashlib.sha256(text.encode()).hexdigest() == found


HEADS = {
    ("bert", "mean"): ["head.weight", "head.bias"],
    ("bert", "hf"): [
        "model.bert.pooler.dense.weight", "model.bert.pooler.dense.bias", "model.classifier.weight",
        "model.classifier.bias",
    ],
    ("roberta", "mean"): ["head.weight", "head.bias"],
    ("roberta", "hf"): [
        "model.classifier.dense.weight", "model.classifier.dense.bias", "model.classifier.out_proj.weight",
        "model.classifier.out_proj.bias",
    ],
    ("distilbert", "hf"): [
        "model.pre_classifier.weight", "model.pre_classifier.bias", "model.classifier.weight",
        "model.classifier.bias",
    ],
    ("gpt2", "hf"): ["model.score.weight"],
    ("opt", "hf"): ["model.score.weight"],
    ("llama", "hf"): ["model.score.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "kind"), list(HEADS))
def test_what_belongs_to_the_head(folders: dict[str, Path], architecture: str, kind: Any) -> None:
    model = headed(load_backbone(str(folders[architecture])), kind)
    assert head_parameters(model) == HEADS[architecture, kind]
    counted = {id(p) for p in backbone_parameters(model).values()}
    for name in head_parameters(model):
        assert id(model.get_parameter(name)) not in counted


@pytest.mark.parametrize("kind", ["mean", "hf"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_tasks_share_the_backbone_s_tensors_and_nothing_else(
    folders: dict[str, Path], architecture: str, kind: Any
) -> None:
    backbone = load_backbone(str(folders[architecture]))
    one, two = headed(backbone, kind, "a"), headed(backbone, kind, "b", outputs=5)
    shared = backbone_parameters(backbone.model)
    for model in (one, two):
        found = backbone_parameters(model)
        assert found.keys() == shared.keys()
        assert all(found[name] is shared[name] for name in shared)
        assert not {id(m) for m in model.modules()} & {id(m) for m in backbone.model.modules()}
    mine = {one.get_parameter(name).data_ptr() for name in head_parameters(one)}
    assert not mine & {two.get_parameter(name).data_ptr() for name in head_parameters(two)}
    assert two.get_parameter(head_parameters(two)[-1]).shape[0] == 5
    assert isinstance(one, MeanHead if kind == "mean" else OwnHead)
    assert backbone_of(one).config.hidden_size == 32


def test_tied_tensors_stay_tied_in_an_own_head_s_model(tmp_path: Path) -> None:
    """BART's embedding has three names; a model that kept a copy under one of them would not be tuned."""
    from transformers import BartConfig, BartModel

    folder = save_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    model = BartModel(
        BartConfig(
            vocab_size=67, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
            max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    fill(model, 0)
    model.save_pretrained(folder)
    backbone = load_backbone(str(folder))
    own = headed(backbone, "hf")
    inner = backbone_of(own)
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        assert inner.get_submodule(name).weight is backbone.model.shared.weight, name
    with pytest.raises(ConfigError, match="--head hf"):
        headed(backbone, "mean")
    ends = {
        "input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
    }
    assert own.eval()(**ends).shape == (2, 3)


@pytest.mark.parametrize("kind", ["mean", "hf"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "opt", "llama"])
def test_one_probability_for_every_dropout(folders: dict[str, Path], architecture: str, kind: Any) -> None:
    backbone = load_backbone(str(folders[architecture]))
    before = [m.p for m in backbone.model.modules() if isinstance(m, nn.Dropout)]
    model = task_model(backbone, "x", 3, head=kind, seed=1, dropout=0.37)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} <= {0.37}
    assert [m.p for m in backbone.model.modules() if isinstance(m, nn.Dropout)] == before
    set_dropout(model, 0.0)
    model.train()
    assert torch.equal(model(**batch()), model(**batch()))
    set_dropout(model, 0.5)
    if kind == "mean" or architecture not in ("llama",):
        assert not torch.equal(model(**batch()), model(**batch()))
