"""Which entries train: one file a rule, each a function ``(model, rule) -> Mask``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedmask.errors import ConfigError, expect, unknown
from fedmask.masks.base import Mask, Recipe, Rule, mask_from_indices, mask_size
from fedmask.masks.gradient import gradient_mask
from fedmask.masks.magnitude import largest, magnitude
from fedmask.masks.random import random
from fedmask.space import Eligible

RULES: dict[str, Callable[[nn.Module, Rule], Mask]] = {
    "magnitude": magnitude,
    "largest": largest,
    "random": random,
}


_LOAD = "load one first, as with transformers' AutoModel.from_pretrained"


def derive_mask(model: nn.Module, rule: Rule) -> Mask:
    """The mask that ``rule`` gives for ``model``'s checkpoint; ConfigError for an unknown rule."""
    expect("model", model, nn.Module, _LOAD)
    if rule.name not in RULES:
        raise ConfigError(unknown("mask rule", rule.name, RULES))
    return RULES[rule.name](model, rule)


def magnitude_mask(
    model: nn.Module, density: float = 0.005, eligible: Eligible = "linear", *, per_tensor: bool = False
) -> Mask:
    """PaFi's mask: the k = round(density x N) eligible entries of smallest |w|, at least one.

    ``eligible``: ``linear`` (weights of linear layers inside the blocks), ``linear+embeddings`` or
    ``all``; never the head or padding rows. One global threshold, or one a tensor with
    ``per_tensor``. Ranking uses the stored values cast to float32, whatever dtype was loaded; ties
    go by tensor order, then flat index. Source: arXiv 2305.16742; what differs: see
    ``fedmask.masks.magnitude``. Raises ConfigError for a density outside (0, 1], an unknown ``eligible``,
    and what is no model.
    """
    expect("model", model, nn.Module, _LOAD)
    return magnitude(model, Rule("magnitude", density, eligible, per_tensor))


__all__ = [
    "RULES",
    "Mask",
    "Recipe",
    "Rule",
    "derive_mask",
    "gradient_mask",
    "largest",
    "magnitude",
    "magnitude_mask",
    "mask_from_indices",
    "mask_size",
    "random",
]
