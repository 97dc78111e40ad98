"""What a run will send, before anything runs: the messages of a run, built from shapes and counted.

What is not known before: replies that fail, and how far unequal masks overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from experiments.expected import Downlink, Pair, Size, joining, recipe_of, scores_size, slowest, up_size
from fedmask.channel import Terms, down_way, value_bytes
from fedmask.config import RunConfig
from fedmask.costs import RunFacts, compare, lora_values, query_value_shapes
from fedmask.errors import ConfigError, unknown
from fedmask.flower import ensure_identity
from fedmask.layout import Layout, sent
from fedmask.shapes import Shapes, read_shapes, task_layout
from fedmask.sharing import travelling
from fedmask.tasks import assignments, load_task
from server.rounds import sample_clients

LINKS = {"lte": (10.0, 50.0), "dsl": (10.0, 50.0), "cable": (50.0, 500.0), "lan": (1000.0, 1000.0)}
"""Our names for links: megabits a second up and down. Not measurements."""


def parse_link(text: str) -> tuple[float, float]:
    """``10/50`` (megabits a second up and down), or one of the names of ``LINKS``. Raises ConfigError."""
    if text in LINKS:
        return LINKS[text]
    try:
        up, down = (float(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(
            f"--link: expected UP/DOWN in Mbit/s, such as 10/50, or one of {', '.join(LINKS)}, found {text!r}"
        ) from None
    if not (0 < up < math.inf and 0 < down < math.inf):
        raise ConfigError(f"--link: expected two speeds above 0, found {text!r}")
    return up, down


def label_counts(config: RunConfig, text: str | None) -> dict[str, int]:
    """Outputs of each task's head: ``3`` for all of them, ``tweets=3,bbc=5``, or None: read the tasks' rows.

    A regression has 1. Raises ConfigError, and DataError for rows that are not at hand.
    """
    names = [task.name for task in config.tasks]
    if text is None:
        found = {task.name: load_task(task) for task in config.tasks}
        return {name: len(d.labels) if d.kind == "classification" else 1 for name, d in found.items()}
    parts = [part.rpartition("=") for part in text.split(",")]
    for name, _, count in parts:
        if name and name not in names:
            raise ConfigError(f"--labels: {unknown('task', name, names)}")
        if not count.strip().isdigit() or int(count) < 1:
            raise ConfigError(
                f"--labels: expected numbers of labels, found {text!r}; give 2, or {names[0]}=2"
            )
    given = {name: int(count) for name, _, count in parts}
    missing = [name for name in names if name not in given and "" not in given]
    if missing:
        raise ConfigError(f"--labels: none for task {missing[0]!r}; add {missing[0]}=2")
    return {name: given.get(name, given.get("", 0)) for name in names}


def estimate(config: RunConfig, labels: Mapping[str, int], link: tuple[float, float]) -> dict[str, Any]:
    """The whole estimate as plain values, every size in bytes and every time in seconds.

    ``labels``: outputs of each task's head; ``link``: each client's own, in megabits a second up and down.
    ``rows``: as the ledger would sum them by kind and direction. ``seconds``: transfer alone, of the slowest
    client in each round; no training, no latency. Raises ConfigError.
    """
    if config.has_views:
        raise ConfigError(
            "estimate: expected one fixed mask, found masks that differ by client or round (placement, "
            "mask_schedule): how much of them is new each time is known only by the run"
        )
    ensure_identity()
    shapes = read_shapes(config)
    changes = down_way(config.down).change
    if shapes.products and changes and config.server.clients_per_round:
        raise ConfigError(
            f"estimate: method {config.method!r} sends a client what it has missed of the residual, and with"
            " server.clients_per_round only the run knows what that is; leave it out"
        )
    tasks = [task for task, _ in assignments(config)]
    layouts = {
        task.name: travelling(
            task_layout(shapes, task.name, labels[task.name], config.head), config.server.sharing
        )
        for task in config.tasks
    }
    schedule = [sample_clients(config, range(config.clients), r) for r in range(1, config.rounds + 1)]
    before = joining(config, shapes)
    down = {
        task: shapes.products.change(Terms(layout, "")).layout if shapes.products and changes else layout
        for task, layout in layouts.items()
    }
    layouts = {task: sent(layout) for task, layout in layouts.items()}
    steps = [
        *(("mask", [one] * config.clients) for one in before),
        *_rounds(config, layouts, down, tasks, schedule),
    ]
    found: dict[tuple[str, str], list[Size]] = {}
    for kind, clients in steps:
        for way in ("down", "up"):
            found.setdefault((kind, way), []).extend(client[way] for client in clients)
    rows = [
        {"kind": kind, "direction": way, "messages": len(sizes), **_named(_total(sizes))}
        for (kind, way), sizes in found.items()
    ]
    each = {way: _named(_mean(found["train", way])) for way in ("up", "down")}
    return {
        "model": config.model,
        "method": config.method,
        "codec": {"up": config.up, "down": config.down},
        "backbone_size": shapes.backbone_size,
        "layout": {task: [[s.name, s.size] for s in layout.segments] for task, layout in layouts.items()},
        "rows": rows,
        "total": {
            key: sum(row[key] for row in rows) for key in ("messages", "payload_bytes", "message_bytes")
        },
        "per_client_round": each,
        "bits_per_backbone_parameter": {
            way: 8 * one["payload_bytes"] / shapes.backbone_size for way, one in each.items()
        },
        "link": {"up_mbit": link[0], "down_mbit": link[1]},
        "seconds": {
            "round": max(slowest(clients, link) for kind, clients in steps if kind == "train"),
            "run": sum(slowest(clients, link) for _, clients in steps),
        },
        "costs": _other_ways(config, shapes, layouts, tasks, schedule, before),
    }


def _rounds(
    config: RunConfig,
    up: Mapping[str, Layout],
    down: Mapping[str, Layout],
    tasks: Sequence[str],
    schedule: Sequence[Sequence[int]],
) -> list[tuple[str, list[Pair]]]:
    """What the clients of each round exchange, and all of them in the closing evaluation."""
    links = {task: Downlink(config.down, layout) for task, layout in down.items()}
    sizes = {task: up_size(config.up, layout) for task, layout in up.items()}
    out: list[tuple[str, list[Pair]]] = []
    for clients in schedule:
        out.append(("train", [{"down": links[tasks[c]].receive(c), "up": sizes[tasks[c]]} for c in clients]))
        for one in links.values():
            one.end_round()
    said = scores_size()
    everyone = range(config.clients)
    out.append(("evaluate", [{"down": links[tasks[c]].receive(c), "up": said} for c in everyone]))
    return out


def _total(sizes: Sequence[Size]) -> Size:
    return sum(sizes, Size(0, 0))


def _mean(sizes: Sequence[Size]) -> Size:
    total = _total(sizes)
    return Size(round(total.payload / len(sizes)), round(total.message / len(sizes)))


def _named(size: Size) -> dict[str, int]:
    return {f"{key}_bytes": value for key, value in asdict(size).items()}


def _other_ways(
    config: RunConfig,
    shapes: Shapes,
    layouts: Mapping[str, Layout],
    tasks: Sequence[str],
    schedule: Sequence[Sequence[int]],
    before: Sequence[Pair],
) -> dict[str, Any]:
    changes = down_way(config.down).change
    heads = {task: layout.size - layout.shared_size for task, layout in layouts.items()}
    found = compare(
        RunFacts(
            k=shapes.k,
            eligible_size=shapes.space.eligible_size if shapes.space else 0,
            backbone_size=shapes.backbone_size,
            client_heads=[heads[task] for task in tasks],
            schedule=schedule,
            beside=sent(Layout(shapes.shared)).size - shapes.k,
            down_alone=shapes.products.down_size(changes) if shapes.products else 0,
            up_value_bytes=value_bytes(config.up),
            down_value_bytes=value_bytes(config.down),
            changes_down=changes,
            recipe_bytes=len(recipe_of(config).encode()),
            once_up_bytes=sum(one["up"].payload for one in before),
            once_down_bytes=sum(one["down"].payload for one in before),
            lora_values=lora_values(
                query_value_shapes(list(shapes.backbone), list(shapes.backbone.values()))
            ),
        )
    )
    return {way: cost.to_dict() for way, cost in found.items()}
