"""From raw columns to texts and labels: what each row must have, and the error when it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmask.config import TaskConfig
from fedmask.errors import DataError
from fedmask.tasks.table import Table

# The columns of every data set that fedmask builds, whatever they were called at the source.
TEXT, TEXT_PAIR, LABEL = "text", "text_pair", "label"


@dataclass(frozen=True)
class Rows:
    """One split with known meaning. ``labels`` are class names, or numbers for a regression.

    ``extras`` are the source's other columns as text; None is a missing value.
    """

    where: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[str] | list[float]
    extras: dict[str, list[str | None]]

    def select(self, rows: Sequence[int]) -> Rows:
        """The given rows, in the given order."""
        return Rows(
            self.where,
            [self.texts[row] for row in rows],
            None if self.pairs is None else [self.pairs[row] for row in rows],
            [self.labels[row] for row in rows],  # type: ignore[arg-type]  # one kind in, the same kind out
            {name: [values[row] for row in rows] for name, values in self.extras.items()},
        )


def rows_of(task: TaskConfig, table: Table, *, regression: bool) -> Rows:
    """Reads the task's text and label columns (``text`` and ``label`` if it names none).

    Raises DataError for no rows, a missing column, a blank text, and a label that is missing or of a
    wrong kind.
    """
    columns, label = task.text or (TEXT,), task.label or LABEL
    if not len(table):
        raise DataError(f"{table.where}: expected rows, found none")
    texts, *others = [_texts(table, name) for name in columns]
    taken = {*columns, label, TEXT, TEXT_PAIR, LABEL}
    extras = {
        name: [None if _missing(value) else _string(value) for value in values]
        for name, values in table.columns.items()
        if name not in taken and not any(isinstance(value, list | dict) for value in values)
    }
    labels = _numbers(table, label) if regression else _names(table, label)
    return Rows(table.where, texts, others[0] if others else None, labels, extras)


def class_names(train: Rows, declared: tuple[str, ...] | None) -> tuple[str, ...]:
    """The task's labels: as declared by the source, else sorted, as numbers where all are whole numbers."""
    if declared is not None:
        return declared
    found = {str(label) for label in train.labels}
    if len(found) < 2:
        raise DataError(f"{train.where}: expected two labels or more, found only {next(iter(found))!r}")
    if all(name.removeprefix("-").isdecimal() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _texts(table: Table, name: str) -> list[str]:
    texts = []
    for row, value in enumerate(table.column(name), start=1):
        if _missing(value) or isinstance(value, list | dict):
            found = "none" if _missing(value) else f"a {type(value).__name__}"
            raise DataError(
                f"{table.where}: expected text in column {name!r}, found {found} in row {row};"
                f" fill it in or remove the row"
            )
        texts.append(_string(value))
    return texts


def _names(table: Table, label: str) -> list[str]:
    classes = table.classes.get(label)
    names = []
    for row, value in enumerate(table.column(label), start=1):
        if classes is not None and isinstance(value, int):
            value = classes[value] if 0 <= value < len(classes) else None
        if _missing(value):
            raise DataError(
                f"{table.where}: expected a label in column {label!r}, found none in row {row};"
                f" fill it in or remove the row"
            )
        if isinstance(value, float):
            if not value.is_integer():
                raise DataError(
                    f"{table.where}: expected class labels in column {label!r}, found the number {value}"
                    f" in row {row}; metric spearman reads labels as numbers"
                )
            value = int(value)
        names.append(_string(value).strip())
    if classes is None:
        _refuse_measurements(table.where, label, names)
    return names


def _refuse_measurements(where: str, label: str, names: list[str]) -> None:
    """DataError where text labels are all numbers and some are not whole: hardly classes."""
    try:
        numbers = {name: float(name) for name in set(names)}
    except ValueError:  # words
        return
    found = next((name for name in names if not numbers[name].is_integer()), None)
    if found is not None and all(map(math.isfinite, numbers.values())):
        raise DataError(
            f"{where}: expected class labels in column {label!r}, found numbers such as {found};"
            f" metric spearman reads labels as numbers, and classes need whole numbers or words"
        )


def _numbers(table: Table, label: str) -> list[float]:
    numbers = []
    for row, value in enumerate(table.column(label), start=1):
        try:
            number = float(value)  # type: ignore[arg-type]  # what is no number is the error below
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"{table.where}: metric spearman expects a number in column {label!r},"
                f" found {value!r} in row {row}"
            )
        numbers.append(number)
    return numbers


def _missing(value: object) -> bool:
    """No value: null, NaN or blank text."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def _string(value: object) -> str:
    # JSON can spell half of a surrogate pair, which is no character and cannot be stored.
    return str(value).encode("utf-8", "replace").decode()
