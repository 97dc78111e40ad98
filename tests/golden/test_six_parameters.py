"""A federation over six numbers, computed by hand.

backbone  W = | 0.5 -0.1 |     head  v = ( 1.0  0.5 )     y = v (W x)     loss = mean (y - t)^2
              | 0.2  1.0 |
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedmask import magnitude_mask, merge
from fedmask.config import TrainConfig
from fedmask.masks import Rule, derive_mask
from fedmask.tasks import Tokenized
from fedmask.trainables import BiasAdapters, DenseTensors, MaskedEntries, MaskedWeightAdapters, WeightAdapters
from fedmask.training import LocalUpdate, Stream, local_update, tuned
from fedmask.tuner import attach, tuning_of
from server.strategy import Contribution, ServerStrategy
from tests.support import draw


class Backbone(nn.Module):
    """One block, one linear layer: the feature vector of a row is its two token numbers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList([nn.Linear(2, 2, bias=bias)])
        with torch.no_grad():
            self.block[0].weight.copy_(torch.tensor([[0.5, -0.1], [0.2, 1.0]]))
            if bias:
                self.block[0].bias.copy_(torch.tensor([0.3, -0.4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block[0](x)
        return out


class Six(nn.Module):
    """Four weights and a head of two."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Backbone(bias=False)
        self.head = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0.5]]))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.base_model(input_ids.float()))
        return out


def rows(*items: tuple[int, int, float]) -> Tokenized:
    tokens = np.array([token for item in items for token in item[:2]], np.int32)
    labels = np.array([item[2] for item in items], np.float32)
    return Tokenized(tokens, np.arange(0, len(tokens) + 1, 2, dtype=np.int64), None, labels)


ONE = rows((1, 2, 1.0), (2, 1, 0.6))
TWO = rows((1, 1, 2.0))
PLAN = TrainConfig(
    batch_size=2, optimizer="sgd", lr=0.1, momentum=0.0, clip_norm=None, weight_decay=0.0, dropout=0.0
)


def client() -> Six:
    model = Six()
    mask = magnitude_mask(model, 0.5)
    attach(model, [MaskedEntries(model, mask), DenseTensors("head/x", model, ["head.weight"])])
    return model


def trained(data: Tokenized, plan: TrainConfig = PLAN) -> LocalUpdate:
    return local_update(
        client(), np.zeros(4, np.float32), data, rows(), metric="spearman", plan=plan, pad_id=0,
        stream=Stream(1, 1, 0),
    )  # fmt: skip


def close(found: object, wanted: list[float]) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-6, atol=1e-7)


def test_the_masks() -> None:
    # |W| in flat order: 0.5 0.1 0.2 1.0. Half of four entries: the two smallest are the 2nd and 3rd.
    assert magnitude_mask(Six(), 0.5).indices.tolist() == [1, 2]
    assert magnitude_mask(Six(), 0.25).indices.tolist() == [1]
    assert magnitude_mask(Six(), 0.01).indices.tolist() == [1]  # round(0.04) = 0, but at least one
    assert derive_mask(Six(), Rule("largest", 0.5)).indices.tolist() == [0, 3]
    assert magnitude_mask(Six(), 0.5).space.names == ("block.0.weight",)


def test_one_step_of_the_first_client() -> None:
    # Row (1, 2), target 1:   W x = (0.5 - 0.2, 0.2 + 2.0) = (0.3, 2.2),  y = 0.3 + 1.1 = 1.4, off by 0.4
    # Row (2, 1), target 0.6: W x = (1.0 - 0.1, 0.4 + 1.0) = (0.9, 1.4),  y = 0.9 + 0.7 = 1.6, off by 1.0
    # loss = (0.16 + 1.00) / 2 = 0.58;  d loss / d y = (0.4, 1.0)
    # d / d W[0, 1] = 0.4 * v0 * 2 + 1.0 * v0 * 1 = 0.8 + 1.0 = 1.8
    # d / d W[1, 0] = 0.4 * v1 * 1 + 1.0 * v1 * 2 = 0.2 + 1.0 = 1.2
    # d / d v = 0.4 * (0.3, 2.2) + 1.0 * (0.9, 1.4) = (1.02, 2.28)
    # The change is -0.1 times that; W[0, 0] and W[1, 1] are frozen and no part of the vector.
    found = trained(ONE)
    close(found.change, [-0.18, -0.12, -0.102, -0.228])
    assert found.examples == 2
    assert found.metrics == {"train-loss": pytest.approx(0.58), "steps": 1.0, "held-out": 0.0}


def test_one_step_of_the_second_client() -> None:
    # Row (1, 1), target 2: W x = (0.4, 1.2), y = 0.4 + 0.6 = 1.0, off by -1; d loss / d y = -2
    # d / d W[0, 1] = -2 * 1.0 = -2,  d / d W[1, 0] = -2 * 0.5 = -1,  d / d v = -2 * (0.4, 1.2) = (-0.8, -2.4)
    close(trained(TWO).change, [0.2, 0.1, 0.08, 0.24])


def test_clipping_counts_what_is_trained_alone() -> None:
    # The first client's gradient over mask and head: 1.8^2 + 1.2^2 + 1.02^2 + 2.28^2 = 10.9188,
    # whose root, the norm, is 3.304360. The gradients of the frozen entries (W[0, 0]: 0.4 + 2.0 = 2.4;
    # W[1, 1]: 0.4 + 0.5 = 0.9) would make it 4.182.
    scale = 0.5 / 3.304360
    found = trained(ONE, PLAN.model_copy(update={"clip_norm": 0.5})).change
    np.testing.assert_allclose(found, scale * np.array([-0.18, -0.12, -0.102, -0.228]), rtol=2e-5)


def test_weight_decay_pulls_the_change() -> None:
    # From a change of 0.5 everywhere: W = (0.5, 0.4; 0.7, 1.0), v = (1.5, 1.0).
    # Row (1, 1), target 3.05: W x = (0.9, 1.7), y = 1.35 + 1.7 = 3.05, so there is no gradient.
    # Decay 1 and rate 0.1 take a tenth of the change, and nothing of the weights.
    plan = PLAN.model_copy(update={"weight_decay": 1.0})
    found = local_update(
        client(), np.full(4, 0.5, np.float32), rows((1, 1, 3.05)), rows(), metric="spearman", plan=plan,
        pad_id=0, stream=Stream(1, 1, 0),
    )  # fmt: skip
    np.testing.assert_allclose(found.change, [-0.05] * 4, atol=1e-6)


def test_the_mean_of_two_clients() -> None:
    # Weights 2 and 1 (rows). mask: (2 * -0.18 + 0.20) / 3 = -0.053333, (2 * -0.12 + 0.10) / 3 = -0.046667
    #                         head: (2 * -0.102 + 0.08) / 3 = -0.041333, (2 * -0.228 + 0.24) / 3 = -0.072
    replies = [Contribution(i, "x", len(data), trained(data).change) for i, data in enumerate((ONE, TWO))]
    for order in (replies, replies[::-1]):
        combined = ServerStrategy("fedavg").combine(
            1, np.zeros(2, np.float32), {"x": np.zeros(2, np.float32)}, order
        )
        close(combined.shared, [-0.16 / 3, -0.14 / 3])
        close(combined.heads["x"], [-0.124 / 3, -0.072])
    # Folded: W = (0.5, -0.153333; 0.153333, 1.0), v = (0.958667, 0.428)
    model = client()
    with tuned(model, np.concatenate([combined.shared, combined.heads["x"]]), Stream(1, -1, -1)):
        folded = merge(copy.deepcopy(model))
    close(folded.base_model.block[0].weight.detach(), [[0.5, -0.46 / 3], [0.46 / 3, 1.0]])
    close(folded.head.weight.detach(), [[1 - 0.124 / 3, 0.428]])
    close(model.base_model.block[0].weight.detach(), [[0.5, -0.1], [0.2, 1.0]])


def test_two_tasks_weigh_equally() -> None:
    # One client each, with 2 rows and 1: with equal tasks the shared mean is the plain one, (-0.18 + 0.2) / 2
    # and (-0.12 + 0.1) / 2; weighed by examples it is that of one task. Heads never mix.
    replies = [
        Contribution(0, "x", 2, trained(ONE).change),
        Contribution(1, "y", 1, trained(TWO).change),
    ]
    heads = {"x": np.zeros(2, np.float32), "y": np.zeros(2, np.float32)}
    equal = ServerStrategy("fedavg", {}, "equal").combine(1, np.zeros(2, np.float32), heads, replies)
    close(equal.shared, [0.01, -0.01])
    close(equal.heads["x"], [-0.102, -0.228])
    close(equal.heads["y"], [0.08, 0.24])
    by_rows = ServerStrategy("fedavg", {}, "examples").combine(1, np.zeros(2, np.float32), heads, replies)
    close(by_rows.shared, [-0.16 / 3, -0.14 / 3])


# Adapters: the same W, and biases b = (0.3, -0.4) instead of a head ----------------------------------


def test_a_bias_adapter_by_hand() -> None:
    model = Backbone(bias=True)
    tuning = attach(model, [BiasAdapters(model, bottleneck=1)])
    tuning.begin(torch.zeros(2), draw())
    values = tuning.trainables[0].values
    with torch.no_grad():
        values[:2] = torch.tensor([1.0, 0.5])  # W_down; W_up starts at zero
    x = torch.tensor([[1.0, 1.0]])
    # loss = sum of the outputs, so d loss / d b' = (1, 1).
    # hidden = relu(0.3 * 1.0 - 0.4 * 0.5) = 0.1
    # Step 1, rate 1: d / d W_up = 0.1 * (1, 1), d / d W_down = 0 (W_up is zero)
    #   W_up = (-0.1, -0.1); b' - b = 0.1 * -0.1 = -0.01 each
    # Step 2: d / d hidden = -0.2, d / d W_down = b * -0.2 = (-0.06, 0.08), d / d W_up = (0.1, 0.1)
    #   W_down = (1.06, 0.42), W_up = (-0.2, -0.2); hidden = 0.318 - 0.168 = 0.15; b' - b = -0.03 each
    optimizer = torch.optim.SGD([values], lr=1.0)
    for change in (-0.01, -0.03):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        close(tuning.vector(), [change, change])
    close(values.detach(), [1.06, 0.42, -0.2, -0.2])
    # W x = (0.4, 1.2); folded biases (0.27, -0.43)
    close(model(x).detach(), [[0.67, 0.77]])
    close(merge(model)(x).detach(), [[0.67, 0.77]])
    close(model.block[0].bias.detach(), [0.27, -0.43])


def test_the_next_round_s_adapter_reads_the_averaged_bias() -> None:
    # After a mean change of (0.1, 0.2) the adapter's input is b = (0.4, -0.2), not (0.3, -0.4).
    model = Backbone(bias=True)
    tuning = attach(model, [BiasAdapters(model, bottleneck=1)])
    tuning.begin(torch.tensor([0.1, 0.2]), draw())
    close(tuning.vector(), [0.1, 0.2])
    with torch.no_grad():
        tuning.trainables[0].values.copy_(torch.tensor([1.0, 0.5, 2.0, -1.0]))
    # hidden = 0.4 - 0.1 = 0.3; what travels is the whole change: (0.1, 0.2) + 0.3 * (2, -1) = (0.7, -0.1)
    close(tuning.vector(), [0.7, -0.1])


def test_a_weight_adapter_by_hand() -> None:
    # W_down = (1, 1): W W_down = (0.4, 1.2). W_up = (0.5, -1): the change is | 0.2 -0.4 |
    #                                                                        | 0.6 -1.2 |
    numbers = torch.tensor([1.0, 1.0, 0.5, -1.0])
    model = Backbone(bias=True)
    tuning = attach(model, [WeightAdapters(model, bottleneck=1)])
    tuning.begin(torch.zeros(4), draw())
    with torch.no_grad():
        tuning.trainables[0].values.copy_(numbers)
    close(tuning.vector(), [0.2, -0.4, 0.6, -1.2])
    close(merge(model).block[0].weight.detach(), [[0.7, -0.5], [0.8, -0.2]])
    # Restricted to the mask {1, 2}, with direct changes (0.05, -0.05) beside the adapter:
    model = Backbone(bias=True)
    tuning = attach(model, [MaskedWeightAdapters(model, magnitude_mask(model, 0.5), bottleneck=1)])
    tuning.begin(torch.zeros(2), draw())
    with torch.no_grad():
        tuning.trainables[0].values.copy_(torch.cat([torch.tensor([0.05, -0.05]), numbers]))
    close(tuning.vector(), [-0.35, 0.55])
    assert tuning_of(model) is tuning
    close(merge(model).block[0].weight.detach(), [[0.5, -0.45], [0.75, 1.0]])
