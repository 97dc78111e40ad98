"""How far the clients' own masks would overlap: what a mask per client costs, measured on the run's shards.

For comparison only. It needs every client's rows and dense gradients, so it works where the server can
read the task's whole source (simulations); it takes no part in the run and is charged to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from fedmask.costs import union_sizes
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
        return unions, _figures(own, workspace.no_mask.rule.name, 0, workspace.k)
    if mask is None or not config.overlap_batches or not 0 < len(clients) <= MOST_CLIENTS:
        return None, {}
    if any(workspace.is_own(client) for client in clients):
        return None, {}
    settings = config.scores.model_copy(update={"batches": config.overlap_batches})
    masks = {
        client: workspace.scores("gradient", client, settings).mask(mask.rule).indices for client in clients
    }
    figures = _figures(masks, "gradient", config.overlap_batches, mask.k)
    return list(union_sizes(masks, schedule)), figures


def _figures(masks: Mapping[int, np.ndarray], rule: str, batches: int, k: int) -> dict[str, Any]:
    return {
        "rule": rule,
        "batches": batches,
        "clients": len(masks),
        "k": k,
        "union": int(np.unique(np.concatenate(list(masks.values()))).size),
        "mean_jaccard": _mean_jaccard(list(masks.values())),
    }


def _mean_jaccard(masks: Sequence[np.ndarray]) -> float | None:
    """Mean over all pairs of |A and B| / |A or B|; None for a single mask."""
    shares = []
    for one, other in combinations(masks, 2):
        both = np.intersect1d(one, other, assume_unique=True).size
        shares.append(both / (one.size + other.size - both))
    return float(np.mean(shares)) if shares else None
