"""How far masks that clients choose for themselves lie apart, and what their union costs.

Nothing is trained with the masks here: what is counted is how many entries two of them share, how their
union grows as clients are added, and what a client then has to be sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from fedmask.codecs.indices import index_entropy_bytes
from fedmask.costs import independent_union
from fedmask.masks.base import Mask
from fedmask.rng import rng_for
from fedmask.unions import union

ORDERS = 50
VALUE_BYTES = 4


def overlap_facts(masks: Mapping[int, Mask], tasks: Sequence[str], shared: Mask, seed: int) -> dict[str, Any]:
    """All figures as plain values, for JSON.

    ``tasks``: each client's task; ``shared``: the magnitude mask of the same size, for comparison. The
    union's growth is the mean over random orders of the clients, which ``seed`` draws.
    """
    indices = [masks[client].indices for client in sorted(masks)]
    jaccard = [[_jaccard(one, other) for other in indices] for one in indices]
    pairs = [(a, b) for a, b in combinations(range(len(indices)), 2)]
    same = [jaccard[a][b] for a, b in pairs if tasks[a] == tasks[b]]
    other = [jaccard[a][b] for a, b in pairs if tasks[a] != tasks[b]]
    counts = np.unique(np.concatenate(indices), return_counts=True)[1]
    return {
        "k": shared.k,
        "eligible_size": shared.space.eligible_size,
        "clients": len(indices),
        "tasks": list(tasks),
        "orders": ORDERS,
        "jaccard": jaccard,
        "mean_jaccard": _mean([jaccard[a][b] for a, b in pairs]),
        "mean_jaccard_same_task": _mean(same),
        "mean_jaccard_other_task": _mean(other),
        "mean_jaccard_with_shared": _mean([_jaccard(one, shared.indices) for one in indices]),
        "chosen_by_all": int(np.sum(counts == len(indices))),
        "chosen_by_one": int(np.sum(counts == 1)),
        "growth": _growth(indices, shared, seed),
        "layers": _layers(masks, shared),
    }


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    both = np.intersect1d(one, other, assume_unique=True).size
    return both / (one.size + other.size - both)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _growth(indices: Sequence[np.ndarray], shared: Mask, seed: int) -> list[dict[str, Any]]:
    """One row a number of clients: the union's size, and what a client receives because of it."""
    k, eligible, count = shared.k, shared.space.eligible_size, len(indices)
    sizes = np.zeros((ORDERS, count))
    rng = rng_for(seed, -1, -1, "overlap-orders")
    for number in range(ORDERS):
        known = np.empty(0, np.int64)
        for place, client in enumerate(rng.permutation(count)):
            known = union(known, indices[client])
            sizes[number, place] = known.size
    rows = []
    for clients in range(1, count + 1):
        found = sizes[:, clients - 1]
        mean = math.ceil(float(found.mean()))
        rows.append(
            {
                "clients": clients,
                "union": float(found.mean()),
                "least": int(found.min()),
                "most": int(found.max()),
                "times_k": float(found.mean()) / k,
                "independent": independent_union(k, eligible, clients),
                "down_bytes": VALUE_BYTES * mean,
                "index_bytes": math.ceil(index_entropy_bytes(mean, eligible)),
                "shared_down_bytes": VALUE_BYTES * k,
            }
        )
    return rows


def _layers(masks: Mapping[int, Mask], shared: Mask) -> list[dict[str, Any]]:
    """One row an eligible tensor: how many entries a client, their union and the shared mask have there."""
    space, everyone = shared.space, np.unique(np.concatenate([mask.indices for mask in masks.values()]))
    together = [part.size for part in space.split(everyone)]
    theirs = np.array([[part.size for part in space.split(mask.indices)] for mask in masks.values()])
    ours = [part.size for part in space.split(shared.indices)]
    return [
        {
            "tensor": name,
            "size": int(np.prod(shape)),
            "client_mean": float(theirs[:, number].mean()),
            "client_least": int(theirs[:, number].min()),
            "client_most": int(theirs[:, number].max()),
            "union": int(together[number]),
            "shared": int(ours[number]),
        }
        for number, (name, shape) in enumerate(zip(space.names, space.shapes, strict=True))
    ]
