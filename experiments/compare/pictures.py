"""A study's figures: quality against bytes, the bytes that a goal costs, and how unions of masks grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.compare.study import Study
from experiments.compare.summary import Summary, goals
from experiments.figures import COLOURS, MARKERS, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUALITY = "quality_bytes.png"
GOAL = "bytes_to_goal.png"
GROWTH = "union_growth.png"
_LINES = ("-", "--", ":", "-.")


def draw(study: Study, rows: Sequence[Summary], folder: Path) -> list[str]:
    """Write the PNG files that the results allow into ``folder``; their names."""
    import matplotlib
    from matplotlib.figure import Figure

    done = [row for row in rows if row.curve]
    if not done:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    names = [QUALITY, *([GOAL] if goals(study, rows) else [])]
    names += [GROWTH] if any(row.overlap for row in done) else []
    drawn = {QUALITY: _quality, GOAL: _goal, GROWTH: _growth}
    with matplotlib.rc_context(STYLE):
        for name in names:
            figure = Figure(layout="constrained")  # no pyplot: nothing global, no window
            drawn[name](study, done, figure)
            figure.savefig(folder / name)
    return names


def _quality(study: Study, rows: Sequence[Summary], figure: Figure) -> None:
    figure.set_size_inches(8.0, 4.6)
    axes = figure.subplots()
    for number, row in enumerate(rows):
        # Before round 1 next to nothing has been sent, which a logarithmic axis has no place for.
        points = [point for point in row.curve if point.round]
        axes.plot(
            [point.payload_bytes / 1e6 for point in points],
            [100 * point.quality for point in points],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=_LINES[number // len(COLOURS) % len(_LINES)],
            markersize=5,
            label=row.name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("payload of all clients so far, both directions (MB, logarithmic)")
    axes.set_ylabel("quality on the reported rows (%)")
    axes.set_title(study.title or study.name, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _goal(study: Study, rows: Sequence[Summary], figure: Figure) -> None:
    found = goals(study, rows)
    figure.set_size_inches(8.0, 1.6 + 0.34 * len(rows))
    axes = figure.subplots()
    thick = 0.8 / len(found)
    for number, (share, goal) in enumerate(found.items()):
        for place, row in enumerate(rows):
            at = place + (number - (len(found) - 1) / 2) * thick
            point = row.reach(goal)
            if point is None or not point.round:
                where: dict[str, Any] = {
                    "transform": axes.get_yaxis_transform(),
                    "va": "center",
                    "fontsize": 7,
                }
                axes.text(0.01, at, "not reached", color=COLOURS[number], **where)
                continue
            axes.barh(at, point.payload_bytes / 1e6, thick, color=COLOURS[number], edgecolor="white",
                      linewidth=0.5)  # fmt: skip
            axes.annotate(
                f" round {point.round}",
                (point.payload_bytes / 1e6, at),
                va="center",
                fontsize=7,
                clip_on=False,
            )
        axes.barh(0, 0, 0, color=COLOURS[number], label=f"{share:.0%} of {study.full} ({100 * goal:.1f})")
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("payload of all clients, both directions, until the goal (MB, logarithmic)")
    axes.set_title(study.title or study.name, loc="left")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=len(found))


def _growth(study: Study, rows: Sequence[Summary], figure: Figure) -> None:
    """What a client receives of all masks together, in multiples of its own, as clients are added."""
    figure.set_size_inches(6.4, 4.0)
    axes: Any = figure.subplots()
    own = [row for row in rows if row.overlap]
    for number, row in enumerate(own):
        growth, k = row.overlap["growth"], row.overlap["k"]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        clients, alike = [one["clients"] for one in growth], row.overlap["mean_jaccard"]
        least, most = ([one[key] / k for one in growth] for key in ("least", "most"))
        axes.fill_between(clients, least, most, color=colour, alpha=0.2, linewidth=0)
        label = row.name if alike is None else f"{row.name} (mean Jaccard {alike:.2f})"
        axes.plot(clients, [one["times_k"] for one in growth], color=colour, marker=marker, markersize=5,
                  label=label)  # fmt: skip
    longest = max((row.overlap for row in own), key=lambda one: len(one["growth"]))
    axes.plot([one["clients"] for one in longest["growth"]],
              [one["independent"] / longest["k"] for one in longest["growth"]],
              color="#444444", linestyle="--", label="independent masks")  # fmt: skip
    axes.axhline(1.0, color="#444444", linestyle=":", label="one shared mask")
    axes.set_xlabel("clients with masks of their own")
    axes.set_ylabel("entries of all of them together, in masks")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(study.title or study.name, loc="left")
    axes.legend(loc="upper left")
