"""report.md and its figures, from a run's folder alone: nothing is trained, loaded or measured again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from experiments.figures import LABELS, QUALITY, ROUNDS, draw_figures, scores
from experiments.report_template import TEMPLATE
from experiments.runs import Run, comparisons, read_run, traffic


def write_report(folder: str | Path) -> Path:
    """Write ``report.md`` and ``figures/*.png`` into a finished run's folder; returns the report's path.

    Raises ConfigError when the folder holds no finished run.
    """
    run = read_run(folder)
    draw_figures(run, run.folder / "figures")
    path = run.folder / "report.md"
    new = path.with_suffix(".md.new")
    new.write_text(render(run), encoding="utf-8")
    os.replace(new, path)
    return path


def render(run: Run) -> str:
    """The report's Markdown."""
    from jinja2 import Environment, StrictUndefined

    # No autoescape: this is Markdown, and the values come from the run itself. A cell must not end early.
    environment = Environment(undefined=StrictUndefined, autoescape=False, finalize=_cell)  # noqa: S701
    environment.globals.update(size=size, score=score)
    rows, notes = comparisons(run)
    return environment.from_string(TEMPLATE).render(
        config=run.config,
        record=run.record,
        facts=run.facts,
        summary=run.summary,
        clients=len(run.facts["partitions"]),
        trained=trained(run),
        quality=quality(run),
        traffic=traffic(run),
        comparisons=rows,
        notes=notes,
        lost=[{"round": row["round"], **reply} for row in run.rounds for reply in row["rejected"]],
        figures={"quality": QUALITY, "rounds": ROUNDS, "labels": LABELS},
        identity=_identity(run),
    )


def trained(run: Run) -> str:
    """What trains, in words: ``106168 of 22713216 backbone values (0.467 %) and a head a task``."""
    layout = next(iter(run.facts["layout"].values()))
    shared = sum(count for name, count in layout if not name.startswith("head/"))
    total = run.facts["backbone_size"]
    parts = ", ".join(f"{name} {count:,}" for name, count in layout if not name.startswith("head/"))
    return f"{shared:,} of {total:,} backbone values ({100 * shared / total:.3g} %: {parts or 'none'}) and a head a task"


def quality(run: Run) -> list[dict[str, Any]]:
    """One row a task: its metric on dev before and after training, and on test."""
    out = []
    for task, metric in run.metrics.items():
        dev = scores(run, "dev", task)
        out.append(
            {
                "task": task,
                "metric": metric,
                "before": dev[0][1] if dev else None,
                "dev": dev[-1][1] if dev else None,
                "test": run.summary["test"].get(task, {}).get(metric),
            }
        )
    return out


def score(value: float | None) -> str:
    """Three decimals, or a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def size(count: float) -> str:
    """Bytes for people, in powers of ten: ``212 B``, ``212.3 kB``, ``1.70 MB``."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.{2 if power > 3 else 1}f} {unit}"
    return f"{count:.0f} B"


def _cell(value: Any) -> Any:
    return value.replace("|", "\\|").replace("\n", " ") if isinstance(value, str) and "|" in value else value


def _identity(run: Run) -> list[tuple[str, str]]:
    rows = [("checkpoint", run.record["checkpoint_digest"])]
    if run.record["recipe"]:
        rows.append(("mask", run.record["recipe"]["mask_digest"]))
    rows.append(("final vector (sha256)", run.summary["vector_sha256"]))
    rows += sorted(run.record["versions"].items())
    return rows
