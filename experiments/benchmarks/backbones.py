"""Backbones, masks and inputs to measure with; each contender gets modules of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from experiments.benchmarks.masking import MODELS
from fedmask.masks import Mask, magnitude_mask
from fedmask.models import load_backbone

SHAPES = {"minilm": "22M", "bert-base": "110M"}
WORDS = 30_000  # token numbers to draw from; both vocabularies have 30,522


def backbone(name: str) -> Any:
    """``minilm``: the bundled checkpoint; ``bert-base``: random weights of that shape. No dropout."""
    if name == "minilm":
        model: Any = load_backbone("minilm").model
        model.pooler = None
    else:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        model = BertModel(BertConfig(**MODELS[SHAPES[name]]), add_pooling_layer=False)
        for key, parameter in model.named_parameters():
            if key.endswith("dense.bias"):  # fresh ones are all zero, which no checkpoint's are
                nn.init.normal_(parameter, std=0.02)
    set_torch_dropout(model, 0.0)
    return model.train()


def set_torch_dropout(model: nn.Module, probability: float) -> None:
    """PyTorch's own dropout, as every user of transformers has it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def with_own_modules(model: Any, *, share: bool) -> Any:
    """A copy for one contender; ``share``: around the same memory, for those who change none of it."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()} if share else {}
    return copy.deepcopy(model, memo)


def mask_of(model: nn.Module, density: float) -> Mask:
    """The magnitude mask over the linear layers."""
    return magnitude_mask(model, density)


def inputs(rows: int, tokens: int, hidden: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tokens without padding [rows, tokens], and a direction [rows, tokens, hidden] for the loss."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(999, WORDS, (rows, tokens), generator=generator)
    direction = torch.randn(rows, tokens, hidden, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, direction
