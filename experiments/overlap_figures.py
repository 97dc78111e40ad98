"""Table and figures of ``fedmask overlap``: the union's growth, who agrees with whom, where entries lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.figures import COLOURS, OTHER, STYLE
from experiments.results import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROWTH, JACCARD, LAYERS = "union_growth.png", "jaccard.png", "layers.png"
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
GROWTH_COLUMNS = (
    "clients",
    "union",
    "x k",
    "x k if independent",
    "values down",
    "its indices, once",
    "shared mask down",
)


def growth_cells(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the union's growth under ``GROWTH_COLUMNS``."""
    return [
        (
            str(row["clients"]),
            f"{row['union']:,.0f}",
            f"{row['times_k']:.2f}",
            f"{row['independent'] / facts['k']:.2f}",
            size(row["down_bytes"]),
            size(row["index_bytes"]),
            size(row["shared_down_bytes"]),
        )
        for row in facts["growth"]
    ]


def draw_overlap(facts: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the PNG files into ``folder``; their names. ``facts``: see ``overlap_facts``."""
    import matplotlib
    from matplotlib.figure import Figure

    names = []
    with matplotlib.rc_context(STYLE):
        for name, draw in ((GROWTH, _growth), (JACCARD, _jaccard), (LAYERS, _layers)):
            figure = Figure(layout="constrained")  # no pyplot: nothing global, no window
            draw(facts, figure)
            figure.savefig(folder / name)
            names.append(name)
    return names


def _growth(facts: Mapping[str, Any], figure: Figure) -> None:
    figure.set_size_inches(6.4, 4.0)
    axes: Any = figure.subplots()
    rows, k = facts["growth"], facts["k"]
    clients = [row["clients"] for row in rows]
    axes.fill_between(
        clients, [row["least"] / k for row in rows], [row["most"] / k for row in rows], color=COLOURS[0],
        alpha=0.2, linewidth=0, label=f"least to most of {facts['orders']} random orders",
    )  # fmt: skip
    axes.plot(clients, [row["times_k"] for row in rows], color=COLOURS[0], marker="o", markersize=4,
              label=f"masks by {facts['rule']}, measured")  # fmt: skip
    axes.plot(clients, [row["independent"] / k for row in rows], color=COLOURS[1], linestyle="--",
              label="independent masks")  # fmt: skip
    axes.axhline(1.0, color="#444444", linestyle=":", label="one shared mask")
    axes.set_xlabel("clients")
    axes.set_ylabel("size of the union, in k")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    scale = k * 4 / 1e6
    megabytes = axes.secondary_yaxis("right", functions=(partial(_times, scale), partial(_times, 1 / scale)))
    megabytes.set_ylabel("values down, per client and round (MB)")
    axes.legend(loc="upper left")


def _times(factor: float, values: Any) -> Any:
    return values * factor


def _jaccard(facts: Mapping[str, Any], figure: Figure) -> None:
    figure.set_size_inches(5.4, 4.6)
    axes: Any = figure.subplots()
    values = np.array(facts["jaccard"])
    shown = values.copy()
    np.fill_diagonal(shown, np.nan)  # each with itself says nothing and would set the scale
    image = axes.imshow(shown, cmap="viridis", vmin=0)
    names = [f"{client} {task}" for client, task in enumerate(facts["tasks"])]
    axes.set_xticks(range(len(names)), [str(client) for client in range(len(names))])
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.set_xlabel("client")
    figure.colorbar(image, label="Jaccard index of two clients' masks")


def _layers(facts: Mapping[str, Any], figure: Figure) -> None:
    """Tensors of a layer together; those of no layer by their own names."""
    sums: dict[str, list[float]] = {}
    for row in facts["layers"]:
        found = _LAYER.search(row["tensor"])
        name = f"layer {found.group(1)}" if found else row["tensor"]
        total = sums.setdefault(name, [0.0, 0.0, 0.0])
        for place, key in enumerate(("client_mean", "union", "shared")):
            total[place] += row[key]
    figure.set_size_inches(6.4, 1.4 + 0.45 * len(sums))
    axes: Any = figure.subplots()
    places = np.arange(len(sums))
    kinds = (
        ("a client's mask, mean", COLOURS[0]),
        (f"union of {facts['clients']} clients", COLOURS[1]),
        ("the shared mask", OTHER),
    )
    for number, (label, colour) in enumerate(kinds):
        values = np.array([total[number] for total in sums.values()])
        share = 100 * values / max(1.0, values.sum())
        axes.barh(places + (number - 1) * 0.27, share, 0.27, color=colour, label=label)
    axes.set_yticks(places, list(sums))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the mask's entries (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
