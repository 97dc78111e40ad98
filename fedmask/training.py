"""One client's local work: from a vector and rows to a change and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedmask.config import TrainConfig
from fedmask.rng import rng_for, seed_for
from fedmask.tasks import Tokenized, batches, collate, score
from fedmask.trainables import BiasAdapters, Draw, Trainable
from fedmask.tuner import Tuning, tuning_of

_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class LocalUpdate:
    """What a client has to say: ``change`` float32 ``[layout.size]``, rows it learned from, numbers."""

    change: np.ndarray
    examples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Stream:
    """Which random streams a piece of work uses."""

    seed: int
    round: int
    client: int

    def shared(self) -> Draw:
        """Streams that all clients of the round share (adapters' draws)."""
        return lambda purpose: rng_for(self.seed, self.round, -1, purpose)


@contextmanager
def tuned(model: nn.Module, vector: np.ndarray, stream: Stream) -> Iterator[Tuning]:
    """``model`` at reference + ``vector`` (float32 ``[layout.size]``); afterwards the reference again."""
    tuning = tuning_of(model)
    try:
        tuning.begin(torch.tensor(vector), stream.shared())  # a copy: decoded vectors are read-only
        yield tuning
    finally:
        tuning.restore()


def train(
    model: nn.Module, data: Tokenized, plan: TrainConfig, pad_id: int, stream: Stream
) -> tuple[float, int]:
    """Train what is attached to ``model`` on ``data``; the mean loss over steps and the number of steps.

    Regression where the labels are floats (mean squared error), else cross-entropy.
    """
    trainables = [t for t in tuning_of(model).trainables if t.values.numel()]
    parameters = [t.values for t in trainables]
    optimizer = _optimizer(trainables, plan)
    order = rng_for(stream.seed, stream.round, stream.client, "batches")
    rounds = [
        rows for _ in range(int(np.ceil(plan.epochs))) for rows in batches(data, plan.batch_size, order)
    ]
    steps = planned_steps(plan, len(data))
    total = 0.0
    model.train()
    with torch.random.fork_rng(devices=[]):  # dropout takes no generator
        torch.manual_seed(seed_for(stream.seed, stream.round, stream.client, "dropout"))
        for rows in rounds[:steps]:
            optimizer.zero_grad(set_to_none=True)
            loss = batch_loss(model, data, rows, pad_id)
            loss.backward()  # type: ignore[no-untyped-call]
            if plan.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, plan.clip_norm)
            optimizer.step()
            total += float(loss.detach())
    model.eval()
    return total / len(rounds[:steps]), len(rounds[:steps])


def planned_steps(plan: TrainConfig, rows: int) -> int:
    """Optimizer steps of one round on ``rows`` training rows."""
    steps = max(1, round(plan.epochs * -(-rows // plan.batch_size)))
    return steps if plan.steps is None else min(steps, plan.steps)


def batch_loss(model: nn.Module, data: Tokenized, rows: np.ndarray, pad_id: int) -> torch.Tensor:
    """The mean loss (a scalar) of ``model`` on some rows of ``data``, padded to the longest of them."""
    batch = collate(data, rows, pad_id)
    labels = batch.pop("labels")
    return _loss(model(**batch), labels)


def evaluate(model: nn.Module, data: Tokenized, metric: str, pad_id: int) -> dict[str, float]:
    """Mean loss and the task's metric of ``model`` on ``data``: ``{"loss": ..., metric: ...}``."""
    model.eval()
    outputs = torch.zeros(0)
    with torch.inference_mode():
        for rows in batches(data, _EVALUATION_BATCH, None):
            batch = collate(data, rows, pad_id)
            batch.pop("labels")
            logits = model(**batch).float()
            if not outputs.numel():
                outputs = torch.zeros(len(data), logits.shape[1])
            outputs[torch.from_numpy(rows)] = logits
        labels = torch.from_numpy(data.labels)
        loss = float(_loss(outputs, labels))
    regression = labels.is_floating_point()
    predictions = outputs[:, 0] if regression else outputs.argmax(1)
    return {"loss": loss, metric: score(metric, predictions.numpy(), data.labels)}


def local_update(
    model: nn.Module,
    vector: np.ndarray,
    train_rows: Tokenized,
    held_out: Tokenized,
    *,
    metric: str,
    plan: TrainConfig,
    pad_id: int,
    stream: Stream,
) -> LocalUpdate:
    """A client's round: score the received model on its held-out rows, train, score again, fold.

    ``vector`` float32 ``[layout.size]`` is the received state. The change is the folded result minus
    ``vector``. Metrics: ``train-loss``, ``steps`` and, where there are held-out rows,
    ``global-score``/``global-loss`` (before) and ``personal-score``/``personal-loss`` (after).
    """
    metrics: dict[str, float] = {}
    with tuned(model, vector, stream) as tuning:
        if len(held_out):
            before = evaluate(model, held_out, metric, pad_id)
            metrics |= {"global-score": before[metric], "global-loss": before["loss"]}
        loss, steps = train(model, train_rows, plan, pad_id, stream)
        if len(held_out):
            after = evaluate(model, held_out, metric, pad_id)
            metrics |= {"personal-score": after[metric], "personal-loss": after["loss"]}
        change = tuning.vector().numpy() - vector
    metrics |= {"train-loss": loss, "steps": float(steps), "held-out": float(len(held_out))}
    return LocalUpdate(change, len(train_rows), metrics)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.is_floating_point():
        return functional.mse_loss(logits[:, 0].float(), labels)
    return functional.cross_entropy(logits.float(), labels)


def _optimizer(trainables: list[Trainable], plan: TrainConfig) -> torch.optim.Optimizer:
    """State for the trained values alone; weight decay pulls the change to zero, never a frozen weight."""
    groups = [{"params": [t.values], "lr": _rate(t, plan)} for t in trainables]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=plan.momentum, weight_decay=plan.weight_decay, lr=plan.lr)
    return torch.optim.AdamW(groups, weight_decay=plan.weight_decay, lr=plan.lr, fused=True)


def _rate(trainable: Trainable, plan: TrainConfig) -> float:
    own = plan.lr
    if trainable.segment.startswith("head"):
        own = plan.head_lr if plan.head_lr is not None else plan.lr
    elif isinstance(trainable, BiasAdapters):
        own = plan.adapter_lr
    return own
