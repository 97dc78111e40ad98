"""Data sets, their tokens and batches, metrics, and the shards that clients hold."""

from __future__ import annotations

from fedmask.tasks.batching import batches, collate
from fedmask.tasks.data import TaskData, load_task
from fedmask.tasks.metrics import METRICS, score
from fedmask.tasks.shards import assignments, shards, split_held_out
from fedmask.tasks.splits import split_of
from fedmask.tasks.tokenized import Tokenized, tokenize, tokenize_rows

__all__ = [
    "METRICS",
    "TaskData",
    "Tokenized",
    "assignments",
    "batches",
    "collate",
    "load_task",
    "score",
    "shards",
    "split_held_out",
    "split_of",
    "tokenize",
    "tokenize_rows",
]
