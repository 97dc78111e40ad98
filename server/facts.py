"""What a run's settings come to for this model and these tasks: ``facts`` in ``config.json``."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fedmask.config import RunConfig
from fedmask.kernels import available_kernels
from fedmask.layout import Layout, sent
from fedmask.views import up_layout
from fedmask.workspace import Workspace
from server.record import machine, versions


def run_record(workspace: Workspace, engine: str, measured: dict[str, float]) -> dict[str, Any]:
    """The whole of ``config.json``. ``measured``: what ``settle_precision`` found.

    The config states the precision and the kernel in use, so that it repeats the run bit for bit.
    """
    recipe = workspace.recipe()
    chosen = {"precision": workspace.precision, "kernel": workspace.kernel}
    settled = workspace.config.model_copy(update=chosen)
    return {
        "config": settled.model_dump(mode="json"),
        "versions": versions(),
        "machine": machine(),
        "engine": engine,
        "recipe": json.loads(recipe.to_json()) if recipe else None,
        "checkpoint_digest": workspace.checkpoint_digest,
        "precision": {
            "asked": workspace.config.precision,
            "used": workspace.precision,
            "seconds_per_step": measured,
            "kernel": workspace.kernel,
            "kernels": list(available_kernels()),
        },
        "facts": _facts(workspace, workspace.config),
    }


def _facts(workspace: Workspace, config: RunConfig) -> dict[str, Any]:
    mask = workspace.mask if config.mask_schedule == "fixed" else workspace.schedule.mask(1)
    return {
        "k": workspace.k,
        "mask_digest": mask.digest if mask else None,
        "eligible_size": workspace.space.eligible_size if workspace.k else 0,
        "backbone_size": workspace.backbone_size,
        "layout": {
            task: [[segment.name, segment.size] for segment in _sent(workspace, task).segments]
            for task in workspace.tasks
        },
        "partitions": [_partition(workspace, client) for client in range(config.clients)],
    }


def _sent(workspace: Workspace, task: str) -> Layout:
    """The segments that a client sends."""
    layout = workspace.layout(task)
    return up_layout(layout, workspace.k) if workspace.config.has_views else sent(layout)


def _partition(workspace: Workspace, client: int) -> dict[str, Any]:
    task = workspace.task_of(client)
    if workspace.is_own(client):  # nobody but the client knows, and it may have other rows after a restart
        return {"client": client, "task": task, "train_rows": 0, "held_out_rows": 0, "labels": {}}
    kept, held = workspace.split(client)
    return {
        "client": client,
        "task": task,
        "train_rows": len(kept),
        "held_out_rows": len(held),
        "labels": _labels(workspace, task, kept),
    }


def _labels(workspace: Workspace, task: str, rows: np.ndarray) -> dict[str, int]:
    """How many training rows have each label; none for a regression."""
    data = workspace.data(task)
    if data.kind != "classification":
        return {}
    counts = np.bincount(workspace.labels(task)[rows], minlength=len(data.labels))
    return {str(label): int(count) for label, count in zip(data.labels, counts, strict=True)}
