"""Central evaluation: the shared vector with each task's head on rows that no client trains on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmask.views import View
from fedmask.workspace import Workspace

Scores = dict[str, dict[str, float]]


def central_scores(
    workspace: Workspace,
    shared: np.ndarray,
    heads: Mapping[str, np.ndarray],
    split: str,
    rows: int | None,
    view: View | None = None,
) -> Scores:
    """``{task: {"loss": ..., metric: ...}}`` on ``split`` ("dev" or "test").

    ``shared`` and each of ``heads``: float32, flat. ``rows``: at most that many in all, the same number for
    each task (None: every row). ``view``: what the model carries (``RunState.view``). Tasks without rows in
    that split are left out, and all of them where heads stay with the clients, who score them. Runs with this
    process's own number of threads, not the clients': a loss may differ in its last bits between machines,
    the trained vector does not.
    """
    if workspace.config.server.sharing == "local-heads":
        return {}
    most = None if rows is None else max(1, rows // len(workspace.tasks))
    out: Scores = {}
    for task in workspace.tasks:
        data = workspace.central(task, split, most)
        if len(data):
            out[task] = workspace.evaluate(task, np.concatenate([shared, heads[task]]), data, view)
    return out


def task_means(values: Mapping[str, list[tuple[int, float]]]) -> dict[str, float]:
    """Per task the mean of (examples, value) pairs weighted by examples; tasks without any are left out."""
    out = {}
    for task, pairs in values.items():
        total = sum(examples for examples, _ in pairs)
        if total > 0:
            out[task] = sum(examples * value for examples, value in pairs) / total
    return out
