"""report.md and its figures, from a run's folder alone: nothing is trained, loaded or measured again."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from experiments.accounts import accounts, way_cells
from experiments.beside import read_beside, table
from experiments.figures import LABELS, QUALITY, ROUNDS, draw_figures
from experiments.overlap_figures import GROWTH, GROWTH_COLUMNS, JACCARD, LAYERS, draw_overlap, growth_cells
from experiments.report_template import TEMPLATE
from experiments.results import comparisons, quality, repeated, score, size, traffic, trained, usable
from experiments.runs import Run, read_run

log = logging.getLogger("flwr")


def write_report(folder: str | Path, beside: str | Path | None = None) -> Path:
    """Write ``report.md`` and ``figures/*.png`` into a finished run's folder; returns the report's path.

    ``beside``: another run on the same shards, which the report sets beside this one. Raises ConfigError when
    a folder holds no finished run, or the other one is on other shards.
    """
    run = read_run(folder)
    other = None if beside is None else read_beside(run, beside)
    draw_figures(run, run.folder / "figures")
    if overlap := _overlap(run):
        draw_overlap(overlap, run.folder / "figures")
    path = run.folder / "report.md"
    new = path.with_suffix(".md.new")
    new.write_text(render(run, other), encoding="utf-8")
    os.replace(new, path)
    return path


def report_of_complete(folder: Path) -> Path | None:
    """``write_report`` of a run that has just ended; None, with a line in the log, where that fails.

    The run is complete and cannot be lost by it: the report can be written at any time.
    """
    try:
        return write_report(folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("fedmask: no report (%s); it is written by: fedmask report %s", reason, folder)
        return None


def render(run: Run, other: Run | None = None) -> str:
    """The report's Markdown; ``other``: a run on the same shards to set beside it."""
    from jinja2 import Environment, StrictUndefined

    # No autoescape: this is Markdown, and the values come from the run itself. A cell must not end early.
    environment = Environment(undefined=StrictUndefined, autoescape=False, finalize=_cell)
    environment.globals.update(size=size, score=score, way_cells=way_cells)
    said = accounts(run)
    return environment.from_string(TEMPLATE).render(
        folder=run.folder.as_posix(),
        config=run.config,
        record=run.record,
        facts=run.facts,
        summary=run.summary,
        clients=len(run.facts["partitions"]),
        trained=trained(run),
        quality=quality(run),
        traffic=traffic(run),
        comparisons=comparisons(run),
        beside=None if other is None else (other, *table(run, other)),
        bits=said["bits_per_backbone_parameter"],
        formula=said["formula"],
        ways=said["ways"],
        wire=said["wire_bytes"],
        overlap=run.summary.get("overlap"),
        growth=(GROWTH_COLUMNS, growth_cells(overlap)) if (overlap := _overlap(run)) else None,
        evaluation=run.ledger.total(kind="evaluate"),
        lost=_lost(run),
        kept=usable(run),
        notes=[(row["round"], row["note"]) for row in run.rounds if row.get("note")],
        remarks=run.summary.get("notes", []),
        repeated=repeated(run),
        resumed=[one["after_round"] for one in run.record.get("resumed", [])],
        differs=[one["note"] for one in run.record.get("resumed", []) if "note" in one],
        figures={"quality": QUALITY, "rounds": ROUNDS, "labels": LABELS, "growth": GROWTH}
        | {"jaccard": JACCARD, "layers": LAYERS},
        identity=_identity(run),
    )


def _overlap(run: Run) -> dict[str, Any]:
    """How far the clients' own masks lie apart; empty where they had none, or by an older release.

    Masks that were measured for the comparison alone (``overlap_batches``) are left to ``fedmask overlap``.
    """
    found = run.summary.get("overlap") or {}
    return found if "growth" in found and not found["batches"] else {}


def _lost(run: Run) -> list[dict[str, Any]]:
    replies = [{"round": row["round"], **reply} for row in run.rounds for reply in row["rejected"]]
    return replies + [{"round": "end", **reply} for reply in run.summary.get("unscored", [])]


def _cell(value: Any) -> Any:
    return value.replace("|", "\\|").replace("\n", " ") if isinstance(value, str) and "|" in value else value


def _identity(run: Run) -> list[tuple[str, str]]:
    rows = [("checkpoint", run.record["checkpoint_digest"])]
    if run.facts["mask_digest"]:
        rows.append(("mask", run.facts["mask_digest"]))
    rows.append(("final vector (sha256)", run.summary["vector_sha256"]))
    rows += sorted(run.record["versions"].items())
    return rows
