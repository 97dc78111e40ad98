"""A model by its hub name: a cache with a tiny model in it stands in for the download, nothing else does."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModel

from fedmask import magnitude_mask
from fedmask.errors import ConfigError
from fedmask.models import load_backbone, task_model
from fedmask.space import checkpoint_digest
from fedmask.stored import stored_reader
from tests.support import batch, make_model, outputs, save_checkpoint, state_bits

NAME, COMMIT = "owner/tiny", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, used by all that loads from the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def download(cache: Path, folder: Path) -> Path:
    """Puts a folder's files where a download would: references to a commit, and its snapshot."""
    home = cache / "models--owner--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, home / "snapshots" / COMMIT))


def test_a_hub_name_loads_what_its_folder_holds(cache: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    download(cache, folder)
    named, local = load_backbone(NAME), load_backbone(str(folder))
    assert state_bits(named.model) == state_bits(local.model)
    assert named.tokenizer("word1 word2").input_ids == local.tokenizer("word1 word2").input_ids
    assert magnitude_mask(named.model, 0.1) == magnitude_mask(local.model, 0.1)
    for head in ("mean", "hf"):
        models = [task_model(one, "x", 3, head=head, seed=1, dropout=0.0) for one in (named, local)]
        assert torch.equal(*(outputs(model, batch()) for model in models))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_digest_in_every_dtype(cache: Path, tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() is shards
    download(cache, tmp_path / "model")
    loaded = AutoModel.from_pretrained(NAME, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert checkpoint_digest(loaded) == checkpoint_digest(model)
    assert magnitude_mask(loaded, 0.1) == magnitude_mask(model, 0.1)


def test_a_cache_that_is_gone_leaves_the_loaded_values(cache: Path, tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path / "model")
    download(cache, tmp_path / "model")
    loaded = AutoModel.from_pretrained(NAME, dtype=torch.bfloat16)
    parameters = dict(loaded.named_parameters())
    name = "encoder.layer.0.output.dense.weight"
    assert stored_reader(loaded, parameters)(name).dtype == torch.float32
    shutil.rmtree(cache)
    assert stored_reader(loaded, parameters)(name).dtype == torch.bfloat16


def test_a_name_that_is_not_in_the_cache_is_one_line(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"model 'owner/tiny': cannot be loaded .*in the cache") as error:
        load_backbone(NAME)
    assert "\n" not in str(error.value)
