"""One backbone for all runs of a process: each gets a copy in memory instead of reading the files again."""

from __future__ import annotations

import copy
from functools import lru_cache

from fedmask.config import RunConfig
from fedmask.models import Backbone, load_backbone
from fedmask.workspace import Workspace, get_workspace


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
