"""From a file to train, dev and test with labels."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmask.config import TaskConfig
from fedmask.errors import DataError
from fedmask.tasks import TaskData, load_task, split_of

Write = Callable[..., TaskConfig]


def csv_of(labels: list[str], start: int = 0) -> str:
    """Rows "text 0", "text 1", ... of which 0, 4, 5, 7, 30 hash to dev and 8, 10, 26, 32, 36 to test."""
    rows = "".join(f"text {start + number},{label}\n" for number, label in enumerate(labels))
    return "text,label\n" + rows


def rows(data: TaskData) -> dict[str, list[str]]:
    return {split: getattr(data, split)["text"][:] for split in ("train", "dev", "test")}


def test_one_file_is_carved_into_three(task_file: Write) -> None:
    data = load_task(task_file("a.csv", csv_of(["bad", "good"] * 20)))
    found = rows(data)
    assert found["dev"] == [f"text {n}" for n in (0, 4, 5, 7, 30)]
    assert found["test"] == [f"text {n}" for n in (8, 10, 26, 32, 36)]
    assert len(found["train"]) == 30
    assert (data.name, data.kind, data.labels) == ("mood", "classification", ("bad", "good"))
    assert data.dev["label"][:] == [0, 0, 1, 1, 0]


def test_published_splits_stay_and_only_dev_is_carved(task_file: Write, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(csv_of(["good", "bad"], start=1))
    data = load_task(task_file("a.csv", csv_of(["bad", "good"] * 20), test=str(tmp_path / "test.csv")))
    found = rows(data)
    assert found["test"] == ["text 1", "text 2"]
    assert found["dev"] == [f"text {n}" for n in (0, 4, 5, 7, 30)]
    assert len(found["train"]) == 35


def test_a_lone_dev_file_is_the_one_reported(task_file: Write, tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text(csv_of(["good", "bad"], start=1))
    data = load_task(task_file("a.csv", csv_of(["bad", "good"] * 20), dev=str(tmp_path / "dev.csv")))
    assert rows(data)["test"] == ["text 1", "text 2"]
    assert rows(data)["dev"] == [f"text {n}" for n in (0, 4, 5, 7, 30)]


def test_three_files_are_used_as_they_are(task_file: Write, tmp_path: Path) -> None:
    paths = {split: str(tmp_path / f"{split}.csv") for split in ("dev", "test")}
    for split, path in paths.items():
        Path(path).write_text(csv_of(["good"], start=len(split)))
    data = load_task(task_file("a.csv", csv_of(["bad", "good"]), **paths))
    assert rows(data) == {"train": ["text 0", "text 1"], "dev": ["text 3"], "test": ["text 4"]}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["b", "a", "10"], ("10", "a", "b")),
        ([" b", "b ", "a"], ("a", "b")),
    ],
)
def test_labels_are_sorted(task_file: Write, labels: list[str], names: tuple[str, ...]) -> None:
    assert load_task(task_file("a.csv", csv_of(labels * 14))).labels == names


def test_numbers_and_strings_of_json_give_the_same_labels(task_file: Write) -> None:
    values = [1, "1", 1.0, 0, 0.0, "0"] * 7
    content = "\n".join(json.dumps({"text": f"text {n}", "label": value}) for n, value in enumerate(values))
    assert load_task(task_file("a.jsonl", content)).labels == ("0", "1")


def test_pairs_and_other_columns_are_kept(task_file: Write) -> None:
    lines = "".join(f"left {n}\tright {n}\t{n % 2}\t{'web' if n % 3 else ''}\n" for n in range(60))
    task = task_file("a.tsv", "premise\ttext\ty\tsite\n" + lines, text=("premise", "text"), label="y")
    data = load_task(task)
    assert data.train.column_names == ["text", "text_pair", "label", "site"]
    assert data.dev[0]["text_pair"] == data.dev[0]["text"].replace("left", "right")
    assert {split_of(row["text"], row["text_pair"]) for row in data.test} == {"test"}
    assert set(data.train["site"][:]) == {"web", None}


def test_spearman_makes_a_regression(task_file: Write) -> None:
    data = load_task(task_file("a.csv", csv_of(["0.5", "3"] * 20), metric="spearman"))
    assert (data.kind, data.labels) == ("regression", ())
    assert data.dev["label"][:] == [0.5, 0.5, 3.0, 3.0, 0.5]
    assert data.train.features["label"].dtype == "float64"


def test_half_a_surrogate_pair_is_replaced(task_file: Write) -> None:
    content = "\n".join(f'{{"text": "text {n} \\ud83d", "label": {n % 2}}}' for n in range(60))
    assert load_task(task_file("a.jsonl", content)).train[0]["text"].endswith(" ?")


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("text,label\n", {}, "expected rows, found none"),
        ("text,label\na,1\n", {"text": "tekst"}, "unknown column 'tekst'; the nearest is 'text'"),
        ("text,label\na,1\n", {"label": "labels"}, "unknown column 'labels'; the nearest is 'label'"),
        ("text,label\na,1\n ,0\n", {}, "expected text in column 'text', found none in row 2"),
        ("text,label\na,1\nb,\n", {}, "expected a label in column 'label', found none in row 2"),
        ("text,label\na,1\nb,1\n", {}, "expected two labels or more, found only '1'"),
        ("text,label\na,1\nb,2\n", {}, "2 rows are too few to carve dev from"),
        ("text,label\na,1\nb,x\n", {"metric": "spearman"}, "a number in column 'label', found 'x' in row 2"),
        ("text,label\na,1\nb,inf\n", {"metric": "spearman"}, "found 'inf' in row 2"),
        ("text,label\na,1\nb,2\nc,3\n", {"metric": "f1"}, "f1 is for two labels .* found 3"),
        ("text,label\na,4\nb,3.5\nc,3\n", {}, "such as 3.5; metric spearman .*whole numbers or words"),
    ],
)  # fmt: skip
def test_bad_rows(task_file: Write, content: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_task(task_file("a.csv", content, **settings))
    assert str(caught.value).startswith("task 'mood': ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", "found the number 0.5 in row 2; metric spearman reads"),
        ("null", "expected a label in column 'label', found none in row 2"),
        ("NaN", "expected a label in column 'label', found none in row 2"),
    ],
)
def test_bad_labels_of_json(task_file: Write, value: str, message: str) -> None:
    content = f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {value}}}'
    with pytest.raises(DataError, match=message):
        load_task(task_file("a.jsonl", content))


def test_a_list_is_no_text(task_file: Write) -> None:
    with pytest.raises(DataError, match="expected text in column 'text', found a list in row 1"):
        load_task(task_file("a.jsonl", '{"text": ["a"], "label": 1}'))


def test_labels_that_train_does_not_have(task_file: Write, tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text(csv_of(["good", "fine"]))
    with pytest.raises(
        DataError, match=r"dev\.csv: expected the labels of train \(bad, good\), found 'fine'"
    ):
        load_task(task_file("a.csv", csv_of(["bad", "good"] * 20), dev=str(tmp_path / "dev.csv")))


def test_words_among_numbers_and_whole_numbers_with_a_point_stay_classes(task_file: Write) -> None:
    assert load_task(task_file("a.csv", csv_of(["3.5", "unknown"] * 20))).labels == ("3.5", "unknown")
    assert load_task(task_file("b.csv", csv_of(["1.0", "2.0"] * 20))).labels == ("1.0", "2.0")


@pytest.mark.parametrize(
    "source",
    ["rows.txt", "data/train.txt.gz", "../x/y", "./rows", "a/b/c", "~/rows", "folder/rows", "folder"],
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"\.csv, \.tsv, \.jsonl, \.json, \.parquet") as caught:
        load_task(TaskConfig(name="own", source=source, text="text", label="label", clients=1))
    assert "hub" not in str(caught.value)


def test_missing_files_are_named(task_file: Write, tmp_path: Path) -> None:
    task = task_file("a.csv", csv_of(["bad", "good"] * 20), dev=str(tmp_path / "no.csv"))
    with pytest.raises(DataError, match=r"^task 'mood': file .*no\.csv: expected a file, found nothing"):
        load_task(task)


def test_importing_tasks_leaves_the_data_libraries_alone() -> None:
    code = "import sys, fedmask.tasks; print(sorted({'datasets', 'flwr_datasets'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
