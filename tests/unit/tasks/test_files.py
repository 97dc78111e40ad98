"""Local files: what each format keeps as it is, and the one line for what is wrong with a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from fedmask.errors import DataError
from fedmask.tasks.files import read_delimited, read_file

ROWS = {"text": ['she said "no"', "NA", "007"], "label": ["01", "2", "1"]}


def test_csv_reads_quoted_fields_and_keeps_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"she said ""no""",01\nNA,2\n007,1\n')
    assert columns(path) == ROWS


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'text\tlabel\r\nshe said "no"\t01\r\n" half a quote\t2\r\n')
    assert columns(path) == {"text": ['she said "no"', '" half a quote'], "label": ["01", "2"]}


def test_byte_order_mark_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\na,1\n\nb,2\n\n")
    assert columns(path) == {"text": ["a", "b"], "label": ["1", "2"]}


def test_csv_keeps_line_ends_inside_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\n"one\ntwo, three",x\n')
    assert columns(path) == {"text": ["one\ntwo, three"], "label": ["x"]}


@given(st.lists(st.tuples(st.text(), st.text()).map(list), min_size=1, max_size=8))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, quoting=csv.QUOTE_ALL).writerows([["text", "label"], *rows])
    assert columns(path) == {"text": [row[0] for row in rows], "label": [row[1] for row in rows]}


def test_long_fields_are_read_and_the_global_limit_is_left_alone(tmp_path: Path) -> None:
    path, before = tmp_path / "a.tsv", csv.field_size_limit()
    path.write_text("text\tlabel\n" + "x" * (before + 1) + "\t1\n")
    assert len(columns(path)["text"][0]) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("shape", ["lines", "array"])
def test_json_as_lines_or_as_one_array(tmp_path: Path, name: str, shape: str) -> None:
    path = tmp_path / name
    rows = [{"text": "one\u2028two", "label": 1}, {"text": "2020-01-01", "label": 2, "more": None}]
    if shape == "array":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    expected = {"text": ["one\u2028two", "2020-01-01"], "label": [1, 2], "more": [None, None]}
    assert columns(path) == expected


def test_parquet_keeps_class_names_and_leaves_out_nested_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["bad", "good"]), "parts": [Value("int64")]}
    )
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "parts": [[1], [2]]}, features).to_parquet(path)
    table = read_file(path)
    assert {name: list(values) for name, values in table.columns.items()} == {
        "text": ["a", "b"],
        "label": [1, 0],
    }
    assert table.classes == {"label": ("bad", "good")}


def test_a_changed_file_is_never_served_stale(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        path = tmp_path / name
        for text in ("first", "other"):  # of equal length, so that size alone cannot tell them apart
            write(path, text)
            assert columns(path)["text"] == [text]


WRITERS: dict[str, Callable[[Path, str], object]] = {
    "a.csv": lambda path, text: path.write_text(f"text,label\n{text},1\n"),
    "a.tsv": lambda path, text: path.write_text(f"text\tlabel\n{text}\t1\n"),
    "a.jsonl": lambda path, text: path.write_text(json.dumps({"text": text, "label": 1})),
    "a.parquet": lambda path, text: Dataset.from_dict({"text": [text], "label": [1]}).to_parquet(path),
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na,1\nb\n", "expected 2 fields in each row .* found 1 in data row 2"),
        ("a.tsv", b"text\tlabel\na\tb\t1\n", "expected 2 fields in each row .* found 3 in data row 1"),
        ("a.csv", b'text,label\n"open,1\n', "cannot be read .*unexpected end of data"),
        ("a.csv", b"text,text\na,1\n", "one column of each name, found 'text' twice"),
        ("a.csv", b"text,label\n\xff,1\n", "expected UTF-8 text, found byte 0xff"),
        ("a.json", b'[{"text": "a"},\n {"text": ]', "line 2 is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n["a"]\n', "expected an object in each row, found an array in row 2"),
        ("a.parquet", b"nothing of the kind", "expected a Parquet file"),
        (
            "a.csv",
            b"text;label\na, b;1\n",
            "separated by comma, found a header with semicolons instead; save",
        ),
        ("a.tsv", b"text,label\na\t1\n", "separated by tab, found a header with commas instead; save"),
        ("a.xlsx", b"PK", r"expected a name ending in \.csv, .*found '\.xlsx'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_blank_lines_before_the_header_do_not_count(tmp_path: Path) -> None:
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(f"\n \n\ntext{mark}label\none{mark}1\n\ntwo{mark}2\n")
        assert columns(tmp_path / name) == {"text": ["one", "two"], "label": ["1", "2"]}


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a file, found nothing there"):
        read_file(tmp_path / "a.csv")
    with pytest.raises(DataError, match="expected a file, found a folder there"):
        read_file(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        read_file(path)


def test_other_decoding_rules_are_for_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n\xff\n")
    table = read_delimited(path, "file", ",", quoted=True, errors="replace")
    assert list(table.columns["text"]) == ["\ufffd"]


def columns(path: Path) -> dict[str, list[object]]:
    """The columns of a file as lists."""
    return {name: list(values) for name, values in read_file(path).columns.items()}
