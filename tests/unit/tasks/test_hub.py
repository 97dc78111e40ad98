"""Hub data sets, with a stand-in for the download."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedmask.config import TaskConfig
from fedmask.errors import DataError
from fedmask.tasks import load_task

CLASSES = Features(
    {"sentence": Value("string"), "label": ClassLabel(names=["no", "yes"]), "idx": Value("int32")}
)


def split(labels: list[int], start: int = 0, features: Features = CLASSES) -> Dataset:
    numbers = list(range(start, start + len(labels)))
    columns = {"sentence": [f"text {n}" for n in numbers], "label": labels, "idx": numbers}
    return Dataset.from_dict({name: columns[name] for name in features}, features)


def task(**settings: Any) -> TaskConfig:
    given = {"source": "nyu-mll/glue:cola", "text": "sentence", "label": "label"} | settings
    return TaskConfig(name="cola", clients=1, **given)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Puts splits on a stand-in hub and records what was asked of it."""
    asked: list[tuple[str | None, ...]] = []

    def serve(**splits: Dataset) -> list[tuple[str | None, ...]]:
        def load_dataset(path: str, name: str | None, *, revision: str | None) -> DatasetDict:
            asked.append((path, name) if revision is None else (path, name, revision))
            return DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def test_an_unlabelled_test_split_does_not_count(hub: Any) -> None:
    asked = hub(train=split([1, 0] * 20), validation=split([1, 0], 1), test=split([-1, -1], 50))
    data = load_task(task())
    assert asked == [("nyu-mll/glue", "cola")]
    assert data.labels == ("no", "yes")
    assert data.test["text"][:] == ["text 1", "text 2"]  # the published validation split is reported
    assert data.dev["text"][:] == [f"text {n}" for n in (0, 4, 5, 7, 30)]
    assert len(data.train) == 35 and data.train.column_names == ["text", "label", "idx"]


@pytest.mark.parametrize(
    "source, path, config",
    [
        ("CogComp/trec@refs/convert/parquet", "CogComp/trec", None),
        ("nyu-mll/glue:cola@refs/convert/parquet", "nyu-mll/glue", "cola"),
    ],
)
def test_a_revision_can_be_named(hub: Any, source: str, path: str, config: str | None) -> None:
    """Data sets that come as a script can be read only as the hub converts them."""
    asked = hub(train=split([1, 0] * 20), validation=split([1, 0], 1))
    load_task(task(source=source))
    assert asked == [(path, config, "refs/convert/parquet")]


@pytest.mark.parametrize("name", ["validation", "dev", "valid", "val"])
def test_all_splits_are_found_by_name(hub: Any, name: str) -> None:
    asked = hub(train=split([1, 0]), **{name: split([0, 0], 10)}, test=split([1], 20))
    data = load_task(task(source="imdb"))
    assert asked == [("imdb", None)]
    assert (data.train["label"][:], data.dev["label"][:], data.test["label"][:]) == ([1, 0], [0, 0], [1])


def test_splits_of_other_names(hub: Any) -> None:
    hub(train=split([1, 0]), validation_matched=split([0], 10), validation_mismatched=split([1], 20))
    data = load_task(task(dev="validation_matched", test="validation_mismatched"))
    assert (data.dev["text"][:], data.test["text"][:]) == (["text 10"], ["text 20"])
    with pytest.raises(
        DataError, match="unknown split 'validation_match'; the nearest is 'validation_matched'"
    ):
        load_task(task(dev="validation_match"))


def test_labels_that_are_no_classes(hub: Any) -> None:
    plain = Features({"sentence": Value("string"), "label": Value("int64")})
    hub(train=split([7, 10] * 20, features=plain), test=split([7, 10], 50, plain))
    assert load_task(task()).labels == ("7", "10")


def test_a_label_outside_the_classes_is_missing(hub: Any) -> None:
    hub(train=split([1, 0, -1]), test=split([1, 0], 50))
    with pytest.raises(
        DataError, match="split train: expected a label in column 'label', found none in row 3"
    ):
        load_task(task())


def test_no_train_split(hub: Any) -> None:
    hub(test=split([1, 0]))
    with pytest.raises(DataError, match="unknown split 'train'"):
        load_task(task())


def test_no_such_column(hub: Any) -> None:
    hub(train=split([1, 0] * 20))
    with pytest.raises(DataError, match="unknown column 'sentences'; the nearest is 'sentence'"):
        load_task(task(text="sentences"))


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None, *, revision: str | None) -> None:
        raise ConnectionError("no route\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"hub data set imdb: .*ConnectionError: no route; check the name"
    ) as caught:
        load_task(task(source="imdb"))
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize("source", ["a b", "x:y:z", "owner/rows:"])
def test_what_is_neither_file_nor_name(source: str) -> None:
    with pytest.raises(DataError, match=r"expected a file .* or a hub name as owner/name"):
        load_task(task(source=source))
