"""What a benchmark needs to know of a way to fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn


def _nothing() -> None:
    """Between backward pass and step: nothing to do."""


@dataclass
class Contender:
    """A prepared model. ``parameters`` go to the optimizer.

    ``trained`` counts entries that really change; ``after_backward`` runs between the backward pass and the
    optimizer's step; ``extra_bytes`` is what it keeps besides parameters, gradients and moments.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    trained: int
    after_backward: Callable[[], None] = _nothing
    extra_bytes: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, inputs: dict[str, torch.Tensor], direction: torch.Tensor) -> None:
        """One training step; the loss: the last states times a fixed ``direction`` (of their shape)."""
        states = self.model(**inputs).last_hidden_state
        (states.float() * direction).mean().backward()
        self.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Bytes kept for what is trained: values, gradients, two moments."""
        return sum(4 * p.numel() * p.element_size() for p in self.parameters)


def train_only(model: nn.Module, names: Callable[[str], bool]) -> list[nn.Parameter]:
    """Freeze all but the parameters whose names are wanted."""
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names(name))
        if names(name):
            chosen.append(parameter)
    return chosen


def count(parameters: list[nn.Parameter]) -> int:
    """Number of entries."""
    return sum(p.numel() for p in parameters)
