"""A task's labels without its rows: what a client needs whose rows are read from elsewhere."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

from fedmask.config import TaskConfig
from fedmask.tasks.data import TaskData, load_task

if TYPE_CHECKING:
    from datasets import Dataset


class LateTask:
    """Looks like ``TaskData``; its splits are read when first asked for.

    ``labels``: the class names, as ``load_task`` would find them; none for a regression.
    """

    def __init__(self, task: TaskConfig, labels: tuple[str, ...]) -> None:
        self._task = task
        self.name = task.name
        self.kind: Literal["classification", "regression"] = (
            "regression" if task.metric == "spearman" else "classification"
        )
        self.labels = labels
        self.metric = task.metric

    @cached_property
    def _read(self) -> TaskData:
        return load_task(self._task)

    @property
    def train(self) -> Dataset:
        """See ``TaskData``."""
        return self._read.train

    @property
    def dev(self) -> Dataset:
        """See ``TaskData``."""
        return self._read.dev

    @property
    def test(self) -> Dataset:
        """See ``TaskData``."""
        return self._read.test
