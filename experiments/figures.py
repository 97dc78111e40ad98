"""The figures of a run: quality against bytes, quality by round, and who holds which labels.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; lines differ in marker and
dash too, so that a grey print can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
OTHER = "#BBBBBB"
STYLE: dict[Any, Any] = {
    "figure.dpi": 140,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
}
QUALITY = "quality_bytes.png"
ROUNDS = "rounds.png"
LABELS = "labels.png"


def draw_figures(run: Run, folder: Path) -> list[str]:
    """Write the PNG files into ``folder`` and return their names, in the report's order."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    names = []
    with matplotlib.rc_context(STYLE):
        for name, draw in ((QUALITY, _quality), (ROUNDS, _rounds), (LABELS, _labels)):
            figure = Figure(layout="constrained")  # no pyplot: nothing global, no window
            draw(run, figure)
            figure.savefig(folder / name)
            names.append(name)
    return names


def cumulative_megabytes(run: Run) -> dict[int, float]:
    """Round -> MB (1e6 bytes) of payload over all clients, both directions, up to and with it.

    Masks and training: the closing evaluation carries the last round's number, but no score cost it.
    """
    by_round: dict[int, int] = {}
    for sent in run.ledger:
        if sent.kind != "evaluate" and sent.status != "aborted":
            by_round[sent.round] = by_round.get(sent.round, 0) + sent.payload_bytes
    out, total = {}, 0
    for row in run.rounds:
        total += by_round.get(row["round"], 0)
        out[row["round"]] = total / 1e6
    return out


def scores(run: Run, part: str, task: str) -> list[tuple[int, float]]:
    """(round, score) of ``task``: part ``dev`` (central), ``global`` or ``personal`` (on the clients)."""
    out = []
    for row in run.rounds:
        value: Any = row.get(part, {}).get(task)
        if isinstance(value, dict):
            value = value.get(run.metrics[task])
        if value is not None:
            out.append((row["round"], float(value)))
    return out


def _tasks(run: Run) -> Iterator[tuple[str, str, str]]:
    for i, task in enumerate(run.metrics):
        yield task, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def _every(points: list[tuple[int, float]]) -> int:
    """A marker on about every tenth of a long line."""
    return max(1, len(points) // 10)


def _quality(run: Run, figure: Figure) -> None:
    figure.set_size_inches(6.4, 4.0)
    axes = figure.subplots()
    megabytes = cumulative_megabytes(run)
    for task, colour, marker in _tasks(run):
        points = scores(run, "dev", task)
        axes.plot(
            [megabytes[r] for r, _ in points],
            [score for _, score in points],
            color=colour,
            marker=marker,
            markevery=_every(points),
            clip_on=False,  # round 0 stands on the axis
            label=f"{task} ({run.metrics[task]})",
        )
    axes.set_xlabel("payload of all clients so far, both directions (MB)")
    axes.set_ylabel("score on the dev split")
    axes.set_xlim(left=0)
    axes.legend(loc="best")


def _rounds(run: Run, figure: Figure) -> None:
    from matplotlib.lines import Line2D

    panels = list(_tasks(run))
    figure.set_size_inches(max(6.4, 4.2 * len(panels)), 3.8)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    kinds: tuple[tuple[str, Any, str], ...] = (
        ("dev", "-", "dev split, on the server"),
        ("global", "--", "held-out rows, as received"),
        ("personal", ":", "held-out rows, after local training"),
    )
    for axes, (task, colour, marker) in zip(grid, panels, strict=True):
        for shade, (part, line, _) in enumerate(kinds):
            points = scores(run, part, task)
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=colour, linestyle=line, marker=marker,
                    markevery=_every(points), clip_on=False, **_marker(shade),
                )  # fmt: skip
        axes.set_title(f"{task} ({run.metrics[task]})", loc="left")
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[0].set_ylabel("score")
    key = [
        Line2D([], [], color="#444444", linestyle=line, label=label, marker=MARKERS[0], **_marker(shade))
        for shade, (_, line, label) in enumerate(kinds)
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=len(kinds))


def _marker(shade: int) -> dict[str, Any]:
    """Filled for the first kind of score, hollow and smaller for the others."""
    return {"markersize": 6 - shade, "fillstyle": "full" if shade == 0 else "none"}


def _labels(run: Run, figure: Figure) -> None:
    tasks = list(run.metrics)
    clients = {task: [p for p in run.facts["partitions"] if p["task"] == task] for task in tasks}
    heights = [1.2 + 0.32 * len(clients[task]) for task in tasks]
    figure.set_size_inches(7.2, sum(heights) + 0.4)
    grid = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, task in zip(grid, tasks, strict=True):
        _label_bars(axes, task, clients[task])
        axes.set_xlabel("training rows")


def _label_bars(axes: Axes, task: str, clients: list[dict[str, Any]]) -> None:
    totals: dict[str, int] = {}
    for client in clients:
        for label, count in client["labels"].items():
            totals[label] = totals.get(label, 0) + count
    shown = sorted(totals) if len(totals) <= len(COLOURS) else sorted(totals, key=lambda x: -totals[x])[:7]
    names = [str(client["client"]) for client in clients]
    left = [0] * len(clients)
    groups = [
        (label, colour, [c["labels"].get(label, 0) for c in clients])
        for label, colour in zip(shown, COLOURS, strict=False)
    ]
    rest = [c["train_rows"] - sum(c["labels"].get(label, 0) for label in shown) for c in clients]
    if any(rest):
        groups.append(("other" if shown else "rows", OTHER if shown else COLOURS[0], rest))
    for label, colour, counts in groups:
        axes.barh(names, counts, left=left, color=colour, edgecolor="white", linewidth=0.5, label=label)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title(task, loc="left")
    axes.set_ylabel("client")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
