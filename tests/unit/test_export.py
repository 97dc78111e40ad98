"""Exported folders are ordinary checkpoints that give the run's own outputs."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from fedmask.delta import read_delta, write_delta
from fedmask.errors import CheckpointError, ConfigError, FedmaskError
from fedmask.export import export_run, merged, open_run, vector_of
from fedmask.masks import Mask
from fedmask.space import backbone_parameters
from fedmask.tuner import tuning_of
from fedmask.workspace import Workspace
from tests.support import make_model, run_config, save_run_files

TEXT = "word1 word20 word33 word2"


def finish(folder: Path, run: Path, mask: Mask | None = None, **options: Any) -> Workspace:
    """A run's folder as it is after training: settings, and a change for every segment."""
    config = run_config(folder, **options)
    workspace = Workspace(config)
    segments: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for task in workspace.tasks:
        for segment in workspace.layout(task).segments:
            if segment.name not in segments:
                segments[segment.name] = rng.standard_normal(segment.size).astype(np.float32) * 0.05
    run.mkdir(parents=True)
    record = {"config": config.model_dump(mode="json"), "checkpoint_digest": workspace.checkpoint_digest}
    (run / "config.json").write_text(json.dumps(record))
    write_delta(
        run / "delta.safetensors",
        segments,
        checkpoint=workspace.checkpoint_digest,
        mask=mask or workspace.mask,
    )
    return workspace


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    return {name: save_run_files(root / name, name) for name in ("bert", "roberta", "gpt2")}


def batch_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoTokenizer.from_pretrained(folder)([TEXT], return_tensors="pt"))


def run_logits(run: Path, task: str) -> torch.Tensor:
    """What the run itself says about the text, through the workspace and the final vector."""
    from fedmask.training import Stream, tuned

    workspace, delta = open_run(run)
    with tuned(workspace.model(task), vector_of(workspace, task, delta), Stream(1, -1, -1)), torch.no_grad():
        inputs = workspace.backbone.tokenizer([TEXT], return_tensors="pt")
        logits: torch.Tensor = workspace.model(task).eval()(**inputs)
    return logits


def snippet(folder: Path) -> str:
    found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_the_model_card_s_lines_give_the_run_s_outputs(
    architecture: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head ``mean``, every kind of segment; the lines are executed as they stand, with another text."""
    finish(folders[architecture], tmp_path / "run")
    written = export_run(tmp_path / "run", tmp_path / "out")
    assert written == [tmp_path / "out" / "mood", tmp_path / "out" / "price"]
    for task, outputs in (("mood", 2), ("price", 1)):
        folder = tmp_path / "out" / task
        wanted = run_logits(tmp_path / "run", task)
        code = snippet(folder)
        assert '"some text"' in code and "max_length=16" in code
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {}
        exec(code.replace("some text", TEXT), names)
        assert names["logits"].shape == (1, outputs)
        assert torch.allclose(names["logits"], wanted, atol=1e-6)
        assert (names["logits"] - untuned(architecture, names, folder)).abs().max() > 1e-3


def untuned(architecture: str, names: dict[str, Any], folder: Path) -> torch.Tensor:
    states = make_model(architecture)(**batch_of(folder)).last_hidden_state.mean(1)
    return torch.nn.functional.linear(states, names["head"]["weight"], names["head"]["bias"])


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("kind", ["mean", "hf"])
def test_names_and_shapes_are_the_pre_trained_ones(
    architecture: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    workspace = finish(folders[architecture], tmp_path / "run", head=kind)
    export_run(tmp_path / "run", tmp_path / "out")
    loader: Any = AutoModel if kind == "mean" else AutoModelForSequenceClassification
    before = loader.from_pretrained(folders[architecture] / "model", num_labels=2, pad_token_id=0)
    mask = workspace.mask
    assert mask is not None
    for task, count in (("mood", 2), ("price", 1)):
        folder = tmp_path / "out" / task
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = loader.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in info), info
        ours, theirs = backbone_parameters(model), backbone_parameters(before)
        assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        # Of the backbone, masked entries and feed-forward biases differ and nothing else does.
        places = mask.per_tensor()
        for name, parameter in ours.items():
            different = np.flatnonzero((parameter != theirs[name]).view(-1).numpy())
            biases = name.endswith("bias") and different.size
            assert biases or np.isin(different, places.get(name, [])).all(), name
        if kind == "hf":
            assert model.config.num_labels == count
            wanted = run_logits(tmp_path / "run", task)
            assert torch.allclose(model.eval()(**batch_of(folder)).logits, wanted, atol=1e-6)
    mood = json.loads((tmp_path / "out" / "mood" / "config.json").read_text())
    if kind == "hf":
        assert mood["id2label"] == {"0": "no", "1": "yes"} and mood["label2id"] == {"no": 0, "yes": 1}
    else:
        with safe_open(str(tmp_path / "out" / "mood" / "head.safetensors"), framework="pt") as head:
            assert json.loads(head.metadata()["labels"]) == ["no", "yes"]
            assert list(head.get_tensor("weight").shape) == [2, 32]
    card = (tmp_path / "out" / "mood" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "no, yes" in card
    assert f"{workspace.layout('mood').shared_size} trained backbone values" in card


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full"},
        {"method": "head"},
        {"method": "ffn-bias"},
        {"method": "random", "eligible": "all"},
        {"density": 0.05, "adapter": {"target": "weight", "bottleneck": 4}},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values())[:20],
)
def test_other_methods(options: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    finish(folders["bert"], tmp_path / "run", head="hf", **options)
    export_run(tmp_path / "run", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "mood").eval()
    found = model(**batch_of(tmp_path / "out" / "mood")).logits
    assert torch.allclose(found, run_logits(tmp_path / "run", "mood"), atol=1e-6)


def test_a_checkpoint_stored_in_half_precision_is_exported_in_full(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The changes are finer than the stored dtype: written back in it they would be lost."""
    folder = tmp_path / "half"
    shutil.copytree(folders["bert"], folder)
    model = AutoModel.from_pretrained(folder / "model", dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    finish(folder, tmp_path / "run", head="hf")
    export_run(tmp_path / "run", tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "mood").eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    found = loaded(**batch_of(tmp_path / "out" / "mood")).logits
    assert torch.allclose(found, run_logits(tmp_path / "run", "mood"), atol=1e-6)


def test_the_workspace_is_as_before_and_merged_models_are_its_own(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    finish(folders["bert"], tmp_path / "run")
    workspace, delta = open_run(tmp_path / "run")
    digest = workspace.checkpoint_digest
    one, two = merged(workspace, "mood", delta), merged(workspace, "mood", delta)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}
    assert "fedmask" not in repr(one) and tuning_of(workspace.model("mood")) is not None
    from fedmask.space import checkpoint_digest

    assert checkpoint_digest(workspace.backbone.model) == digest


def test_folders_that_exist_are_not_touched(folders: dict[str, Path], tmp_path: Path) -> None:
    finish(folders["bert"], tmp_path / "run")
    (tmp_path / "out" / "price").mkdir(parents=True)
    (tmp_path / "out" / "price" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"price exists; give another folder or --overwrite"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["price", "notes.txt"]
    for found in ("mine", "[]", '{"files": 3}'):  # no export of ours, whatever is in it
        (tmp_path / "out" / "price" / "fedmask-export.json").write_text(found)
        with pytest.raises(
            ConfigError, match=r"price: expected an older export to overwrite, found something"
        ):
            export_run(tmp_path / "run", tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "mood").exists()


def test_overwrite_leaves_nothing_of_an_older_export(folders: dict[str, Path], tmp_path: Path) -> None:
    """A head beside another model's weights would be taken for that model's."""
    out = tmp_path / "out"
    finish(folders["gpt2"], tmp_path / "old", head="mean")
    export_run(tmp_path / "old", out)
    assert (out / "mood" / "head.safetensors").is_file()
    (out / "mood" / "notes.txt").write_text("mine")
    (tmp_path / "precious.txt").write_text("mine")
    manifest = out / "price" / "fedmask-export.json"
    listed = json.loads(manifest.read_text())["files"]
    assert set(listed) | {manifest.name} == {path.name for path in (out / "price").iterdir()}
    manifest.write_text(
        json.dumps({"files": [*listed, "../../precious.txt", str(tmp_path / "precious.txt")]})
    )

    finish(folders["bert"], tmp_path / "new", head="hf")
    export_run(tmp_path / "new", out, overwrite=True)
    export_run(tmp_path / "new", tmp_path / "clean")
    for task in ("mood", "price"):
        wanted = {path.name: path.read_bytes() for path in (tmp_path / "clean" / task).iterdir()}
        found = {path.name: path.read_bytes() for path in (out / task).iterdir()}
        if task == "mood":
            assert found.pop("notes.txt") == b"mine"
        assert found == wanted
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["mood", "price"]


def test_what_is_no_finished_run_is_refused_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(folders["bert"], run)
    good = (run / "config.json").read_text()

    def refused(kind: type[FedmaskError], said: str) -> None:
        with pytest.raises(kind, match=said) as error:
            export_run(run, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    for text in ("", "{", "[]", "{}", '{"config": 3}', '{"config": {"tasks": []}}'):
        (run / "config.json").write_text(text)
        refused(ConfigError, "settings|tasks|missing")
    (run / "config.json").write_text(good.replace('"density": 0.02', '"density": 0.03'))
    refused(CheckpointError, "belong to the mask")
    (run / "config.json").write_text(good.replace('"head": "mean"', '"head": "hf"'))
    refused(CheckpointError, "expected segments of the sizes .*'head/mood'")
    (run / "config.json").write_text(good.replace("pafi+hiwi", "pafi"))
    refused(CheckpointError, "found .*'bias'")
    (run / "config.json").write_text(good.replace("pafi+hiwi", "head"))
    refused(CheckpointError, "belong to the mask")
    (run / "config.json").write_text(good)
    (run / "delta.safetensors").unlink()
    refused(ConfigError, "expected a finished run with delta.safetensors")
    (run / "config.json").unlink()
    refused(ConfigError, "expected a finished run with config.json")
    run = tmp_path / "missing"
    refused(ConfigError, "expected a finished run")


def test_another_checkpoint_is_refused_with_both_digests(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["bert"], folder)
    workspace = finish(folder, tmp_path / "run")
    make_model("bert", seed=5).save_pretrained(folder / "model")
    other = Workspace(run_config(folder)).checkpoint_digest
    with pytest.raises(CheckpointError) as error:
        export_run(tmp_path / "run", tmp_path / "out")
    assert workspace.checkpoint_digest in str(error.value) and other in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_delta_of_a_run_applies_in_plain_pytorch(folders: dict[str, Path], tmp_path: Path) -> None:
    """The backbone part of a federation's result, without the federation."""
    from fedmask import load_delta

    workspace = finish(folders["bert"], tmp_path / "run", method="pafi")
    model = load_delta(
        AutoModel.from_pretrained(folders["bert"] / "model"), tmp_path / "run" / "delta.safetensors"
    )
    theirs = backbone_parameters(
        merged(workspace, "mood", read_delta(tmp_path / "run" / "delta.safetensors"))
    )
    assert all(torch.equal(p, theirs[name]) for name, p in backbone_parameters(model).items())
