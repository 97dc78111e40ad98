"""LoRA (Hu et al., arXiv 2106.09685) and SHiRA (Bhardwaj et al., arXiv 2406.13175) from the package peft."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from experiments.competitors.base import Contender, count
from fedmask.masks import Mask


def lora(model: nn.Module, mask: Mask) -> Contender:
    """Rank 8 on query and value, peft's choice for BERT; without dropout of its own."""
    from peft import LoraConfig

    return _wrapped(model, LoraConfig(r=8, target_modules=["query", "value"]))


def shira(model: nn.Module, mask: Mask) -> Contender:
    """Random entries of every linear layer in the blocks, of rank 1: as near to 0.5 % as peft gets."""
    from peft import ShiraConfig

    # As it is by default, but without a warning about it.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    inside = r".*\.layer\.\d+\..*(query|key|value|dense)"
    return _wrapped(model, ShiraConfig(r=1, target_modules=inside, random_seed=0))


def _wrapped(model: nn.Module, config: Any) -> Contender:
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft 0.21 asks transformers for something under its old name
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, config)
    chosen = [p for p in wrapped.parameters() if p.requires_grad]
    # SHiRA keeps a row and a column number, int32 each, for each of its values.
    indices = count(chosen) * 8 if type(config).__name__ == "ShiraConfig" else 0
    return Contender(wrapped, chosen, count(chosen), extra_bytes=indices)
