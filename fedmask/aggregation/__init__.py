"""Means of many updates whose result does not depend on the order in which they arrive."""

from __future__ import annotations

from fedmask.aggregation.fixed import FixedSum, add, fixed_sum, mean, merge
from fedmask.aggregation.tasks import TaskSums, add_update, averaged, start_sums
from fedmask.aggregation.unions import SparseUpdate, union_mean

__all__ = [
    "FixedSum",
    "SparseUpdate",
    "TaskSums",
    "add",
    "add_update",
    "averaged",
    "fixed_sum",
    "mean",
    "merge",
    "start_sums",
    "union_mean",
]
