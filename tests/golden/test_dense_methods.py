"""The dense methods on four weights, by hand: what trains, what travels, what the layer computes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmask.channel import Received, Terms, down_way, receive, up_codec, whole_frame
from fedmask.config import RunConfig, TaskConfig, TrainConfig
from fedmask.errors import ConfigError
from fedmask.layout import Layout, Segment
from fedmask.methods import METHODS, backbone_trainables
from fedmask.space import backbone_of
from fedmask.tasks import Tokenized
from fedmask.trainables import Bottlenecks, DenseTensors, LoRA, Trainable, WholeTensors, biases
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
    """A generator that knows few numbers."""

    def standard_normal(self, size: int) -> np.ndarray:
        return np.full(size, 1.0)

    def uniform(self, low: float, high: float, size: int) -> np.ndarray:
        assert (low, high, size) == (pytest.approx(-(2**-0.5)), pytest.approx(2**-0.5), 2)
        return np.array([0.2, 0.1])


def of(method: str, **changes: Any) -> RunConfig:
    return RunConfig(tasks=(TaskConfig(name="bbc", clients=1),), method=method, **changes)


def lora(model: nn.Module, *, freeze_down: bool = False) -> LoRA:
    return LoRA(model, draws, rank=1, alpha=2.0, targets="linear", freeze_down=freeze_down)


def draws(_: str) -> Any:
    return Draws()


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


def test_ffn_bias_moves_the_feed_forward_bias_alone() -> None:
    # Two layers that start as the identity, the first one named as attention is: its bias stays. The vector
    # is the second one's: received (0.2, -0.1), so b = (0.5, 0) + (0.2, -0.1) = (0.7, -0.1).
    # x = (1, 2) + (0.5, 0) = (1.5, 2); y = x + b = (2.2, 1.9); prediction 2.2 + 3.8 = 6, off by 3, d = 6;
    # d / d b = 6 (1, 2) = (6, 12); the change is -0.1 times that. No adapter, so no other step size.
    model = Four()
    model.base_model.attention = copy.deepcopy(model.base_model.block)
    model.base_model.forward = lambda x: model.base_model.block[0](model.base_model.attention[0](x))  # type: ignore[method-assign]
    (trainable,) = backbone_trainables(METHODS["ffn-bias"], model, None, of("ffn-bias"))
    assert (trainable.segment, list(trainable.names)) == ("bias", ["block.0.bias"])
    assert step(model, trainable, [0.2, -0.1]) == pytest.approx([-0.6, -1.2])


def test_full_moves_every_weight() -> None:
    # d / d W = (d / d y) x^T = (5, 10)^T (1, 2) = | 5 10 | and d / d b = (5, 10), as above.
    #                                              | 10 20 |
    model = Four()
    trainable = WholeTensors("backbone", backbone_of(model), ["block.0.weight", "block.0.bias"])
    assert step(model, trainable, [0] * 6) == pytest.approx([-0.5, -1, -1, -2, -0.5, -1], rel=1e-6)
    assert trainable.values.numel() == 0  # the weights' copy is given back after training


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


def test_ffa_lora_moves_b_alone_and_its_mean_is_the_mean_of_products() -> None:
    # A = (0.2, 0.1) stays. Received B = (0.1, 0.2): A x = 0.4, y = (1.5, 2) + 2 * 0.4 (0.1, 0.2)
    # = (1.58, 2.16); prediction 1.58 + 4.32 = 5.9, off by 2.9, d = 5.8, d / d y = (5.8, 11.6);
    # d / d B = 2 * 0.4 (5.8, 11.6) = (4.64, 9.28).
    model = Four()
    assert step(model, lora(model, freeze_down=True), [0.1, 0.2]) == pytest.approx([-0.464, -0.928])
    weights = []
    for up in ([0.1, 0.2], [0.3, 0.6], [0.2, 0.4]):
        model = Four()
        attach(model, [lora(model, freeze_down=True)])
        with tuned(model, np.array(up, np.float32), Stream(1, 1, 0)):
            weights.append(merge(model).base_model.block[0].weight.detach())
    assert torch.allclose((weights[0] + weights[1]) / 2, weights[2])


def test_an_adapter_from_its_drawn_start() -> None:
    # One hidden unit, W_down = (0.01, 0.01), W_up = (0.01, 0.01), biases zero (deviation 0.01, draws of 1).
    # h = (1.5, 2); hidden = ReLU(0.035) = 0.035; y = h + 0.035 (0.01, 0.01) = (1.50035, 2.00035);
    # prediction 1.50035 + 4.0007 = 5.50105, off by 2.50105, d = 5.0021, d / d y = (5.0021, 10.0042);
    # d / d b_up is that; d / d W_up = 0.035 times it = (0.1750735, 0.350147);
    # d / d hidden = 0.01 (5.0021 + 10.0042) = 0.150063 = d / d b_down; d / d W_down = 0.150063 (1.5, 2).
    model = Four()
    adapter = Bottlenecks(model, draws, bottleneck=1)
    assert adapter.layers == ["block.0"]
    expected = [-0.02250945, -0.0300126, -0.0150063, -0.01750735, -0.0350147, -0.50021, -1.00042]
    assert step(model, adapter, [0] * 7) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match="'adapter' stays beside the model's layers and cannot be folded"):
        merge(model)


def test_flasc_sends_the_largest_weights_down_and_the_largest_changes_up() -> None:
    # The server holds A = (0.2, 0.12), B = (0.1, 0.05): of A, whose start is (0.2, 0.1), little has changed.
    # Half of it goes down, by weight: A whole, and B = (0, 0). By change it would have been B.
    # The client's step: A x = 0.44; d / d B = 2 * 0.44 (5, 10) = (4.4, 8.8), d / d A = 0, as above.
    # A quarter goes up, by change: -0.88 for the second value of B.
    model = Four()
    factors = lora(model)
    terms = Terms(Layout((Segment("lora", 4),)), "ab" * 32, origin=factors.origin().numpy())
    server = np.array([0.0, 0.02, 0.1, 0.05], np.float32)
    frame = whole_frame(server, 1, terms, down_way("topk:0.5/fp32+noef").codec)
    received = receive(frame, Received(0, np.zeros(4, np.float32)), 1, lambda _: terms).vector
    assert received.tolist() == pytest.approx([0, 0.02, 0, 0], abs=1e-7)
    change = np.array(step(model, factors, received.tolist()), np.float32)
    assert change.tolist() == pytest.approx([0, 0, -0.44, -0.88], abs=1e-6)
    up = up_codec("topk:0.25/fp32+noef")
    sent, carried = up.encode(change, None, None)
    assert up.decode(memoryview(sent), 4).tolist() == pytest.approx([0, 0, 0, -0.88], abs=1e-6)
    assert carried is None  # what is left out is lost

    # What is not sent of A is 0 for the client, not A's start: here B goes down, and A comes as (0, 0).
    server = np.array([-0.1, -0.05, 0.3, 0.4], np.float32)  # A = (0.1, 0.05)
    frame = whole_frame(server, 1, terms, down_way("topk:0.5/fp32+noef").codec)
    received = receive(frame, Received(0, np.zeros(4, np.float32)), 1, lambda _: terms).vector
    with tuned(model, received, Stream(1, 1, 0)):
        down, up_factor = factors.factors(0)
        assert not down.any() and up_factor.flatten().tolist() == pytest.approx([0.3, 0.4])


def test_flasc_sends_a_quarter_unless_told() -> None:
    config, given = of("flasc"), of("flasc", up="topk:0.1/fp32+noef")
    assert (config.up, config.down) == ("topk:0.25/fp32+noef", "topk:0.25/fp32+noef")
    assert (given.up, given.down) == ("topk:0.1/fp32+noef", config.down)
    assert of("lora").up == "fp32"


def test_numbers_of_parameters_in_the_papers_setups() -> None:
    """On the shapes of real models, without their values. A figure that a paper prints is named as such."""
    import transformers as t

    with torch.device("meta"):
        roberta = t.AutoModel.from_config(t.RobertaConfig(vocab_size=50265, max_position_embeddings=514))
        large = t.AutoModel.from_config(
            t.BertConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
            )
        )
        # Printed: 0.3 M on RoBERTa-base (LoRA, table 2), which is rank 8 on query and value: 24 x 8 x 1536.
        assert round(LoRA(roberta, draws_of_shape, rank=8).size / 1e6, 1) == 0.3
        assert LoRA(roberta, draws_of_shape, rank=8).size == 294_912
        # By the rule: FFA-LoRA trains half of that.
        assert LoRA(roberta, draws_of_shape, rank=8, freeze_down=True).size == 294_912 // 2
        # By the rule: one adapter of size 64 a block of BERT-large, Pfeiffer's choice.
        assert Bottlenecks(large, draws_of_shape, bottleneck=64).size == 24 * (2 * 64 * 1024 + 64 + 1024)
        # Printed: 0.1 M for BitFit on RoBERTa-base (LoRA, table 2).
        sizes = dict(backbone_of(roberta).named_parameters())
        assert sum(sizes[name].numel() for name in biases(roberta)) == 102_144


def test_flasc_s_own_setups_by_its_rule() -> None:
    """No figure is printed in FLASC's paper or code (imkevinkuo/flasc) that could be found: its code prints
    what it trains when it starts. These are its models.py's choices: rank 16, and the head besides.
    """
    import transformers as t

    with torch.device("meta"):
        vit = t.ViTModel(t.ViTConfig(), add_pooling_layer=False)
        gpt2 = t.AutoModelForSequenceClassification.from_config(t.GPT2Config(num_labels=20))
    with torch.device("meta"):
        # CIFAR-10: query and value of ViT-B/16, 12 x 2 x 16 x (768 + 768), and a head of ten classes.
        factors = LoRA(vit, draws_of_shape, rank=16).size
        assert factors == 589_824 and factors + 768 * 10 + 10 == 597_514
        # 20 newsgroups: c_attn, c_proj (of attention and feed-forward) and c_fc of GPT-2, and 20 classes.
        factors = LoRA(gpt2, draws_of_shape, rank=16, targets="c_attn+c_proj+c_fc").size
        assert factors == 12 * 16 * ((768 + 2304) + (768 + 768) + (768 + 3072) + (3072 + 768))
        assert factors + sum(p.numel() for p in gpt2.score.parameters()) == 2_374_656


def draws_of_shape(purpose: str) -> Any:
    return np.random.default_rng(0)
