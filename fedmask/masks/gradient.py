"""Scores from a few batches: |mean gradient|.

After SIFT (arXiv 2312.11875), which takes the top share of |gradient| of the first batch in each tensor:
that is ``batches = 1`` with ``per_tensor``. Here by default one global threshold, as for the other rules,
and no dropout. It needs labelled rows and dense gradients, so it is no function of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from fedmask.config import ScoreConfig
from fedmask.masks.base import Mask, Rule
from fedmask.masks.scores import Evidence, Scores
from fedmask.space import ParameterSpace, backbone_parameters, parameter_space
from fedmask.tasks import batches


def gradient(model: nn.Module, space: ParameterSpace, evidence: Evidence, settings: ScoreConfig) -> Scores:
    """|mean gradient| over the first ``settings.batches`` batches of a shuffled epoch, in evaluation mode.

    Memory: N scores and, for a moment, the N numbers of one batch's gradient.
    """
    from fedmask.training import batch_loss  # it imports the trainables, which import this package

    data, size = evidence.data, evidence.plan.batch_size
    rows = batches(data, size, evidence.generator("mask"))[: settings.batches]
    return _mean_gradients(
        model,
        space,
        (lambda part=part: batch_loss(model, data, part, evidence.pad_id) for part in rows),  # type: ignore[misc]
    )


def gradient_mask(model: nn.Module, losses: Iterable[Callable[[], torch.Tensor]], rule: Rule) -> Mask:
    """The k entries of largest absolute mean gradient, for data of any kind.

    ``losses``: functions, each of which runs ``model`` on one batch and returns its scalar loss. The
    model must not be tuned at the moment. Ties by tensor order, then flat index. Leaves no gradients
    behind. CheckpointError for a gradient that is not finite.
    """
    return _mean_gradients(model, parameter_space(model, rule.eligible), losses).mask(rule)


def _mean_gradients(
    model: nn.Module, space: ParameterSpace, losses: Iterable[Callable[[], torch.Tensor]]
) -> Scores:
    parameters = backbone_parameters(model)
    chosen = [parameters[name] for name in space.names]
    before = [p.requires_grad for p in chosen]
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in chosen]
    count = 0
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        for count, loss in enumerate(losses, 1):  # noqa: B007
            gradients = torch.autograd.grad(loss(), chosen, allow_unused=True)
            for total, found in zip(sums, gradients, strict=True):
                if found is not None:
                    total += found
    finally:
        for parameter, required in zip(chosen, before, strict=True):
            parameter.requires_grad_(required)
    for total in sums:
        total.abs_().div_(max(1, count))
    return Scores(space, sums)
