"""A study's page, tables and figures, from its results alone: nothing is trained or measured again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.compare.campaign import all_results
from experiments.compare.choose import Result
from experiments.compare.pictures import draw
from experiments.compare.study import Study
from experiments.compare.summary import Summary, summarize
from experiments.compare.tables import Table, all_tables

PAGE = "report.md"


def write_comparison(
    study: Study,
    out: Path,
    command: str,
    counts: Callable[[Result], bool] = lambda result: True,
    note: str = "",
) -> list[Table]:
    """Write ``report.md``, ``tables/*.{md,csv,tex}`` and ``figures/*.png`` into ``out``; the tables.

    ``command``: what makes it all again, which stands above the tables. ``counts``: which results are left
    in, where the study's rows are at hand to tell (``Campaign.counts``); ``note``: what to say of it. Raises
    ConfigError for a damaged result.
    """
    rows = summarize(study, [result for result in all_results(out) if counts(result)])
    tables = all_tables(study, rows)
    figures = draw(study, rows, out / "figures")
    folder = out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        for ending, text in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            _write(folder / f"{table.name}.{ending}", text)
    _write(out / PAGE, page(study, rows, tables, figures, command, note))
    return tables


def page(
    study: Study,
    rows: Sequence[Summary],
    tables: Sequence[Table],
    figures: Sequence[str],
    command: str,
    note: str = "",
) -> str:
    """The study's page as Markdown."""
    parts = [f"# {study.title or study.name}\n", f"```sh\n{command}\n```\n", _setting(study)]
    parts += [f"![{name.removesuffix('.png')}](figures/{name})\n" for name in figures]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in tables]
    edges = [row.name for row in rows if row.winner is not None and row.winner.edge and not row.provisional]
    if edges:
        parts.append(f"At the edge of their grids, so a better rate may lie outside: {', '.join(edges)}.\n")
    return "\n".join([*parts, f"{note}\n"] if note else parts)


def _setting(study: Study) -> str:
    tasks = "; ".join(
        f"{task.name}: {task.clients} client{'s' if task.clients > 1 else ''}, {task.train_rows:,} training"
        f" rows, {task.validation_rows:,} validation rows, {task.metric}"
        for task in study.tasks[:4]
    )
    more = f" and {len(study.tasks) - 4} more tasks like these" if len(study.tasks) > 4 else ""
    words = (
        f"Tasks: {tasks}{more}. Seeds: {', '.join(map(str, study.seeds))}. Each variant's learning rate was"
        f" chosen on validation rows cut from the training file, with seed {study.seeds[0]}, by the"
        f" {study.select} round's score; the reported rows chose nothing. *final*: after the last round;"
        " *best*: at the round with the best validation score; *against*: the paired difference with its 95 %"
        " interval. Payload: values, masks and indices; all clients, both directions.\n"
    )
    reasons = [study.narrow, *(f"{one.name}: {one.narrow}" for one in study.variants if one.narrow)]
    narrow = "; ".join(filter(None, reasons))
    return words + (f"\nGrids narrower than a factor of 30: {narrow}\n" if narrow else "")


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
