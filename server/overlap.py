"""How far the clients' own masks would overlap: what a mask per client costs, measured on the run's shards.

For comparison only. It needs every client's rows and dense gradients, so it works where the server can
read the task's whole source (simulations); it takes no part in the run and is charged to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedmask.costs import union_sizes
from fedmask.masks import Mask, Rule, derive_mask
from fedmask.masks.overlap import overlap_facts, overlap_figures
from fedmask.workspace import Workspace

MOST_CLIENTS = 32  # gradients of more would take longer than a small run itself


def measured_unions(
    workspace: Workspace, schedule: Sequence[Sequence[int]], own: Mapping[int, np.ndarray] | None = None
) -> tuple[list[int] | None, dict[str, Any]]:
    """(size of the union that each round's clients would receive, figures for ``summary.json``).

    ``own``: int64 by client, the masks that the run's clients had of their own. Without them each client's
    mask is the k entries of largest mean gradient over ``overlap_batches`` of its batches.
    (None, {}) for a method without a mask, with ``overlap_batches`` 0, and for more clients than
    ``MOST_CLIENTS``, and where clients have rows of their own.
    """
    config = workspace.config
    clients = sorted({client for sampled in schedule for client in sampled})
    mask = workspace.mask
    if own and len(clients) <= MOST_CLIENTS:
        unions = list(union_sizes(own, schedule)) if own.keys() >= set(clients) else None
        return unions, _facts(workspace, own, workspace.no_mask.rule)
    if mask is None or not config.overlap_batches or not 0 < len(clients) <= MOST_CLIENTS:
        return None, {}
    if any(workspace.is_own(client) for client in clients):
        return None, {}
    settings = config.scores.model_copy(update={"batches": config.overlap_batches})
    masks = {
        client: workspace.scores("gradient", client, settings).mask(mask.rule).indices for client in clients
    }
    # For comparison alone, in every run: no more than what its report says of it.
    figures = {"rule": "gradient", "batches": config.overlap_batches, "k": mask.k}
    return list(union_sizes(masks, schedule)), figures | overlap_figures(list(masks.values()))


def _facts(workspace: Workspace, masks: Mapping[int, np.ndarray], rule: Rule) -> dict[str, Any]:
    """Of the masks that the run's clients had: all that can be said."""
    space = workspace.space
    shared = derive_mask(workspace.backbone.model, replace(rule, name="magnitude", seed=0))
    found = {client: Mask(indices, space, rule) for client, indices in sorted(masks.items())}
    facts = overlap_facts(
        found, [workspace.task_of(client) for client in found], shared, workspace.config.seed
    )
    return {"rule": rule.name, "batches": 0, "union": round(facts["growth"][-1]["union"])} | facts
