"""Raw columns as they were read, before anything is known about their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedmask.errors import DataError, unknown

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Table:
    """Columns of equal length, by name, in the order of the source.

    ``where`` names the source in messages. ``classes`` holds the label names of columns that
    store class numbers (a ``ClassLabel`` of the ``datasets`` library).
    """

    where: str
    columns: dict[str, Sequence[object]]
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> Sequence[object]:
        """The values of a column; DataError with the nearest name when there is none."""
        if name not in self.columns:
            raise DataError(f"{self.where}: {unknown('column', name, self.columns)}")
        return self.columns[name]


def table_of(dataset: Dataset, where: str) -> Table:
    """The columns of a ``datasets.Dataset`` that hold one plain value a row; others are left out."""
    from datasets import ClassLabel, Value

    features = {
        name: feature for name, feature in dataset.features.items() if isinstance(feature, ClassLabel | Value)
    }
    values = dataset.select_columns(list(features)).with_format(None)[:]
    classes = {
        name: tuple(feature.names) for name, feature in features.items() if isinstance(feature, ClassLabel)
    }
    return Table(where, {name: values[name] for name in features}, classes)
