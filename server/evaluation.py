"""Central evaluation: the shared vector with each task's head on rows that no client trains on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from fedmask.workspace import Workspace

Scores = dict[str, dict[str, float]]


def central_scores(
    workspace: Workspace,
    shared: np.ndarray,
    heads: Mapping[str, np.ndarray],
    split: str,
    rows: int | None,
) -> Scores:
    """``{task: {"loss": ..., metric: ...}}`` on ``split`` ("dev" or "test").

    ``rows``: at most that many in all, the same number for each task (None: every row). Tasks without
    rows in that split are left out. Uses all cores: scores need not agree in the last bit of a loss
    between machines, the trained vector does.
    """
    most = None if rows is None else max(1, rows // len(workspace.tasks))
    out: Scores = {}
    with _allcores():
        for task in workspace.tasks:
            data = workspace.central(task, split, most)
            if len(data):
                out[task] = workspace.evaluate(task, np.concatenate([shared, heads[task]]), data)
    return out


def task_means(values: Mapping[str, list[tuple[int, float]]]) -> dict[str, float]:
    """Per task the mean of (examples, value) pairs weighted by examples; tasks without any are left out."""
    out = {}
    for task, pairs in values.items():
        total = sum(examples for examples, _ in pairs)
        if total > 0:
            out[task] = sum(examples * value for examples, value in pairs) / total
    return out


@contextmanager
def _allcores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
