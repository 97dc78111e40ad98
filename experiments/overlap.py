"""The command ``fedmask overlap``: how far the masks that clients choose for themselves differ.

Each client's mask is found on its own shard, as a run with a mask per client would find it. Nothing is
trained with the masks: what is shown is how their union grows as clients are added, and what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from experiments.display import print_json, print_table
from experiments.results import size
from fedmask.codecs.indices import index_entropy_bytes
from fedmask.config import RunConfig
from fedmask.costs import independent_union
from fedmask.errors import ConfigError, unknown
from fedmask.masks import SCORERS, Mask, derive_mask
from fedmask.rng import rng_for
from fedmask.unions import union
from fedmask.workspace import Workspace, get_workspace
from server.record import write_json

MOST_CLIENTS = 64
ORDERS = 50
VALUE_BYTES = 4


def client_masks(workspace: Workspace, rule: str) -> dict[int, Mask]:
    """Each client's own mask by partition. Raises ConfigError for an unknown rule or too many clients."""
    config = workspace.config
    if rule not in SCORERS:
        raise ConfigError(f"--rule: {unknown('task-specific mask rule', rule, SCORERS)}")
    if config.clients > MOST_CLIENTS:
        raise ConfigError(
            f"expected at most {MOST_CLIENTS} clients, found {config.clients}; lower their number"
        )
    chosen = workspace.rule
    if chosen is None:
        raise ConfigError(f"method {config.method!r} has no mask to compare with; use one that has")
    return {client: workspace.scores(rule, client).mask(chosen) for client in range(config.clients)}


def overlap_facts(masks: Mapping[int, Mask], tasks: Sequence[str], shared: Mask, seed: int) -> dict[str, Any]:
    """What ``fedmask overlap`` shows, as plain values.

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


def show_overlap(config: RunConfig, rule: str, out: Path, *, as_json: bool) -> None:
    """Measure, write ``overlap.json`` and the figures into ``out``, and print. Raises FedmaskError."""
    from experiments.overlap_figures import draw_overlap

    workspace = get_workspace(config.model_copy(update={"method": "pafi"}))
    masks = client_masks(workspace, rule)
    assert workspace.rule is not None  # pafi has one
    shared = derive_mask(workspace.backbone.model, workspace.rule)
    tasks = [workspace.task_of(client) for client in sorted(masks)]
    facts = {"rule": rule, "density": config.density} | overlap_facts(masks, tasks, shared, config.seed)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "overlap.json", facts)
    figures = draw_overlap(facts, out)
    if as_json:
        print_json(facts | {"folder": str(out), "figures": figures})
        return
    _print(facts)
    print(f"Written: {out / 'overlap.json'}, {', '.join(str(out / name) for name in figures)}")


def _print(facts: Mapping[str, Any]) -> None:
    k = facts["k"]
    said = [
        ("each client's mask", f"{k:,} of {facts['eligible_size']:,} entries, rule {facts['rule']}"),
        ("mean Jaccard index of two clients", _share(facts["mean_jaccard"])),
        ("of two clients of one task", _share(facts["mean_jaccard_same_task"])),
        ("of two clients of different tasks", _share(facts["mean_jaccard_other_task"])),
        ("of a client and the shared mask", _share(facts["mean_jaccard_with_shared"])),
        ("entries that every client chose", f"{facts['chosen_by_all']:,}"),
        ("entries that one client alone chose", f"{facts['chosen_by_one']:,}"),
    ]
    print_table(f"Masks of {facts['clients']} clients", ("", ""), said, left=2)
    rows = [
        (
            row["clients"],
            f"{row['union']:,.0f}",
            f"{row['times_k']:.2f}",
            f"{row['independent'] / k:.2f}",
            size(row["down_bytes"]),
            size(row["index_bytes"]),
            size(row["shared_down_bytes"]),
        )
        for row in facts["growth"]
    ]
    header = (
        "clients",
        "union",
        "x k",
        "x k if independent",
        "values down",
        "its indices, once",
        "shared mask down",
    )
    print_table(
        "The union as clients are added, and what each client receives per round", header, rows, left=0
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
