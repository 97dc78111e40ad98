"""The choice of precision by a short measurement, made once a run before its first round.

The choice depends on the machine and the moment, so it is part of the run's record and travels to all
clients: a run that states it is repeated bit for bit.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from fedmask.masks import Mask
from fedmask.masks.random import draw
from fedmask.precision import PRECISIONS
from fedmask.tasks import Tokenized, batches
from fedmask.training import Stream, batch_loss, tuned
from fedmask.views import View
from fedmask.workspace import Workspace

_ROWS = 8
_TURNS = 5
_LEAST_TURNS = 3


def settle_precision(workspace: Workspace, *, seconds: float = 2.0) -> dict[str, float]:
    """Let ``workspace`` use the config's precision; for ``auto`` the one whose training step is faster here.

    Returns the medians that decided, in seconds a step by precision; nothing if the config states the
    precision. Steps of all precisions take turns, five times, or three if ``seconds`` are over by then.
    """
    wanted = workspace.config.precision
    if wanted != "auto":
        workspace.use_precision(wanted)
        return {}
    workspace.use_precision("fp32")
    trials = {precision: workspace.trial(precision) for precision in PRECISIONS}
    times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    threads = torch.get_num_threads()
    torch.set_num_threads(workspace.config.threads)
    try:
        data, rows = _batch(workspace)
        end = time.perf_counter() + seconds
        for turn in range(_TURNS + 1):
            if turn > _LEAST_TURNS and time.perf_counter() > end:
                break
            for precision, trial in trials.items():
                taken = _step(trial, data, rows)
                if turn:  # the first one pays for memory and compiled code
                    times[precision].append(taken)
    finally:
        torch.set_num_threads(threads)
    medians = {precision: statistics.median(found) for precision, found in times.items()}
    workspace.use_precision(min(PRECISIONS, key=lambda precision: medians[precision]))
    return medians


def _batch(workspace: Workspace) -> tuple[Tokenized, np.ndarray]:
    """Rows of middle length from the first client's shard."""
    data = workspace.sample(workspace.task_of(0))
    size = min(_ROWS, workspace.config.train.batch_size, len(data))
    found = batches(data, size, None)
    return data, found[len(found) // 2]


def _step(workspace: Workspace, data: Tokenized, rows: np.ndarray) -> float:
    """Seconds of one forward and backward pass of the method in the workspace's precision."""
    config, task = workspace.config, workspace.task_of(0)
    view = _some_view(workspace)
    model, size = workspace.model(task, view), workspace.layout(task, view).size
    with tuned(model, np.zeros(size, np.float32), Stream(config.seed, -1, -1)):
        model.train()
        with torch.random.fork_rng(devices=[]):
            start = time.perf_counter()
            batch_loss(model, data, rows, workspace.backbone.pad_id).backward()  # type: ignore[no-untyped-call]
            taken = time.perf_counter() - start
        model.eval()
    model.zero_grad()
    return taken


def _some_view(workspace: Workspace) -> View | None:
    """A mask of the run's size where the run's own is not known yet, or is another one in each round."""
    rule, space = workspace.rule, workspace.space
    if rule is None or not (workspace.config.has_views or workspace.mask is None):
        return None
    return View(Mask(draw(space, workspace.k, 0), space, rule), np.empty(0, np.int64))
