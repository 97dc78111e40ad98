"""Data sets of the Hugging Face hub, through ``datasets.load_dataset`` and its ordinary cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fedmask.config import TaskConfig
from fedmask.errors import DataError, unknown
from fedmask.tasks.splits import Split
from fedmask.tasks.table import Table, table_of

if TYPE_CHECKING:
    from datasets import Dataset

# owner/name or name, a configuration after a colon, a revision after an @ (its name may have slashes)
_NAME = re.compile(r"(?P<path>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
_DEV_NAMES = ("validation", "dev", "valid", "val")


def hub_tables(task: TaskConfig) -> dict[Split, Table]:
    """The labelled splits of the hub data set ``task.source``: ``owner/name``, ``owner/name:config``,
    ``owner/name@revision``.

    ``train`` must exist. dev is the split ``task.dev`` if set, else validation, dev, valid or val;
    test is ``task.test`` if set, else test, and counts only when it has labels (published test
    splits often hold -1 throughout). Raises DataError.
    """
    splits = _splits(task.source)
    chosen: dict[Split, str] = {"train": "train"}
    dev = task.dev or next((name for name in _DEV_NAMES if name in splits), "")
    test = task.test or ("test" if "test" in splits else "")
    chosen |= {"dev": dev} if dev else {}
    chosen |= {"test": test} if test else {}
    tables = {split: _table(task.source, splits, name) for split, name in chosen.items()}
    if "test" in tables and not task.test and not _has_labels(tables["test"], task.label):
        del tables["test"]
    return tables


def hub_table(source: str, split: str) -> Table:
    """One split of a hub data set, named as in ``hub_tables``. Raises DataError."""
    return _table(source, _splits(source), split)


def _splits(source: str) -> dict[str, Dataset]:
    found = _NAME.fullmatch(source)
    if found is None:
        raise DataError(
            f"source {source!r}: expected a file (.csv, .tsv, .jsonl, .json, .parquet) or a hub name"
            f" as owner/name, owner/name:config or owner/name@revision"
        )
    return _download(found["path"], found["config"], found["revision"], _where(source))


def _where(source: str) -> str:
    return f"hub data set {source}"


def _table(source: str, splits: dict[str, Dataset], name: str) -> Table:
    if name not in splits:
        raise DataError(f"{_where(source)}: {unknown('split', name, splits)}")
    return table_of(splits[name], f"{_where(source)}, split {name}")


def _download(path: str, config: str | None, revision: str | None, where: str) -> dict[str, Dataset]:
    import datasets

    try:
        loaded = datasets.load_dataset(path, config, revision=revision)
    except Exception as error:
        # The hub's client raises errors of several libraries; to the user they all mean the same.
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{where}: expected a data set that can be loaded, found {type(error).__name__}: {reason};"
            f" check the name and the connection, or give a local file"
        ) from error
    return dict(loaded)


def _has_labels(table: Table, label: str) -> bool:
    values: Iterable[object] = table.columns.get(label, ())
    return any(value is not None and value != -1 for value in values)
