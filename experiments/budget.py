"""``--budget-bytes``: the finest codecs, and if need be the largest mask, whose messages fit a budget.

Budgeted are the whole messages of one client in one round of training, down and up, once the run is under way
(the first download of changes is smaller), as the ledger counts them. Codecs come first: int4 with its losses
made up for has cost no quality where we have measured it (docs/bytes.md), a smaller mask does. So
values are made coarser down to int4, then the mask smaller; coarser codecs still are for methods without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from experiments.expected import Downlink, up_size
from fedmask.config import RunConfig
from fedmask.errors import ConfigError
from fedmask.flower import ensure_identity
from fedmask.layout import Layout, Segment
from fedmask.methods import METHODS, TASK_SPECIFIC
from fedmask.products import METHOD as EXACT
from fedmask.shapes import read_shapes, task_layout
from fedmask.sharing import travelling

# Changes down only where all clients hold the newest version; else one that was not asked for long would
# be sent many of them, or the whole vector as fp32.
_ALL = [
    ("fp32", "fp32"),
    ("fp16", "fp16"),
    ("int8+ef", "int8+delta"),
    ("int4+ef", "int4+delta"),
    ("int2+ef", "int2+delta"),
    ("sign", "sign+delta"),
    ("topk:0.03/int4", "topk:0.03/int4+delta"),
]
_SOME = [
    ("fp32", "fp32"),
    ("fp16", "fp16"),
    ("int8+ef", "int8"),
    ("int4+ef", "int4"),
    ("sign", "int4"),
    ("topk:0.03/int4", "int4"),
]
_FINE_ENOUGH = 4  # so many of either before the mask is made smaller


def fit_budget(config: RunConfig, labels: Mapping[str, int], budget: int) -> tuple[RunConfig, str]:
    """``config`` with ``up``, ``down`` and, if need be, ``density`` changed to fit; and that in words.

    ``labels``: outputs of each task's head; ``budget``: bytes. Raises ConfigError that names the least budget
    that would do.
    """
    if config.method in TASK_SPECIFIC and config.placement == "client":
        raise ConfigError(
            "--budget-bytes: with placement 'client' the download grows with the union of the clients' masks;"
            " choose --up and --down yourself, and see fedmask estimate"
        )
    if config.method == EXACT:
        raise ConfigError(
            f"--budget-bytes: method {EXACT!r} allows few codecs down; choose --up and --down yourself, and"
            " see fedmask estimate"
        )
    ensure_identity()
    shapes = read_shapes(config)
    layouts = [
        travelling(task_layout(shapes, task.name, labels[task.name], config.head), config.server.sharing)
        for task in config.tasks
    ]
    largest = max(layouts, key=lambda layout: layout.size)
    asked = config.server.clients_per_round or config.clients
    ways = _ALL if asked == config.clients else _SOME
    if METHODS[config.method].mask is not None:
        ways = ways[:_FINE_ENOUGH]
    for up, down in ways:
        if (needed := round_bytes(up, down, largest)) <= budget:
            return _chosen(config, up, down, {}, needed, budget)
    up, down = ways[-1]
    entries = _most_entries(up, down, largest, budget) if shapes.space is not None else 0
    if shapes.space is None or not entries:
        least = round_bytes(up, down, _with_entries(largest, 1) if shapes.space else largest)
        raise ConfigError(
            f"--budget-bytes: method {config.method!r} needs at least {least:,} bytes a client and round"
            f" (up {up}, down {down}), found {budget:,}; give {least} or more, or another method"
        )
    needed = round_bytes(up, down, _with_entries(largest, entries))
    smaller = {"density": entries / shapes.space.eligible_size}
    return _chosen(config, up, down, smaller, needed, budget)


def round_bytes(up: str, down: str, layout: Layout) -> int:
    """Bytes of both messages of a client that took part in the round before."""
    link = Downlink(down, layout)
    link.receive(0)
    link.end_round()
    return link.receive(0).message + up_size(up, layout).message


def _chosen(
    config: RunConfig, up: str, down: str, more: Mapping[str, float], needed: int, budget: int
) -> tuple[RunConfig, str]:
    words = [f"up {up}", f"down {down}", *(f"{key} {value:.3g}" for key, value in more.items())]
    said = f"{', '.join(words)}: {needed:,} of {budget:,} bytes a client and round"
    return config.model_copy(update={"up": up, "down": down, **more}), said


def _most_entries(up: str, down: str, layout: Layout, budget: int) -> int:
    """The largest mask whose messages fit, 0 if none does."""
    low, high = 0, next(segment.size for segment in layout.segments if segment.name == "mask")
    while low < high:
        middle = (low + high + 1) // 2
        if round_bytes(up, down, _with_entries(layout, middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _with_entries(layout: Layout, entries: int) -> Layout:
    segments = tuple(Segment(s.name, entries) if s.name == "mask" else s for s in layout.segments)
    return replace(layout, segments=segments)
