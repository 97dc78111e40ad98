"""Attention in plain products, offered to transformers under a name of its own.

Measured on CPUs (docs/performance.md): PyTorch's fused attention has a slow backward pass in bfloat16, and
with dropout it is no faster in float32 either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedmask.dropout import dropout as drop

NAME = "fedmask"


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(query key^T scaling + mask) value, with dropout on the softmax.

    ``query`` [batch, heads, L, d]; ``key`` and ``value`` may have fewer heads, each for a group of queries;
    ``attention_mask`` and ``position_bias`` are added to the scores [batch, heads, L, L]. Returns
    [batch, L, heads, d], and None where transformers looks for the softmax.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    biases = [bias for bias in (position_bias, attention_mask) if bias is not None]
    if torch.is_grad_enabled():
        scores = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), key.transpose(2, 3))
        weights = sum(biases, scores).softmax(-1)
        mixed = torch.matmul(drop(weights, dropout), value)
    else:  # for evaluation the fused one is as fast, and at long texts faster
        bias = sum(biases[1:], biases[0]) if biases else None
        mixed = functional.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def use_plain_attention(model: nn.Module) -> None:
    """Let ``model`` use ``attention`` if its architecture leaves the choice; else nothing changes."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    if isinstance(model, PreTrainedModel) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
