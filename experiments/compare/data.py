"""A study's rows: cut once by a fixed rule into those that train, that choose, and that are reported.

The cut depends on the task's name and the table alone, never on a run's seed: all seeds and methods see
the same rows. The files it writes are what the runs read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.compare.study import HubRows, Study, StudyTask
from fedmask.errors import ConfigError, DataError, unknown
from fedmask.rng import rng_for
from fedmask.tasks.bundled import BUNDLED, bundled_table
from fedmask.tasks.files import read_file
from fedmask.tasks.hub import hub_table
from fedmask.tasks.table import Table

ENVIRONMENT = "FEDMASK_DATA"
SPLITS = ("train", "validation", "reported")


@dataclass(frozen=True)
class Prepared:
    """One task's three files, and the SHA-256 (hex, 16 characters) over their contents."""

    files: Mapping[str, Path]
    digest: str


def data_folder(given: Path | None) -> Path | None:
    """The folder of the studies' data: ``--data``, else the environment variable ``FEDMASK_DATA``."""
    named = os.environ.get(ENVIRONMENT)
    return given or (Path(named).expanduser() if named else None)


def prepare(study: Study, data: Path | None, out: Path, *, fetch: bool = True) -> dict[str, Prepared]:
    """Write the files of all tasks into ``out`` (equal ones stay). Raises ConfigError and DataError.

    ``data``: the folder that the study's file names start at; bundled tasks need none. Without it the rows
    come from the Hugging Face hub, unless not to ``fetch``.
    """
    _check_files(study, data, fetch)
    out.mkdir(parents=True, exist_ok=True)
    return {task.name: _prepare(task, data, out) for task in study.tasks}


def from_hub(study: Study, data: Path | None) -> bool:
    """Whether some of the rows come from the hub, whose order (and with it the cut) is not the files'."""
    return data is None and any(task.hub is not None for task in study.tasks)


def _check_files(study: Study, data: Path | None, fetch: bool) -> None:
    """All that is missing in one message, so that nobody is told piece by piece."""
    for task in study.tasks:
        if not task.train and task.name not in BUNDLED:
            raise ConfigError(f"{unknown('bundled task', task.name, BUNDLED)}; else name its files")
    named = [task for task in study.tasks if task.train]
    if data is None:
        lacking = [task for task in named if task.hub is None or not fetch]
        where = f"study {study.name!r} reads {{}} below a data folder: name it by --data or {ENVIRONMENT}"
    else:
        lacking = [task for task in named if not all((data / name).is_file() for name in _files(task))]
        where = f"data folder {data}: found no {{}}"
    if lacking:
        files = [name for task in lacking for name in _files(task)]
        files = [name for name in files if data is None or not (data / name).is_file()]
        raise ConfigError(f"{where.format(_list(files))}; {_advice(lacking, data)}")


def _files(task: StudyTask) -> tuple[str, str]:
    return task.train, task.reported


def _advice(lacking: Sequence[StudyTask], data: Path | None) -> str:
    made = dict.fromkeys(f"{Path(task.train).parent}: {task.fetch}" for task in lacking if task.fetch)
    if made:
        return f"to make: {_list(list(made))}"
    if data is not None and all(task.hub is not None for task in lacking):
        return "give the files, or no data folder: then the rows are fetched from the Hugging Face hub"
    return "give the files"


def _list(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:6]) + (f" and {len(unique) - 6} more" if len(unique) > 6 else "")


def _tables(task: StudyTask, data: Path | None) -> tuple[Table, Table]:
    """The table that is cut, and the one of the reported rows (the same for a bundled task)."""
    if not task.train:
        bundled = bundled_table(task.name)
        return bundled, bundled
    if data is not None:
        return read_file(data / task.train), read_file(data / task.reported)
    assert task.hub is not None  # checked above
    try:
        return _from_hub(task, task.hub, task.hub.train), _from_hub(task, task.hub, task.hub.reported)
    except DataError as error:
        raise DataError(
            f"task {task.name!r}: no data folder (--data or {ENVIRONMENT}) for {_list(_files(task))}; {error}"
        ) from None


def _from_hub(task: StudyTask, hub: HubRows, split: str) -> Table:
    """A split under the study's names of columns. Classes stay numbers: their order is the hub's."""
    found = hub_table(hub.source, split)
    there = dict(
        zip((*task.text, task.label), (*(hub.text or task.text), hub.label or task.label), strict=True)
    )
    columns = dict(found.columns) | {name: found.column(other) for name, other in there.items()}
    classes = found.classes.get(there[task.label])
    if classes is not None and not set(columns[task.label]) <= set(range(len(classes))):
        raise DataError(f"{found.where}: expected a label in each row, found rows without one (often -1)")
    return Table(found.where, columns)


def _prepare(task: StudyTask, data: Path | None, out: Path) -> Prepared:
    table, other = _tables(task, data)
    rows = _chosen(task, table, "train")
    wanted = task.train_rows + task.validation_rows
    if not task.train:
        wanted += task.reported_rows or 0
    if len(rows) < wanted:
        raise DataError(
            f"task {task.name!r}: expected {wanted} rows to cut, found {len(rows)} in {table.where}"
        )
    parts = {"train": rows[: task.train_rows], "validation": rows[task.train_rows :][: task.validation_rows]}
    if task.train:
        parts["reported"] = _chosen(task, other, "reported")[: task.reported_rows]
    else:
        parts["reported"] = rows[task.train_rows + task.validation_rows : wanted]
    files, sha = {}, hashlib.sha256()
    for split, chosen in parts.items():
        text = _lines(task, other if split == "reported" else table, np.sort(chosen))
        sha.update(text.encode())
        files[split] = out / f"{task.name}.{split}.jsonl"
        _write(files[split], text)
    return Prepared(files, sha.hexdigest()[:16])


def _chosen(task: StudyTask, table: Table, part: str) -> np.ndarray:
    """Row numbers (int64) that ``where`` lets through, in a random order of the task's own."""
    keep = np.ones(len(table), dtype=bool)
    for column, value in task.where.items():
        keep &= np.array([str(found) == value for found in table.column(column)], dtype=bool)
    if not keep.any():
        raise DataError(f"task {task.name!r}: {table.where}: found no row where {task.where}")
    rows = np.flatnonzero(keep)
    return rng_for(0, -1, -1, f"study/{task.name}/{part}").permutation(rows)


def _lines(task: StudyTask, table: Table, rows: np.ndarray) -> str:
    names = [*task.text, task.label]
    if task.partition is not None and task.partition.column:
        names.append(task.partition.column)
    columns: dict[str, Sequence[Any]] = {name: table.column(name) for name in names}
    return "".join(
        json.dumps({name: columns[name][row] for name in names}, ensure_ascii=False) + "\n"
        for row in rows.tolist()
    )


def _write(path: Path, text: str) -> None:
    """Write unless it is there: another process may be reading it."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    part = path.with_name(path.name + f".{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
