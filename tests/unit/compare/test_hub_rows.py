"""Studies whose files are not there: their rows come from the hub (a stand-in for its download)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from experiments.compare.data import prepare
from experiments.compare.study import Study, load_study, study_from
from fedmask.errors import ConfigError, DataError

STUDIES = Path("experiments/studies/compare")
# What the hub's pages say of the data sets that the studies name: columns, and class names in their order.
PAIR = {"sentence1": str, "sentence2": str, "idx": int}
ENTAILS = ["entailment", "not_entailment"]
TOPICS = ["World", "Sports", "Business", "Sci/Tech"]
KINDS = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
SHAPES: dict[str, dict[str, Any]] = {
    "CogComp/trec": {"text": str, "coarse_label": KINDS, "fine_label": int},
    "SetFit/sst2": {"text": str, "label": int, "label_text": ("negative", "positive")},
    "nyu-mll/glue:cola": {"sentence": str, "label": ["unacceptable", "acceptable"], "idx": int},
    "nyu-mll/glue:mrpc": PAIR | {"label": ["not_equivalent", "equivalent"]},
    "nyu-mll/glue:rte": PAIR | {"label": ENTAILS},
    "nyu-mll/glue:qnli": {"question": str, "sentence": str, "label": ENTAILS, "idx": int},
    "nyu-mll/glue:stsb": PAIR | {"label": float},
    "fancyzhx/ag_news": {"text": str, "label": TOPICS},
}
SPLITS = {
    "CogComp/trec": ("train", "test"),
    "fancyzhx/ag_news": ("train", "test"),
}


def rows_of(shape: dict[str, Any], count: int) -> Dataset:
    """``count`` rows of one data set's columns."""
    features, columns = {}, {}
    for name, kind in shape.items():
        if isinstance(kind, list):
            features[name], columns[name] = ClassLabel(names=kind), [n % len(kind) for n in range(count)]
        elif isinstance(kind, tuple):
            features[name], columns[name] = Value("string"), [kind[n % len(kind)] for n in range(count)]
        elif kind is str:
            features[name], columns[name] = Value("string"), [f"{name} {n}" for n in range(count)]
        else:
            what = "float32" if kind is float else "int32"
            features[name], columns[name] = Value(what), [kind(n % 5) for n in range(count)]
    return Dataset.from_dict(columns, Features(features))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The data sets of ``SHAPES`` with 3,000 rows a split; what was asked for."""
    asked: list[str] = []

    def load_dataset(path: str, name: str | None, *, revision: str | None) -> DatasetDict:
        source = f"{path}:{name}" if name else path
        asked.append(f"{source}@{revision}" if revision else source)
        splits = SPLITS.get(source, ("train", "validation", "test"))
        return DatasetDict({split: rows_of(SHAPES[source], 3000) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("FEDMASK_DATA", raising=False)
    return lambda: list(dict.fromkeys(asked))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["glue8", "sst2", "trec6", "cola", "mrpc", "agnews"])
def test_a_study_without_its_files_fetches_its_rows(hub: Any, name: str, tmp_path: Path) -> None:
    study = load_study(STUDIES / f"{name}.toml")
    prepared = prepare(study, None, tmp_path)
    assert len(hub()) == len(study.tasks)
    for task in study.tasks:
        files = prepared[task.name].files
        for split, wanted in (("train", task.train_rows), ("validation", task.validation_rows)):
            found = read(files[split])
            assert len(found) == wanted
            assert set(found[0]) == {*task.text, task.label}
        assert len(read(files["reported"])) == (task.reported_rows or 3000)
        pair = {tuple(str(row[column]).split()[0] for column in task.text) for row in read(files["train"])}
        assert len(pair) == 1  # each text column from one column there
        if task.metric != "spearman":
            assert all(isinstance(row[task.label], str) for row in read(files["train"]))


def test_files_come_before_the_hub(hub: Any, tmp_path: Path) -> None:
    study = study_with(hub={"source": "nyu-mll/glue:cola", "text": ["sentence"]})
    for name in ("train.tsv", "dev.tsv"):
        lines = "".join(f"row {n}\t{n % 2}\n" for n in range(20))
        (tmp_path / name).write_text("text\tlabel\n" + lines)
    here = prepare(study, tmp_path, tmp_path / "here")
    assert hub() == []
    (tmp_path / "dev.tsv").unlink()
    there = prepare(study, tmp_path, tmp_path / "there")
    assert hub() == ["nyu-mll/glue:cola"]
    assert here["t"].digest != there["t"].digest
    assert {row["label"] for row in read(there["t"].files["train"])} == {"acceptable", "unacceptable"}


def test_what_neither_has_is_named(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> DatasetDict:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    study = study_with(hub={"source": "nyu-mll/glue:cola", "text": ["sentence"]})
    with pytest.raises(
        DataError, match=r"'t': train\.tsv, dev\.tsv: not below a data folder .*glue:cola.*offline"
    ):
        prepare(study, None, tmp_path)
    with pytest.raises(ConfigError, match=r"text: expected 1 columns, found 2"):
        study_with(hub={"source": "nyu-mll/glue:cola", "text": ["sentence", "other"]})


def study_with(**task: Any) -> Study:
    given = {
        "name": "t",
        "train": "train.tsv",
        "reported": "dev.tsv",
        "clients": 2,
        "train_rows": 8,
        "validation_rows": 4,
    }
    variant = {"name": "pafi", "method": "pafi", "lr": [1e-3, 1e-1]}
    return study_from({"name": "s", "tasks": [given | task], "variants": [variant]})
