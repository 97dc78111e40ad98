"""Rows that only a client has: a file of its own with columns of its own, read as the task says.

The task fixes the labels and the meaning of the columns; a client whose file does not fit is refused. Where
the file lies is the node's affair: its ``--node-config`` (``data``, ``text``, ``label``), else environment
(FEDMASK_DATA, FEDMASK_TEXT, FEDMASK_LABEL). ``{client}`` in a name stands for the client's number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmask.config import TaskConfig
from fedmask.errors import DataError
from fedmask.tasks.columns import rows_of
from fedmask.tasks.data import dataset_of, refuse_labels
from fedmask.tasks.files import read_file

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class OwnData:
    """Where a client's rows are: the file ``data``; empty ``text`` and ``label``: as the task calls them."""

    data: str = ""
    text: str = ""
    label: str = ""


def own_data(node: Mapping[str, object]) -> OwnData:
    """What a node's config and, for what it leaves out, the environment say."""
    keys = ("data", "text", "label")
    return OwnData(*(str(node.get(key) or os.environ.get(f"FEDMASK_{key.upper()}", "")) for key in keys))


def own_rows(task: TaskConfig, client: int, place: OwnData) -> Dataset:
    """The client's rows with the columns ``text`` (``text_pair``), ``label``. Raises ``DataError``.

    A label that is none of the task's is refused, with both lists.
    """
    if not place.data:
        raise DataError(
            f"task {task.name!r}: client {client} has no data of its own; start its SuperNode with"
            " --node-config 'data=\"rows.csv\"', or with FEDMASK_DATA in its environment"
        )
    text = tuple(place.text.split("+")) if place.text else task.text
    if len(text) != len(task.text):
        raise DataError(
            f"task {task.name!r}: expected {len(task.text)} text columns as in the task"
            f" ({'+'.join(task.text)}), found {'+'.join(text)}"
        )
    # model_copy: the checks of a task do not apply to a client's names for its columns.
    named = task.model_copy(update={"text": text, "label": place.label or task.label})
    regression = task.metric == "spearman"
    path = Path(place.data.replace("{client}", str(client))).expanduser()
    try:
        rows = rows_of(named, read_file(path), regression=regression)
        if not regression:
            refuse_labels(rows, task.labels, "the task's labels")
    except DataError as error:
        raise DataError(f"task {task.name!r}, client {client}: {error}") from error.__cause__
    return dataset_of(rows, task.labels)
