"""The dense methods on four weights, by hand: what trains, what travels, what the layer computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedmask.config import TrainConfig
from fedmask.space import backbone_of
from fedmask.tasks import Tokenized
from fedmask.trainables import DenseTensors, Draw, LoRA, Trainable, biases
from fedmask.training import Stream, local_update, tuned
from fedmask.tuner import attach, merge

PLAN = TrainConfig(
    batch_size=2, optimizer="sgd", lr=0.1, momentum=0.0, clip_norm=None, weight_decay=0.0, dropout=0.0
)
# One row of two numbers (1, 2) with target 3.
ROW = Tokenized(np.array([1, 2], np.int32), np.array([0, 2]), None, np.array([3.0], np.float32))
NONE = Tokenized(np.empty(0, np.int32), np.zeros(1, np.int64), None, np.empty(0, np.float32))


class Backbone(nn.Module):
    """y = W x + b, where W is the identity and b = (0.5, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([nn.Linear(2, 2)])
        with torch.no_grad():
            self.block[0].weight.copy_(torch.eye(2))
            self.block[0].bias.copy_(torch.tensor([0.5, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block[0](x)
        return out


class Four(nn.Module):
    """The prediction is y0 + 2 y1: a fixed head (1, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Backbone()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_model(input_ids.float()) @ torch.tensor([[1.0], [2.0]])
        return out


class Draws:
    """A generator that knows two numbers only."""

    def uniform(self, low: float, high: float, size: int) -> np.ndarray:
        assert (low, high, size) == (pytest.approx(-(2**-0.5)), pytest.approx(2**-0.5), 2)
        return np.array([0.2, 0.1])


def lora(model: nn.Module, *, freeze_down: bool = False) -> LoRA:
    draw: Draw = lambda _: Draws()  # type: ignore[assignment,return-value]  # noqa: E731
    return LoRA(model, draw, rank=1, alpha=2.0, targets="linear", freeze_down=freeze_down)


def step(model: nn.Module, trainable: Trainable, start: list[float]) -> list[float]:
    attach(model, [trainable])
    vector = np.array(start, np.float32)
    change = local_update(
        model, vector, ROW, NONE, metric="spearman", plan=PLAN, pad_id=0, stream=Stream(1, 1, 0)
    ).change
    return [float(value) for value in change]


def test_bitfit_moves_the_bias_alone() -> None:
    # y = (1 + 0.5, 2); prediction 1.5 + 4 = 5.5, off by 2.5; d loss / d prediction = 5;
    # d / d b = 5 (1, 2) = (5, 10); the change is -0.1 times that.
    model = Four()
    assert biases(model) == ["block.0.bias"]
    trainable = DenseTensors("bias", backbone_of(model), biases(model))
    assert step(model, trainable, [0, 0]) == pytest.approx([-0.5, -1.0])


def test_lora_s_first_step_moves_b_alone() -> None:
    # A = (0.2, 0.1), B = (0, 0), scale = alpha / r = 2. A x = 0.4. The prediction is 5.5 as above.
    # d / d B = 2 (A x) d / d y = 0.8 (5, 10) = (4, 8); d / d A = 2 (B . d y) x = 0.
    # The vector is A's change, then B's.
    model = Four()
    assert step(model, lora(model), [0, 0, 0, 0]) == pytest.approx([0, 0, -0.4, -0.8])


def test_lora_from_factors_that_have_moved() -> None:
    # Received: A's change (0.3, 0.4), B's (0.1, 0.2): A = (0.5, 0.5), B = (0.1, 0.2). A x = 1.5.
    # y = (1.5, 2) + 2 * 1.5 (0.1, 0.2) = (1.8, 2.6); prediction 1.8 + 5.2 = 7, off by 4, d = 8.
    # d / d y = (8, 16); d / d B = 2 * 1.5 (8, 16) = (24, 48); B . d y = 0.8 + 3.2 = 4;
    # d / d A = 2 * 4 (1, 2) = (8, 16).
    model = Four()
    assert step(model, lora(model), [0.3, 0.4, 0.1, 0.2]) == pytest.approx([-0.8, -1.6, -2.4, -4.8])
    # Merged: W + 2 B A = I + 2 (0.1, 0.2)^T (0.5, 0.5)
    with tuned(model, np.array([0.3, 0.4, 0.1, 0.2], np.float32), Stream(1, 1, 0)):
        merged = merge(model)
    assert torch.allclose(merged.base_model.block[0].weight, torch.tensor([[1.1, 0.1], [0.2, 1.2]]))
