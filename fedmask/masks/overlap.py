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
from fedmask.unions import Indices, find, union

ORDERS = 50
VALUE_BYTES = 4


def overlap_figures(indices: Sequence[Indices]) -> dict[str, Any]:
    """The few figures that are cheap: ``indices`` are the clients' masks (int64, sorted, unique)."""
    together, places = _placed(indices)
    jaccard = _jaccard(places, together.size)
    return {
        "clients": len(indices),
        "union": together.size,
        "mean_jaccard": _mean([jaccard[a][b] for a, b in combinations(range(len(indices)), 2)]),
    }


def overlap_facts(masks: Mapping[int, Mask], tasks: Sequence[str], shared: Mask, seed: int) -> dict[str, Any]:
    """All figures as plain values, for JSON.

    ``tasks``: each client's task; ``shared``: the magnitude mask of the same size, for comparison. The
    union's growth is the mean over random orders of the clients, which ``seed`` draws.
    """
    indices = [masks[client].indices for client in sorted(masks)]
    together, places = _placed(indices)
    jaccard = _jaccard(places, together.size)
    pairs = [(a, b) for a, b in combinations(range(len(indices)), 2)]
    same = [jaccard[a][b] for a, b in pairs if tasks[a] == tasks[b]]
    other = [jaccard[a][b] for a, b in pairs if tasks[a] != tasks[b]]
    counts = np.zeros(together.size, np.int64)
    for places_of_one in places:
        counts[places_of_one] += 1
    common = [int(np.count_nonzero(find(shared.indices, one)[1])) for one in indices]
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
        "mean_jaccard_with_shared": _mean(
            [_index(both, one.size, shared.k) for both, one in zip(common, indices, strict=True)]
        ),
        "chosen_by_all": int(np.sum(counts == len(indices))),
        "chosen_by_one": int(np.sum(counts == 1)),
        "growth": _growth(places, together.size, shared, seed),
        "layers": _layers(masks, together, shared),
    }


def _placed(indices: Sequence[Indices]) -> tuple[Indices, list[Indices]]:
    """The union of ``indices``, and where in it each of them lies: a flag an entry then stands for a set."""
    together = union(*indices)
    return together, [np.searchsorted(together, one) for one in indices]


def _jaccard(places: Sequence[Indices], size: int) -> list[list[float]]:
    """The index of each with each, ``[n][n]``; ``places``: see ``_placed``, of a union of ``size``."""
    out = [[1.0] * len(places) for _ in places]
    for a, one in enumerate(places):
        chosen = np.zeros(size, bool)
        chosen[one] = True
        for b in range(a + 1, len(places)):
            both = int(np.count_nonzero(chosen[places[b]]))
            out[a][b] = out[b][a] = _index(both, one.size, places[b].size)
    return out


def _index(both: int, one: int, other: int) -> float:
    return both / (one + other - both)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _growth(places: Sequence[Indices], size: int, shared: Mask, seed: int) -> list[dict[str, Any]]:
    """One row a number of clients: the union's size, and what a client receives because of it."""
    k, eligible, count = shared.k, shared.space.eligible_size, len(places)
    sizes = np.zeros((ORDERS, count))
    rng = rng_for(seed, -1, -1, "overlap-orders")
    for number in range(ORDERS):
        known, found = np.zeros(size, bool), 0
        for at, client in enumerate(rng.permutation(count)):
            found += places[client].size - int(np.count_nonzero(known[places[client]]))
            known[places[client]] = True
            sizes[number, at] = found
    rows = []
    for clients in range(1, count + 1):
        after = sizes[:, clients - 1]
        mean = math.ceil(float(after.mean()))
        rows.append(
            {
                "clients": clients,
                "union": float(after.mean()),
                "least": int(after.min()),
                "most": int(after.max()),
                "times_k": float(after.mean()) / k,
                "independent": independent_union(k, eligible, clients),
                "down_bytes": VALUE_BYTES * mean,
                "index_bytes": math.ceil(index_entropy_bytes(mean, eligible)),
                "shared_down_bytes": VALUE_BYTES * k,
            }
        )
    return rows


def _layers(masks: Mapping[int, Mask], everyone: Indices, shared: Mask) -> list[dict[str, Any]]:
    """One row an eligible tensor: how many entries a client, their union and the shared mask have there."""
    space = shared.space
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
