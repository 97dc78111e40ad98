"""Scores by full fine-tuning: how far each entry moves.

LT-SFT (Ansell, Ponti, Korhonen, Vulic, ACL 2022, arXiv 2110.07560): fine-tune everything, keep the k
entries of largest |theta_1 - theta_0|, rewind to theta_0, train those alone. Rewinding costs nothing here:
the change is trained beside the backbone, which is never written. The retraining is the federation's run.
What differs: one dense phase; which tensors may be chosen is the eligible set, while LT-SFT's scripts leave
out LayerNorm alone; everything trains in the dense phase, as there, the head included; no L1 penalty.
"""

from __future__ import annotations

import torch
from torch import nn

from fedmask.config import ScoreConfig, TrainConfig
from fedmask.masks.scores import Evidence, Scores
from fedmask.space import ParameterSpace, backbone_of, backbone_parameters


def lottery(model: nn.Module, space: ParameterSpace, evidence: Evidence, settings: ScoreConfig) -> Scores:
    """|change| after ``settings.steps`` steps of full fine-tuning at ``settings.lr``, head included.

    Optimizer, clipping and dropout are the run's own; weight decay is off, which would draw changes to
    zero. Memory: four to five times the whole backbone in float32 (change, gradient, two Adam moments, and
    the weights in use).
    """
    from fedmask.models import head_parameters  # these import this package
    from fedmask.trainables import DenseTensors
    from fedmask.tuner import attach, detach

    backbone = DenseTensors("backbone", backbone_of(model), list(backbone_parameters(model)))
    head = DenseTensors("head", model, head_parameters(model))
    attach(model, [backbone, head])
    try:
        _train_densely(model, evidence, settings)
        moved = backbone.change()
    finally:
        detach(model)
    sizes = [int(p.numel()) for p in backbone_parameters(model).values()]
    parts = dict(zip(backbone.names, torch.split(moved, sizes), strict=True))
    return Scores(space, [parts[n].abs_().view(s) for n, s in zip(space.names, space.shapes, strict=True)])


def _train_densely(model: nn.Module, evidence: Evidence, settings: ScoreConfig) -> None:
    """``settings.steps`` steps of what is attached to ``model``, passing over the rows as often as needed."""
    from fedmask.training import Stream, train

    per_epoch = -(-len(evidence.data) // evidence.plan.batch_size)
    changes = {
        "epochs": float(-(-settings.steps // per_epoch)), "steps": settings.steps, "lr": settings.lr,
        "head_lr": settings.lr, "weight_decay": 0.0,
    }  # fmt: skip
    plan: TrainConfig = evidence.plan.model_copy(update=changes)
    train(model, evidence.data, plan, evidence.pad_id, Stream(evidence.seed, -1, evidence.client))
