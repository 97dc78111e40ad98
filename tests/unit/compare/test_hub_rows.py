"""Studies whose files are not there: their rows come from the hub (a stand-in for its download)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from experiments.compare.campaign import Campaign
from experiments.compare.data import prepare
from experiments.compare.study import Study, load_study, study_from
from fedmask.config import TaskConfig
from fedmask.errors import ConfigError, DataError
from fedmask.tasks import load_task

STUDIES = Path("experiments/studies/compare")
# What the hub's pages say of the data sets that the studies name: columns, and class names in their order.
PAIR = {"sentence1": str, "sentence2": str, "idx": int}
ENTAILS = ["entailment", "not_entailment"]
TOPICS = ["World", "Sports", "Business", "Sci/Tech"]
KINDS = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
SHAPES: dict[str, dict[str, Any]] = {
    "CogComp/trec": {"text": str, "coarse_label": KINDS, "fine_label": int},
    "SetFit/sst2": {"text": str, "label": int, "label_text": str},
    "nyu-mll/glue:cola": {"sentence": str, "label": ["unacceptable", "acceptable"], "idx": int},
    "nyu-mll/glue:mrpc": PAIR | {"label": ["not_equivalent", "equivalent"]},
    "nyu-mll/glue:rte": PAIR | {"label": ENTAILS},
    "nyu-mll/glue:qnli": {"question": str, "sentence": str, "label": ENTAILS, "idx": int},
    "nyu-mll/glue:stsb": PAIR | {"label": float},
    "fancyzhx/ag_news": {"text": str, "label": TOPICS},
}
ROWS = 3000
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
        elif kind is str:
            features[name], columns[name] = Value("string"), [f"{name} {n}" for n in range(count)]
        else:
            what = "float32" if kind is float else "int32"
            features[name], columns[name] = Value(what), [kind(n % 5) for n in range(count)]
    return Dataset.from_dict(columns, Features(features))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The data sets of ``SHAPES`` with ``ROWS`` rows a split; what was asked for."""
    asked: list[str] = []

    def load_dataset(path: str, name: str | None, *, revision: str | None) -> DatasetDict:
        source = f"{path}:{name}" if name else path
        asked.append(f"{source}@{revision}" if revision else source)
        splits = SPLITS.get(source, ("train", "validation", "test"))
        return DatasetDict({split: rows_of(SHAPES[source], ROWS) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("FEDMASK_DATA", raising=False)
    return lambda: list(dict.fromkeys(asked))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The study's columns, in the order of its texts and label, under the hub's names.
THERE = {
    "trec6": ("text", "coarse_label"),
    "sst2": ("text", "label"),
    "cola": ("sentence", "label"),
    "mrpc": ("sentence1", "sentence2", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "qnli": ("question", "sentence", "label"),
    "stsb": ("sentence1", "sentence2", "label"),
    "agnews": ("text", "label"),
}


@pytest.mark.parametrize("name", ["glue8", "sst2", "trec6", "cola", "mrpc", "agnews"])
def test_a_study_without_its_files_fetches_its_rows(hub: Any, name: str, tmp_path: Path) -> None:
    """Each row's own texts and label; classes keep their numbers, and so the hub's order."""
    study = load_study(STUDIES / f"{name}.toml")
    prepared = prepare(study, None, tmp_path)
    assert len(hub()) == len(study.tasks)
    for task in study.tasks:
        assert task.hub is not None
        shape = SHAPES[task.hub.source.partition("@")[0]]
        *texts, label = THERE[task.name.removesuffix("_sentences").removesuffix("10k")]
        for split in ("train", "validation", "reported"):
            wanted = {"train": task.train_rows, "validation": task.validation_rows}
            found = read(prepared[task.name].files[split])
            assert len(found) == wanted.get(split, task.reported_rows or ROWS)
            for row in found:
                number = int(row[task.text[0]].rpartition(" ")[2])
                expected = [f"{column} {number}" for column in texts] + [label_of(shape[label], number)]
                assert [row[column] for column in (*task.text, task.label)] == expected


def label_of(kind: Any, number: int) -> int | float:
    """What ``rows_of`` puts into a row."""
    return number % len(kind) if isinstance(kind, list) else kind(number % 5)


def test_f1_is_of_the_same_class_as_with_the_files(hub: Any, tmp_path: Path) -> None:
    """Of class 1: GLUE's "equivalent", whatever the names' alphabet says."""
    study = load_study(STUDIES / "mrpc.toml")
    files = prepare(study, None, tmp_path)["mrpc"].files
    (task,) = study.tasks
    config = TaskConfig(
        name="mrpc",
        source=str(files["train"]),
        text=list(task.text),
        label="label",
        metric=task.metric,
        clients=1,
    )
    data = load_task(config)
    row = next(row for row in read(files["train"]) if row["label"] == 1)
    assert data.labels is not None and data.labels[1] == "1"
    assert SHAPES["nyu-mll/glue:mrpc"]["label"][1] == "equivalent"
    assert data.train["label"][data.train["text"].index(row["sentence1"])] == 1


def test_rows_without_a_label_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GLUE's test splits hold -1 throughout."""
    unlabelled = Dataset.from_dict(
        {"sentence": [f"{n}" for n in range(20)], "label": [-1] * 20},
        Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])}),
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: DatasetDict(train=unlabelled, validation=unlabelled)
    )
    with pytest.raises(DataError, match=r"glue:cola, split train: expected a label in each row"):
        prepare(study_with(hub=COLA), None, tmp_path)


def test_a_named_data_folder_is_never_replaced_by_the_hub(hub: Any, tmp_path: Path) -> None:
    study = study_with(hub=COLA)
    write_files(tmp_path)
    here = prepare(study, tmp_path, tmp_path / "here")
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(
        ConfigError, match=r"found no dev\.tsv; give the files, or no data folder: then the rows"
    ):
        prepare(study, tmp_path, tmp_path / "there")
    with pytest.raises(ConfigError, match=r"reads train\.tsv, dev\.tsv below a data folder"):
        prepare(study, None, tmp_path / "there", fetch=False)  # as a report does, which runs nothing
    assert hub() == []
    there = prepare(study, None, tmp_path / "there")
    assert hub() == ["nyu-mll/glue:cola"]
    assert here["t"].digest != there["t"].digest


def test_results_on_other_rows_are_not_replaced(hub: Any, tmp_path: Path) -> None:
    study = study_with(hub=COLA)
    write_files(tmp_path)
    campaign = Campaign(study, tmp_path / "out", tmp_path)
    task = campaign.next_task()
    assert task is not None
    task.target.parent.mkdir(parents=True)
    done = {"status": "ok", "variant": "pafi", "lr": 1e-3, "seed": 1, "settings": task.settings}
    task.target.write_text(json.dumps(done | {"fingerprint": task.fingerprint}))
    Campaign(study, tmp_path / "out", tmp_path)
    cut = {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    with pytest.raises(ConfigError, match=r"1 results there are of other rows than those that the hub has"):
        Campaign(study, tmp_path / "out", None)
    assert {path: path.read_bytes() for path in cut} == cut  # what runs beside reads them


def test_what_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> DatasetDict:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.delenv("FEDMASK_DATA", raising=False)
    with pytest.raises(
        DataError, match=r"'t': no data folder .* for train\.tsv, dev\.tsv; .*glue:cola.*offline"
    ):
        prepare(study_with(hub=COLA), None, tmp_path)
    with pytest.raises(ConfigError, match=r"text: expected 1 columns, found 2"):
        study_with(hub={"source": "nyu-mll/glue:cola", "text": ["sentence", "other"]})
    with pytest.raises(ConfigError, match=r"a bundled task has none"):
        study_with(name="tweets", train="", reported="", reported_rows=5, hub=COLA)


COLA = {"source": "nyu-mll/glue:cola", "text": ["sentence"]}


def write_files(folder: Path) -> None:
    """The study's own files, with other rows than the hub's."""
    for name in ("train.tsv", "dev.tsv"):
        lines = "".join(f"row {n}\t{n % 2}\n" for n in range(20))
        (folder / name).write_text("text\tlabel\n" + lines)


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
