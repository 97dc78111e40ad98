"""Scores by a change that learns to be sparse.

Diff pruning (Guo, Rush, Kim, ACL 2021, arXiv 2012.07463): theta = theta_0 + z w, where a gate z in [0, 1]
stands before each entry of the change w and another before each tensor (the structured variant, their
default). Gates are hard-concrete (Louizos et al., arXiv 1712.01312) with stretch [-1.5, 1.5] and
temperature 1, drawn anew each step:

    z = clamp(3 sigmoid(log u - log(1 - u) + alpha) - 1.5, 0, 1),    u uniform in (0, 1)

The expected number of open gates, P(z > 0) = sigmoid(alpha) each, is part of the loss. Then the change is
cut by magnitude and the entries left are tuned: here by the federation's run. The score is |z w| at u = 1/2.
What differs: steps instead of three epochs; an entry is priced by the product of its own probability and
its tensor's; eligible tensors alone are gated and trained, and the head without gates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedmask.config import ScoreConfig
from fedmask.masks.scores import Evidence, Scores
from fedmask.rng import seed_for
from fedmask.space import ParameterSpace, backbone_of
from fedmask.tasks import batches
from fedmask.trainables.base import Draw, Trainable, slots_of

_START = 5.0  # alpha: nearly every gate begins open
_LOW, _HIGH = -1.5, 1.5
_CLOSEST = 1e-6  # of u to 0 and to 1


class GatedChange(Trainable):
    """A change of whole tensors, laid end to end, behind gates; ``values`` float32 ``[N]`` is w.

    ``gates`` float32 ``[N]`` and ``tensor_gates`` float32 ``[tensors]`` hold alpha. What a forward pass
    sees is ``scaled``: w times its gates, tensor by tensor, set anew for each step.
    """

    def __init__(self, module: nn.Module, space: ParameterSpace) -> None:
        super().__init__("gated", slots_of(module, list(space.names)), size=space.size, local_size=space.size)
        self.gates = nn.Parameter(torch.full((space.size,), _START))
        self.tensor_gates = nn.Parameter(torch.full((len(space.names),), _START))
        self.scaled: dict[str, torch.Tensor] = {}
        self._shapes = dict(zip(space.names, space.shapes, strict=True))

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        with torch.no_grad():
            self.values.copy_(change)

    def change(self) -> torch.Tensor:
        with torch.no_grad():
            self.set_gates(drawn=False)
            return torch.cat([tensor.reshape(-1) for tensor in self.scaled.values()])

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor + self.scaled[self.slots[slot].name]).to(tensor.dtype)

    def set_gates(self, *, drawn: bool) -> torch.Tensor:
        """Gates for one step, from torch's generator or (not ``drawn``) at u = 1/2; the price, a scalar.

        The price is the expected number of entries whose gates are open.
        """
        sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        whole = _gate(self.tensor_gates, drawn)
        price = torch.zeros(())
        pieces = zip(
            self._shapes.items(), torch.split(self.values, sizes), torch.split(self.gates, sizes), strict=True
        )
        for i, ((name, shape), values, gates) in enumerate(pieces):
            self.scaled[name] = (values * _gate(gates, drawn) * whole[i]).view(shape)
            price = price + _open(gates).sum() * _open(self.tensor_gates[i])
        return price


def _gate(alpha: torch.Tensor, drawn: bool) -> torch.Tensor:
    noise = torch.logit(torch.rand_like(alpha), eps=_CLOSEST) if drawn else 0.0
    return (torch.sigmoid(alpha + noise) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def _open(alpha: torch.Tensor) -> torch.Tensor:
    """P(z > 0) = sigmoid(alpha - log(-low / high))."""
    return torch.sigmoid(alpha - torch.log(torch.tensor(-_LOW / _HIGH)))


def diff_pruning(
    model: nn.Module, space: ParameterSpace, evidence: Evidence, settings: ScoreConfig
) -> Scores:
    """|z w| after ``settings.steps`` steps: w and the head at ``settings.lr``, gates at ``settings.gate_lr``.

    AdamW without decay; clipping (of w and the head), batch size and dropout are the run's own. The
    dearest rule: w, alpha, their gradients, four Adam moments and the gated change, nine times N floats.
    """
    from fedmask.models import head_parameters  # these import this package
    from fedmask.trainables import DenseTensors
    from fedmask.tuner import attach, detach

    gated = GatedChange(backbone_of(model), space)
    head = DenseTensors("head", model, head_parameters(model))
    attach(model, [gated, head])
    try:
        _train(model, gated, head, evidence, settings)
        moved = gated.change()
    finally:
        detach(model)
    sizes = [torch.Size(shape).numel() for shape in space.shapes]
    parts = zip(torch.split(moved, sizes), space.shapes, strict=True)
    return Scores(space, [part.abs_().view(shape) for part, shape in parts])


def _train(
    model: nn.Module, gated: GatedChange, head: Trainable, evidence: Evidence, settings: ScoreConfig
) -> None:
    from fedmask.training import batch_loss

    plan, order = evidence.plan, evidence.generator("batches")
    rows: list[np.ndarray] = []
    gates = [gated.gates, gated.tensor_gates]
    changes = [t.values for t in (gated, head) if t.values.numel()]
    optimizer = torch.optim.AdamW(
        [{"params": changes, "lr": settings.lr}, {"params": gates, "lr": settings.gate_lr}], weight_decay=0.0
    )
    while len(rows) < settings.steps:
        rows += batches(evidence.data, plan.batch_size, order)
    model.train()
    with torch.random.fork_rng(devices=[]):  # neither dropout nor rand_like need be given a generator
        torch.manual_seed(seed_for(evidence.seed, -1, evidence.client, "gates"))
        for part in rows[: settings.steps]:
            optimizer.zero_grad(set_to_none=True)
            price = gated.set_gates(drawn=True)
            loss = batch_loss(model, evidence.data, part, evidence.pad_id) + settings.penalty * price
            loss.backward()  # type: ignore[no-untyped-call]
            if plan.clip_norm is not None:
                nn.utils.clip_grad_norm_(changes, plan.clip_norm)
            optimizer.step()
    model.eval()
