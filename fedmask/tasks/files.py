"""Local CSV, TSV, JSON, JSON Lines and Parquet files as tables.

Each call reads the file anew: there is no cache that could serve an older version of it. Delimited
files are read as text, so a label ``01``, a text ``NA`` and a text of digits stay what they are.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmask.config import FILE_ENDINGS
from fedmask.errors import DataError
from fedmask.tasks.table import Table, table_of


def read_file(path: Path) -> Table:
    """The table in ``path``; the ending chooses the format (see ``SUFFIXES``).

    ``.csv`` follows the usual quoting with ``"``. ``.tsv`` knows no quoting at all, as in GLUE: a
    tab always ends a field, a line end always ends a row, and quotes are part of the text.
    ``.jsonl`` and ``.json`` hold one object a line, or one array of objects. Raises DataError.
    """
    where, endings = f"file {path}", ", ".join(SUFFIXES)
    if path.is_dir():
        raise DataError(f"{where}: expected a file, found a folder there; name a file in it ({endings})")
    reader = SUFFIXES.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{where}: expected a name ending in {endings}, found {path.suffix!r}; convert the file to one"
            f" of these"
        )
    if not path.is_file():
        raise DataError(
            f"{where}: expected a file, found nothing there; check the name (relative ones start at the"
            f" folder that you are in)"
        )
    try:
        return reader(path, where)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x} at {error.start}"
            f" of a block; convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from None


def read_delimited(path: Path, where: str, delimiter: str, quoted: bool, errors: str = "strict") -> Table:
    """A delimited file with a header line. ``errors`` is Python's rule for bytes that are no UTF-8."""
    with _long_fields(), path.open(newline="", encoding="utf-8-sig", errors=errors) as handle:
        reader = csv.reader(
            handle,
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            header = next((row for row in reader if any(field.strip() for field in row)), [])
            other = next((mark for mark in _DELIMITERS if len(header) == 1 and mark in header[0]), None)
            if other is not None:
                raise DataError(
                    f"{where}: expected fields separated by {_DELIMITERS[delimiter]}, found a header with"
                    f" {_DELIMITERS[other]}s instead; save it as .csv with commas or as .tsv with tabs"
                )
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise DataError(f"{where}: expected one column of each name, found {repeated[0]!r} twice")
            rows = [row for row in _checked(reader, header, where) if row]
        except csv.Error as error:
            raise DataError(f"{where}: line {reader.line_num} cannot be read ({error})") from None
    columns = zip(*rows, strict=True) if rows else ((),) * len(header)
    return Table(where, dict(zip(header, columns, strict=True)))


_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}


def _checked(reader: Iterable[list[str]], header: list[str], where: str) -> Iterator[list[str]]:
    for number, row in enumerate(reader, start=1):
        if row and len(row) != len(header):
            raise DataError(
                f"{where}: expected {len(header)} fields in each row as in the header,"
                f" found {len(row)} in data row {number}"
            )
        yield row


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the csv module's limit of 131,072 characters a field, which is a global setting."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_csv(path: Path, where: str) -> Table:
    return read_delimited(path, where, ",", quoted=True)


def _read_tsv(path: Path, where: str) -> Table:
    return read_delimited(path, where, "\t", quoted=False)


def _read_json(path: Path, where: str) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    rows = _array(text, where) if text.lstrip().startswith("[") else _lines(text, where)
    names: dict[str, None] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object in each row, found {_kind(row)} in row {number}")
        names.update(dict.fromkeys(row))
    return Table(where, {name: [row.get(name) for row in rows] for name in names})


def _array(text: str, where: str) -> list[dict[str, object]]:
    try:
        rows: list[dict[str, object]] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: line {error.lineno} is no JSON ({error.msg})") from None
    return rows


def _lines(text: str, where: str) -> list[dict[str, object]]:
    rows = []
    # Not splitlines(): it also splits at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: expected one JSON object a line, or one array of objects;"
                    f" line {number} is no JSON ({error.msg})"
                ) from None
    return rows


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)


def _read_parquet(path: Path, where: str) -> Table:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{where}: expected a Parquet file ({str(error).splitlines()[0]})") from None
    return table_of(Dataset(InMemoryTable(table)), where)


_READERS = (_read_csv, _read_tsv, _read_json, _read_json, _read_parquet)
SUFFIXES: dict[str, Callable[[Path, str], Table]] = dict(zip(FILE_ENDINGS, _READERS, strict=True))
