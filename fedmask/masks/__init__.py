"""Which entries train: one file a rule.

Rules without data are functions ``(model, rule) -> Mask`` (``RULES``): every holder of the checkpoint
derives the same mask. Task-specific rules give scores from labelled rows (``SCORERS``), from which one
party alone or several together choose the mask.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedmask.config import ScoreConfig
from fedmask.errors import ConfigError, DataError, expect, unknown
from fedmask.masks.base import Mask, Recipe, Rule, mask_from_indices, mask_size
from fedmask.masks.budgets import density_of, fish_entries, lt_sft_eligible
from fedmask.masks.channels import channels
from fedmask.masks.diff_pruning import diff_pruning
from fedmask.masks.fisher import fish
from fedmask.masks.gradient import gradient, gradient_mask
from fedmask.masks.lottery import lottery
from fedmask.masks.magnitude import largest, magnitude
from fedmask.masks.random import random, random_matched
from fedmask.masks.scores import Evidence, Scorer, Scores
from fedmask.masks.votes import agree_by_scores, agree_by_votes, pack_top_scores, pack_votes
from fedmask.space import Eligible, ParameterSpace

RULES: dict[str, Callable[[nn.Module, Rule], Mask]] = {
    "magnitude": magnitude,
    "largest": largest,
    "random": random,
    "random-matched": random_matched,
    "random-channels": channels,
}
SCORERS: dict[str, Scorer] = {
    "fish": fish,
    "lt-sft": lottery,
    "diff-pruning": diff_pruning,
    "gradient": gradient,
}


_LOAD = "load one first, as with transformers' AutoModel.from_pretrained"


def derive_mask(model: nn.Module, rule: Rule) -> Mask:
    """The mask that ``rule`` gives for ``model``'s checkpoint; ConfigError for an unknown rule."""
    expect("model", model, nn.Module, _LOAD)
    if rule.name not in RULES:
        raise ConfigError(unknown("mask rule", rule.name, RULES))
    return RULES[rule.name](model, rule)


def score_entries(
    name: str, model: nn.Module, space: ParameterSpace, evidence: Evidence, settings: ScoreConfig
) -> Scores:
    """The scores that the task-specific rule ``name`` gives; ConfigError for an unknown one.

    ``model``: a task's, head included, nothing attached, in evaluation mode; it is left as it was.
    ``space``: the eligible tensors, ``parameter_space(model, eligible)``. Raises DataError without rows.
    """
    if name not in SCORERS:
        raise ConfigError(unknown("task-specific mask rule", name, SCORERS))
    if not len(evidence.data):
        raise DataError(f"mask rule {name!r}: expected labelled rows, found none; give it a client with rows")
    return SCORERS[name](model, space, evidence, settings)


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
    "SCORERS",
    "Evidence",
    "Mask",
    "Recipe",
    "Rule",
    "Scorer",
    "Scores",
    "agree_by_scores",
    "agree_by_votes",
    "channels",
    "density_of",
    "derive_mask",
    "diff_pruning",
    "fish",
    "fish_entries",
    "gradient",
    "gradient_mask",
    "largest",
    "lottery",
    "lt_sft_eligible",
    "magnitude",
    "magnitude_mask",
    "mask_from_indices",
    "mask_size",
    "pack_top_scores",
    "pack_votes",
    "random",
    "random_matched",
    "score_entries",
]
