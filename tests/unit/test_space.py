"""Parameter spaces: sizes as published, names, padding rows, and which tensors are no backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmask.masks import magnitude_mask, mask_size
from fedmask.models import load_backbone
from fedmask.space import (
    ParameterSpace,
    backbone_of,
    backbone_parameters,
    checkpoint_digest,
    float32_chunks,
    linear_layers,
    parameter_space,
)
from fedmask.trainables import feed_forward_biases
from tests.support import config_of, make_model

# The bundled model's. Any change of these two breaks every mask that has been agreed on.
CHECKPOINT = "a23673fe34fd9c1355e501f105392d5b06bd96f09ceb34da0a5c8d479d906346"
MASK = "a7e7708a8832ba31bf0ed9eff36b5ca9aa25aa7900211596f242100f7204d479"


def shapes_of(config: Any) -> nn.Module:
    """The architecture without its values."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)


def test_the_published_sizes_of_roberta_large() -> None:
    from transformers import RobertaConfig

    model = shapes_of(
        RobertaConfig(
            vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1,
        )
    )  # fmt: skip
    parameters = backbone_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == 354_310_144
    biases = feed_forward_biases(model)
    assert sum(parameters[name].numel() for name in biases) == 122_880 == 24 * (4096 + 1024)
    linear = sum(module.weight.numel() for _, module in linear_layers(model))  # type: ignore[operator]
    assert linear == 24 * 12 * 1024 * 1024
    assert mask_size(0.005, 354_310_144) == 1_771_551


def test_the_sizes_of_roberta_base() -> None:
    from transformers import RobertaConfig

    model = shapes_of(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
    parameters = backbone_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == 124_055_040 and len(parameters) == 197
    assert sum(parameters[name].numel() for name in feed_forward_biases(model)) == 46_080


def test_the_bundled_model() -> None:
    model = load_backbone("minilm").model
    parameters = backbone_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == 22_565_376
    assert sum(parameters[name].numel() for name in feed_forward_biases(model)) == 11_520
    mask = magnitude_mask(model)
    assert (mask.k, mask.space.size, len(mask.space.names)) == (53_084, 10_616_832, 36)
    assert mask.space.names[:2] == (
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.0.attention.self.key.weight",
    )
    assert mask.space.checkpoint == CHECKPOINT
    assert mask.digest == MASK


def test_what_is_backbone_and_what_is_not() -> None:
    from transformers import BertForMaskedLM, GPT2LMHeadModel

    bert = BertForMaskedLM(config_of("bert"))
    names = list(backbone_parameters(bert))
    assert "embeddings.word_embeddings.weight" in names and not any("cls" in name for name in names)
    assert not any("pooler" in name for name in backbone_parameters(make_model("bert")))
    assert names == list(backbone_parameters(make_model("bert")))
    assert backbone_of(bert) is bert.bert and backbone_of(bert.bert) is bert.bert
    gpt2 = GPT2LMHeadModel(config_of("gpt2", tie_word_embeddings=False))
    assert gpt2.lm_head.weight is not gpt2.transformer.wte.weight
    assert list(backbone_parameters(gpt2)) == list(backbone_parameters(make_model("gpt2")))
    plain = nn.Linear(2, 2)
    assert backbone_of(plain) is plain and list(backbone_parameters(plain)) == ["weight", "bias"]


def test_split_cuts_where_the_tensors_meet() -> None:
    space = ParameterSpace(("a", "b", "c"), ((2, 2), (1,), (3,)), (0, 4, 5, 8), (), "00" * 32)
    assert (space.size, space.eligible_size) == (8, 8)
    parts = space.split(np.array([0, 3, 5, 7]))
    assert [part.tolist() for part in parts] == [[0, 3], [], [0, 2]]
    assert [part.tolist() for part in space.split(np.array([4]))] == [[], [0], []]


def test_the_digest_covers_names_shapes_and_padding() -> None:
    base = (("a", "b"), ((2, 2), (1,)), (0, 4, 5), (), "00" * 32)
    others = [
        (("a", "c"), *base[1:]),
        (base[0], ((4, 1), (1,)), *base[2:]),
        (*base[:3], ((0, 1),), base[4]),
        (*base[:4], "01" * 32),
    ]
    digests = {ParameterSpace(*fields).digest for fields in [base, *others]}  # type: ignore[arg-type]
    assert len(digests) == 5


def test_the_checkpoint_digest_by_hand() -> None:
    """SHA-256 of JSON over [name, shape, SHA-256 of the little-endian float32 bytes]."""
    import hashlib
    import json

    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -0.0]]))
        model.bias.copy_(torch.tensor([0.5, 1e-40]))
    rows = [
        ["weight", [2, 2], hashlib.sha256(np.array([1, 2, 3, -0.0], "<f4").tobytes()).hexdigest()],
        ["bias", [2], hashlib.sha256(np.array([0.5, 1e-40], "<f4").tobytes()).hexdigest()],
    ]
    assert checkpoint_digest(model) == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert checkpoint_digest(model.double()) == checkpoint_digest(model.float())


def test_chunks_join_to_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmask import space

    monkeypatch.setattr(space, "CHUNK", 5)
    for tensor in (torch.arange(12.0).view(3, 4), torch.arange(12.0).view(3, 4).t(), torch.tensor(3.0)):
        parts = list(float32_chunks(tensor))
        assert all(0 < part.size <= 5 and part.dtype == np.float32 for part in parts)
        assert np.array_equal(np.concatenate(parts), tensor.reshape(-1).numpy())
    assert list(float32_chunks(torch.zeros(0, 3))) == []
    model = make_model("bert")  # and masks do not depend on where chunks end
    mask = magnitude_mask(model, 0.05, "all")
    monkeypatch.setattr(space, "CHUNK", 1 << 22)
    assert magnitude_mask(model, 0.05, "all") == mask


def test_padding_rows_in_the_middle_of_the_space() -> None:
    model = make_model("roberta")
    space = parameter_space(model, "linear+embeddings")
    words, positions = (
        space.offsets[0],
        space.offsets[space.names.index("embeddings.position_embeddings.weight")],
    )
    assert space.excluded == ((words, words + 32), (positions, positions + 32))
    other = make_model("roberta", pad_token_id=5)
    start = 5 * 32
    assert parameter_space(other, "linear+embeddings").excluded[0] == (start, start + 32)
