"""The streaming mean of a federation of several tasks: one sum a task, weights of tasks at the end.

``equal`` weighting needs each task's total, which is known when the last reply is there; so each task has
its own sum over its whole vector (shared values, then its head). Memory: 8 bytes an entry and task,
however many replies come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmask.aggregation.fixed import FixedSum, add, fixed_sum, mean
from fedmask.errors import FedmaskError

Weighting = Literal["equal", "examples"]


@dataclass
class TaskSums:
    """Sums by task. ``sizes``: length of a task's vector; ``most_weight``: rows that replies may claim."""

    sizes: Mapping[str, int]
    most_weight: int
    sums: dict[str, FixedSum] = field(default_factory=dict)


def start_sums(sizes: Mapping[str, int], most_weight: int) -> TaskSums:
    """No replies yet. ``sizes``: task -> length of its vector; ``most_weight`` bounds the sum of rows."""
    return TaskSums(dict(sizes), most_weight)


def add_update(state: TaskSums, task: str, change: NDArray[np.float32], examples: int) -> TaskSums:
    """``state`` with one reply added, in place: a client's change (float32, shared values first).

    Raises ``FedmaskError`` for an unknown task and for whatever ``fedmask.aggregation.fixed.add`` refuses.
    """
    if task not in state.sizes:
        raise FedmaskError(f"streaming mean: expected one of {sorted(state.sizes)}, found task {task!r}")
    if task not in state.sums:
        state.sums[task] = fixed_sum(state.sizes[task], state.most_weight)
    add(state.sums[task], change, examples)
    return state


def averaged(
    state: TaskSums,
    shared: NDArray[np.float32],
    heads: Mapping[str, NDArray[np.float32]],
    weighting: Weighting = "equal",
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """``shared`` and ``heads`` (float32) moved by the mean change, summed up in float64 in the tasks' order.

    Within a task replies weigh by their examples; ``equal`` gives tasks that replied the same weight in the
    shared values, ``examples`` their totals. A head moves by its own task's mean; others stay as they are.
    """
    present = [task for task in state.sizes if task in state.sums]
    total = sum(state.sums[task].weight for task in present)
    moved = shared.astype(np.float64)
    after = dict(heads)
    for task in present:
        change = mean(state.sums[task])
        share = 1 / len(present) if weighting == "equal" else state.sums[task].weight / total
        after[task] = (heads[task] + change[shared.size :]).astype(np.float32)
        moved += share * change[: shared.size]
    return moved.astype(np.float32), after
