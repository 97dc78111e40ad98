"""How far the clients' own masks would overlap: what a mask per client costs, measured on the run's shards.

For comparison only. It needs every client's rows and dense gradients, so it works where the server can
read the task's whole source (simulations); it takes no part in the run and is charged to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from fedmask.costs import union_sizes
from fedmask.workspace import Workspace

MOST_CLIENTS = 32  # gradients of more would take longer than a small run itself


def measured_unions(
    workspace: Workspace, schedule: Sequence[Sequence[int]]
) -> tuple[list[int] | None, dict[str, Any]]:
    """(size of the union that each round's clients would receive, figures for ``summary.json``).

    Each client's mask: the k entries of largest mean gradient over ``overlap_batches`` of its batches.
    (None, {}) for a method without a mask, with ``overlap_batches`` 0, and for more clients than
    ``MOST_CLIENTS``, and where clients have rows of their own.
    """
    config = workspace.config
    clients = sorted({client for sampled in schedule for client in sampled})
    mask = workspace.mask
    if mask is None or not config.overlap_batches or not 0 < len(clients) <= MOST_CLIENTS:
        return None, {}
    if any(workspace.is_own(client) for client in clients):
        return None, {}
    settings = config.scores.model_copy(update={"batches": config.overlap_batches})
    masks = {
        client: workspace.scores("gradient", client, settings).mask(mask.rule).indices for client in clients
    }
    everyone = np.unique(np.concatenate(list(masks.values())))
    return list(union_sizes(masks, schedule)), {
        "rule": "gradient",
        "batches": config.overlap_batches,
        "clients": len(clients),
        "k": mask.k,
        "union": int(everyone.size),
        "mean_jaccard": _mean_jaccard(list(masks.values())),
    }


def _mean_jaccard(masks: Sequence[np.ndarray]) -> float | None:
    """Mean over all pairs of |A and B| / |A or B|; None for a single mask."""
    shares = []
    for one, other in combinations(masks, 2):
        both = np.intersect1d(one, other, assume_unique=True).size
        shares.append(both / (one.size + other.size - both))
    return float(np.mean(shares)) if shares else None
