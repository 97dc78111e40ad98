"""Data sets of the Hugging Face hub, through ``datasets.load_dataset`` and its ordinary cache."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fedmask.config import TaskConfig
from fedmask.errors import DataError, unknown
from fedmask.tasks.splits import Split
from fedmask.tasks.table import Table, table_of

# owner/name or name, and after a colon the configuration: nyu-mll/glue:cola
_NAME = re.compile(r"(?P<path>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")
_DEV_NAMES = ("validation", "dev", "valid", "val")


def hub_tables(task: TaskConfig) -> dict[Split, Table]:
    """The labelled splits of the hub data set ``task.source`` (``owner/name`` or ``owner/name:config``).

    ``train`` must exist. dev is the split ``task.dev`` if set, else validation, dev, valid or val;
    test is ``task.test`` if set, else test, and counts only when it has labels (published test
    splits often hold -1 throughout). Raises DataError.
    """
    found = _NAME.fullmatch(task.source)
    if found is None:
        raise DataError(
            f"source {task.source!r}: expected a file (.csv, .tsv, .jsonl, .json, .parquet) or a hub name"
            f" as owner/name or owner/name:config"
        )
    where = f"hub data set {task.source}"
    splits = _download(found["path"], found["config"], where)
    chosen: dict[Split, str] = {"train": "train"}
    dev = task.dev or next((name for name in _DEV_NAMES if name in splits), "")
    test = task.test or ("test" if "test" in splits else "")
    chosen |= {"dev": dev} if dev else {}
    chosen |= {"test": test} if test else {}
    for name in chosen.values():
        if name not in splits:
            raise DataError(f"{where}: {unknown('split', name, splits)}")
    tables = {split: table_of(splits[name], f"{where}, split {name}") for split, name in chosen.items()}
    if "test" in tables and not task.test and not _has_labels(tables["test"], task.label):
        del tables["test"]
    return tables


def _download(path: str, config: str | None, where: str) -> dict[str, object]:
    import datasets

    try:
        loaded = datasets.load_dataset(path, config)
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
