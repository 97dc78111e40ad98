"""Which training rows each client holds, and which of them it holds out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedmask.config import PartitionConfig, RunConfig, TaskConfig
from fedmask.errors import ConfigError, DataError
from fedmask.rng import rng_for, seed_for
from fedmask.tasks.columns import LABEL
from fedmask.tasks.data import TaskData
from fedmask.tasks.partitioners import KINDS, Deal, RowNumbers

_RANGES = 10


def assignments(config: RunConfig) -> tuple[tuple[str, int], ...]:
    """For each partition id: its task's name and its number within that task, in the tasks' order."""
    return tuple((task.name, index) for task in config.tasks for index in range(task.clients))


def shards(task: TaskConfig, data: TaskData, partition: PartitionConfig, seed: int) -> list[RowNumbers]:
    """The training rows of each of the task's clients: sorted int64 row numbers of ``data.train``.

    Every row is dealt exactly once and each client gets one or more. Kinds:

    - ``dirichlet``: each class is cut by a draw from Dirichlet(``alpha``).
    - ``pathological``: ``classes_per_client`` classes each, in a circle over a random order of the
      classes; a class goes in equal parts to those who have it.
    - ``shard``: rows sorted by class, cut into about ``shards_per_client`` blocks a client, dealt at
      random; a client may get one block more, and one block may be shorter.
    - ``quantity``: random rows, as many as a draw from Dirichlet(``alpha``) over the clients says
      (the quantity skew of Li et al., arXiv 2102.02079).
    - ``iid``: random parts whose sizes differ by one at most.
    - ``natural``: one client for each value of ``column``, in sorted order.

    For a regression, class means one of up to ten ranges that hold about as many rows each. The
    result depends on the arguments alone. Raises DataError.
    """
    rows = len(data.train)
    classes, names = _classes(data)
    rng = rng_for(seed, -1, -1, f"shards/{task.name}")
    deal = Deal(
        task=task,
        partition=partition,
        data=data,
        classes=classes,
        class_names=names,
        order=rng.permutation(rows).astype(np.int64),
        rng=rng,
        seed=seed_for(seed, -1, -1, f"partitioner/{task.name}"),
    )
    if task.clients > rows:
        raise deal.error(f"there are only {rows} training rows; lower clients to {rows} or less")
    found = KINDS[partition.kind](deal)
    check_cover(deal, found)
    return found


def check_cover(deal: Deal, found: list[RowNumbers]) -> None:
    """DataError unless each row is with exactly one client and each client has a row."""
    empty = [client for client, rows in enumerate(found) if not len(rows)]
    if empty:
        raise deal.error(
            f"client {empty[0]} has no rows (alpha={deal.partition.alpha}); raise alpha or lower clients"
        )
    times = np.bincount(np.concatenate(found), minlength=len(deal.order))
    if np.any(times != 1):
        raise deal.error(
            f"expected each of {len(times)} rows once, found {np.sum(times == 0)} rows that no client holds"
            f" and {np.sum(times > 1)} that are dealt twice"
        )


def split_held_out(
    rows: RowNumbers, labels: npt.NDArray[Any], fraction: float, rng: np.random.Generator
) -> tuple[RowNumbers, RowNumbers]:
    """A client's rows as (train, held out), both sorted; ``labels[i]`` belongs to ``rows[i]``.

    Held out are round(fraction x n) rows spread evenly over the labels, one or more where there
    are two rows to divide, and never all: one row or more stays in train. A fraction of 0 holds
    out none. Raises ConfigError for a fraction outside [0, 1), DataError for unequal lengths.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"held_out: expected a number at least 0 and less than 1, found {fraction}")
    if len(rows) != len(labels):
        raise DataError(f"expected one label for each of {len(rows)} rows, found {len(labels)}")
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1) if fraction and len(rows) else 0
    held = np.zeros(len(rows), dtype=bool)
    if count:
        # Every (n / count)-th row in the order of the labels: each label gives its share.
        places = (np.arange(count) * len(rows) + rng.integers(len(rows))) // count
        held[np.lexsort((rng.random(len(rows)), labels))[places]] = True
    return np.sort(rows[~held]), np.sort(rows[held])


def _classes(data: TaskData) -> tuple[RowNumbers, tuple[str, ...]]:
    """Class of each training row, numbered without gaps, and the classes' names."""
    labels = np.asarray(data.train[LABEL][:])
    if data.kind == "regression":
        edges = np.quantile(labels, np.arange(1, _RANGES) / _RANGES)
        labels = np.searchsorted(edges, labels, side="right")
    present, classes = np.unique(labels, return_inverse=True)
    names = data.labels or tuple(f"range {number}" for number in range(1, _RANGES + 1))
    return classes.astype(np.int64), tuple(names[number] for number in present)
