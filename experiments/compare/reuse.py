"""One backbone for all runs of a process: each gets a copy in memory instead of reading the files again.

And how many values a run sends and trains, whether its clients share one mask or not.
"""

from __future__ import annotations

import copy
from functools import lru_cache

from fedmask.config import RunConfig
from fedmask.layout import HEAD_PREFIX, sent
from fedmask.masks import mask_size
from fedmask.models import Backbone, load_backbone
from fedmask.tuner import tuning_of
from fedmask.views import View
from fedmask.workspace import Workspace, get_workspace

# Segments of masked values. Where clients' masks differ, a model at rest has none of them.
_MASKED = ("mask", "carried", "union")


@lru_cache(maxsize=1)
def _pristine(model: str) -> Backbone:
    return load_backbone(model)


def workspace_for(config: RunConfig) -> Workspace:
    """The process's workspace for ``config``, its backbone a copy of the one that was loaded first.

    A copy, because a run rounds and trains its own. Raises ConfigError when the model cannot be loaded.
    """
    workspace = get_workspace(config)
    if "backbone" not in workspace.__dict__:
        found = _pristine(config.model)
        if found.most_tokens is not None and config.train.max_tokens > found.most_tokens:
            return workspace  # it will say so itself
        workspace.use_backbone(Backbone(copy.deepcopy(found.model), found.tokenizer, found.source))
    return workspace


def mask_values(workspace: Workspace) -> int:
    """k: the entries that a client's mask holds, found yet or not; 0 for a method without a mask."""
    rule = workspace.rule
    return 0 if rule is None else mask_size(rule.density, workspace.space.eligible_size)


def sent_values(workspace: Workspace) -> int:
    """Values that a client sends in a round, heads outside."""
    segments = sent(workspace.layout(workspace.tasks[0], _unmasked(workspace))).segments
    beside = sum(s.size for s in segments if s.shared and s.name not in _MASKED)
    return beside + mask_values(workspace)


def trained_values(workspace: Workspace) -> int:
    """Values that an optimizer moves, heads outside. More than are sent where adapters are folded."""
    parts = tuning_of(workspace.model(workspace.tasks[0], _unmasked(workspace))).trainables
    beside = [p for p in parts if not p.segment.startswith(HEAD_PREFIX) and p.segment not in _MASKED]
    # Full fine-tuning's values are let go between rounds, so what is sent is the least that was trained.
    return max(sum(part.values.numel() for part in beside) + mask_values(workspace), sent_values(workspace))


def _unmasked(workspace: Workspace) -> View | None:
    """How to look at a model whose mask nobody has found yet; None where there is one, or none at all."""
    if workspace.rule is None or workspace.mask is not None:
        return None
    return View(workspace.no_mask, workspace.no_mask.indices)
