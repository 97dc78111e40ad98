"""A run's rows: its tasks, who holds which rows of them, and their tokens, made when first asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from fedmask.config import RunConfig
from fedmask.recent import Recent
from fedmask.rng import rng_for
from fedmask.shard_cache import cache_file, caching, keep, load_cached
from fedmask.tasks import TaskData, Tokenized, assignments, load_task, shards, split_held_out
from fedmask.tasks.late import LateTask
from fedmask.tasks.own import OwnData, own_rows

if TYPE_CHECKING:
    from datasets import Dataset


# Tokenized shards that a process keeps at hand: millions of tokens, more than most runs have.
SHARD_BYTES = 64_000_000


@dataclass(frozen=True)
class Shard:
    """One client's rows: ``train`` and the part that it holds out for itself."""

    task: str
    train: Tokenized
    held_out: Tokenized

    @property
    def bytes(self) -> int:
        """Memory of both parts' arrays, and a little for the objects around them."""
        return self.train.bytes + self.held_out.bytes + 2000


class RunData(ABC):
    """The data side of a workspace, from the config alone."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._tasks = {task.name: task for task in config.tasks}
        self._assignments = assignments(config)
        self.place = OwnData()
        self._data: dict[str, TaskData] = {}
        self._labels: dict[str, np.ndarray] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._shards: Recent[int, Shard] = Recent(SHARD_BYTES, lambda shard: shard.bytes)
        self._central: dict[tuple[str, str, int | None], Tokenized] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the config's order."""
        return tuple(self._tasks)

    def task_of(self, partition: int) -> str:
        """The task of a client."""
        return self._assignments[partition][0]

    def data(self, task: str) -> TaskData:
        """The task's rows and labels."""
        if task not in self._data:
            settings = self._tasks[task]
            # With data of their own, clients know the labels from the settings; the files are the server's.
            late = LateTask(settings, settings.labels) if settings.own_data else None
            self._data[task] = cast(TaskData, late) if late else load_task(settings)
        return self._data[task]

    def rows(self, partition: int) -> np.ndarray:
        """Rows (int64, of the task's train split) that the client holds, its held-out part included."""
        task, index = self._assignments[partition]
        if task not in self._rows:
            settings = self._tasks[task]
            partition_rule = settings.partition or self.config.partition
            self._rows[task] = shards(settings, self.data(task), partition_rule, self.config.seed)
        return self._rows[task][index]

    def split(self, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """The client's rows as (train, held out): sorted int64 row numbers of the task's train split."""
        task, rows = self.task_of(partition), self.rows(partition)
        return self._hold_out(partition, rows, self.labels(task)[rows])

    def _hold_out(
        self, partition: int, rows: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        rule = self._tasks[self.task_of(partition)].partition or self.config.partition
        fraction = min(rule.held_out, rule.held_out_max / len(rows))
        return split_held_out(rows, labels, fraction, rng_for(self.config.seed, -1, partition, "held-out"))

    def use_own_data(self, place: OwnData) -> None:
        """Where this process's clients have rows of their own."""
        if place != self.place:
            self.place = place
            self._shards = Recent(SHARD_BYTES, lambda shard: shard.bytes)

    def is_own(self, partition: int) -> bool:
        """Whether the client's rows are its own, which the server does not see."""
        return self._tasks[self.task_of(partition)].own_data

    def sample(self, task: str) -> Tokenized:
        """Rows like a client's, on any machine: the task's first client's, or the server's own dev rows."""
        first = next(number for number, (name, _) in enumerate(self._assignments) if name == task)
        return self.central(task, "dev") if self.is_own(first) else self.shard(first).train

    def labels(self, task: str) -> np.ndarray:
        """Labels of the task's train split: int64 class numbers or float64 values."""
        if task not in self._labels:
            self._labels[task] = np.asarray(self.data(task).train.with_format("numpy")["label"][:])
        return self._labels[task]

    def shard(self, partition: int) -> Shard:
        """The client's tokenized rows, kept while there is room: a client at rest costs its row numbers."""
        return self._shards.get(partition, lambda: self._read_shard(partition))

    def prepare(self, partition: int) -> None:
        """Have the client's rows at hand, from the disk if there, before anything reads its task."""
        if caching():
            self.shard(partition)

    def _read_shard(self, partition: int) -> Shard:
        task = self.task_of(partition)
        file = cache_file(self.config, self._tasks[task], partition, self.place)
        if cached := load_cached(file):
            labels, train, held_out = cached
            self._data.setdefault(task, cast(TaskData, LateTask(self._tasks[task], labels)))
            return Shard(task, train, held_out)
        shard = self._make_shard(task, partition)
        keep(file, self.data(task).labels, shard.train, shard.held_out)
        return shard

    def _make_shard(self, task: str, partition: int) -> Shard:
        if self.is_own(partition):
            data = own_rows(self._tasks[task], partition, self.place)
            parts = self._hold_out(partition, np.arange(len(data)), np.asarray(data["label"][:]))
            return Shard(task, *(self._tokenize(data, rows) for rows in parts))
        train, held_out = (self._tokenize(self.data(task).train, rows) for rows in self.split(partition))
        return Shard(task, train, held_out)

    def central(self, task: str, split: str, rows: int | None = None) -> Tokenized:
        """``rows`` rows of the task's dev or test split, the same choice each time; all of them for None."""
        key = (task, split, rows)
        if key not in self._central:
            data = getattr(self.data(task), split)
            chosen = np.arange(len(data))
            if rows is not None and rows < len(data):
                picked = rng_for(self.config.seed, -1, -1, f"rows/{task}/{split}").permutation(len(data))
                chosen = np.sort(picked[:rows])
            self._central[key] = self._tokenize(data, chosen)
        return self._central[key]

    @abstractmethod
    def _tokenize(self, data: Dataset, rows: np.ndarray) -> Tokenized:
        """Some rows of a split, as the run's model reads them."""
