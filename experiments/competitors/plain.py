"""The floor below every method, full fine-tuning, and BitFit (Ben Zaken et al., arXiv 2106.10199)."""

from __future__ import annotations

from torch import nn

from experiments.competitors.base import Contender, count, train_only
from fedmask.masks import Mask


def floor(model: nn.Module, mask: Mask) -> Contender:
    """Forward pass and input gradients through every layer; trained is the first layer norm's bias alone."""
    first = next(name for name, _ in model.named_parameters() if name.endswith("LayerNorm.bias"))
    chosen = train_only(model, lambda name: name == first)
    return Contender(model, chosen, count(chosen))


def full(model: nn.Module, mask: Mask) -> Contender:
    """Every parameter of the backbone."""
    chosen = train_only(model, lambda name: not name.startswith("pooler"))
    return Contender(model, chosen, count(chosen))


def bitfit(model: nn.Module, mask: Mask) -> Contender:
    """Every bias."""
    chosen = train_only(model, lambda name: name.endswith("bias") and not name.startswith("pooler"))
    return Contender(model, chosen, count(chosen))
