"""A task's data in train, dev and test, from packages, local files or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedmask.config import TaskConfig
from fedmask.errors import ConfigError, DataError, unknown
from fedmask.tasks.bundled import BUNDLED, bundled_table
from fedmask.tasks.columns import LABEL, TEXT, TEXT_PAIR, Rows, class_names, rows_of
from fedmask.tasks.files import read_file
from fedmask.tasks.hub import hub_tables
from fedmask.tasks.splits import Split, carve, half_of
from fedmask.tasks.table import Table

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class TaskData:
    """One task, ready to be dealt to clients.

    ``labels`` are the class names, their position being the class id: sorted as numbers where all
    are whole numbers, else as text; a hub data set keeps its own order. A regression has none.
    Each split is an in-memory ``datasets.Dataset`` with columns ``text`` (str), ``text_pair`` (str,
    for pairs), ``label`` (int64 class id, or float64) and the source's other plain columns as str.
    """

    name: str
    kind: Literal["classification", "regression"]
    labels: tuple[str, ...]
    metric: str
    train: Dataset
    dev: Dataset
    test: Dataset


def load_task(task: TaskConfig) -> TaskData:
    """Reads a bundled task, a local file or a hub data set, and splits it.

    Splits that the source has are used as published. What is missing is carved out of train by the
    fixed rule of ``fedmask.tasks.splits``: dev and test when there is train alone, dev when there
    are train and test. A source with train and dev alone has its dev reported as ``test``, and the
    ``dev`` that may choose a learning rate or a round is carved: the split that chooses is never
    the one that is reported. The metric ``spearman`` makes the task a regression. Raises DataError
    (ConfigError for an unknown bundled name).
    """
    try:
        return _build(task, _tables(task))
    except DataError as error:
        raise DataError(f"task {task.name!r}: {error}") from error.__cause__


def _tables(task: TaskConfig) -> dict[Split, Table]:
    if task.own_data:
        tables: dict[Split, Table] = {"dev": read_file(Path(task.dev).expanduser())}
        return tables | ({"test": read_file(Path(task.test).expanduser())} if task.test else {})
    if not task.source:
        if task.name not in BUNDLED:
            raise ConfigError(
                f"{unknown('bundled task', task.name, BUNDLED)};"
                f" for data of your own give the task a source, text and label columns"
            )
        if task.dev or task.test:
            raise ConfigError(f"task {task.name!r} is bundled and has its own splits: leave dev and test out")
        return {"train": bundled_table(task.name)}
    if not task.is_local:
        return hub_tables(task)
    path = Path(task.source).expanduser()
    tables = {"train": read_file(path)}
    if task.dev:
        tables["dev"] = read_file(Path(task.dev).expanduser())
    if task.test:
        tables["test"] = read_file(Path(task.test).expanduser())
    return tables


def _build(task: TaskConfig, tables: Mapping[Split, Table]) -> TaskData:
    regression = task.metric == "spearman"
    parts = {split: rows_of(task, table, regression=regression) for split, table in tables.items()}
    if task.own_data:
        names = task.labels
    else:
        declared = tables["train"].classes.get(task.label or LABEL)
        names = () if regression else class_names(parts["train"], declared)
    if task.metric == "f1" and len(names) != 2:
        raise DataError(
            f"metric f1 is for two labels (the second one counts as positive), found {len(names)};"
            f" use accuracy or matthews"
        )
    for part in parts.values():
        if not regression:
            refuse_labels(part, names, "the task's labels" if task.own_data else "the labels of train")
    parts = _halved(parts) if task.own_data else _completed(parts)
    return TaskData(
        task.name,
        "regression" if regression else "classification",
        names,
        task.metric,
        train=dataset_of(parts["train"], names),
        dev=dataset_of(parts["dev"], names),
        test=dataset_of(parts["test"], names),
    )


def _completed(parts: Mapping[Split, Rows]) -> dict[Split, Rows]:
    """All three splits: published ones as they are, the others carved out of train."""
    whole, done = parts["train"], dict(parts)
    if "dev" in done and "test" not in done:
        done["test"] = done.pop("dev")
    wanted: list[Split] = [split for split in ("dev", "test") if split not in done]
    if wanted:
        for split, rows in carve(whole.texts, whole.pairs, wanted).items():
            if not rows:
                raise DataError(
                    f"{whole.where}: {len(whole.texts)} rows are too few to carve {split} from"
                    f" (a tenth is dev and a tenth is test, by a hash of the text); give files for both"
                )
            done[split] = whole.select(rows)
    return done


def _halved(parts: Mapping[Split, Rows]) -> dict[Split, Rows]:
    """No train rows, the server's own dev rows, and its test rows: where it has none, half of the dev rows.

    A text's hash decides, so that the half that chooses is never the one that is reported.
    """
    dev = parts["dev"]
    done: dict[Split, Rows] = {"train": dev.select([]), **parts}
    if "test" not in parts:
        pairs: Sequence[str | None] = dev.pairs or [None] * len(dev.texts)
        halves: tuple[list[int], list[int]] = ([], [])
        for row, (text, pair) in enumerate(zip(dev.texts, pairs, strict=True)):
            halves[half_of(text, pair)].append(row)
        if not all(halves):
            raise DataError(
                f"{dev.where}: {len(dev.texts)} rows are too few for dev and test; give two files"
            )
        done["dev"], done["test"] = (dev.select(half) for half in halves)
    return done


def refuse_labels(rows: Rows, names: tuple[str, ...], whose: str) -> None:
    """DataError with both lists if ``rows`` have a label that is none of ``names``."""
    found = sorted({str(label) for label in rows.labels})
    new = sorted(set(found) - set(names))
    if new:
        raise DataError(
            f"{rows.where}: expected {whose} ({', '.join(names)}), found {', '.join(map(repr, new[:5]))}"
            f" (the file's labels: {', '.join(found[:20])}{', ...' if len(found) > 20 else ''})"
        )


def dataset_of(rows: Rows, names: tuple[str, ...]) -> Dataset:
    """The rows as a data set, labels as their numbers in ``names`` (float64 values where there are none)."""
    from datasets import Dataset, Features, Value

    ids = {name: number for number, name in enumerate(names)}
    columns: dict[str, Sequence[object]] = {TEXT: rows.texts}
    types = {TEXT: Value("string")}
    if rows.pairs is not None:
        columns[TEXT_PAIR], types[TEXT_PAIR] = rows.pairs, Value("string")
    columns[LABEL] = [ids[str(label)] for label in rows.labels] if names else rows.labels
    types[LABEL] = Value("int64" if names else "float64")
    columns |= rows.extras
    types |= dict.fromkeys(rows.extras, Value("string"))
    return Dataset.from_dict(columns, features=Features(types))
