"""A study's tables: the same cells as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.compare.budget import TOLERANCE
from experiments.compare.released import RELEASED, released_payload
from experiments.compare.study import Study
from experiments.compare.summary import Spread, Summary, goals
from experiments.results import size
from fedmask.methods import METHODS, TASK_SPECIFIC

Cells = Sequence[str]


@dataclass(frozen=True)
class Table:
    """``name``: of its files; ``title``: its caption; a header and rows of text."""

    name: str
    title: str
    header: Cells
    rows: Sequence[Cells]

    def markdown(self) -> str:
        """A Markdown table, without its caption."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
        )

    def csv(self) -> str:
        """Comma-separated, with a header line."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.header, *self.rows])
        return out.getvalue()

    def latex(self) -> str:
        """A ``table`` environment; needs no package."""
        columns = "l" + "r" * (len(self.header) - 1)
        lines = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in (self.header, *self.rows)]
        head, body = lines[0], "\n".join(lines[1:])
        return (
            f"\\begin{{table}}\n\\caption{{{_escaped(self.title)}}}\n\\begin{{tabular}}{{{columns}}}\n\\hline\n"
            f"{head}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n\\end{{table}}\n"
        )


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_SPECIAL |= {mark: "\\" + mark for mark in "&%$#_{}"}


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def all_tables(study: Study, rows: Sequence[Summary]) -> list[Table]:
    """Every table that the results allow, the main one first."""
    done = [row for row in rows if row.final is not None]
    tables = [_main(study, done), _cost(study, done)] if done else []
    tables += _equal(study, done)
    if len(done) > 1:
        tables.append(_budgets(done))
    if done and len(study.tasks) > 1:
        tables.append(_by_task(study, done))
    return [*tables, _search(rows), _state(study, rows)]


def _main(study: Study, rows: Sequence[Summary]) -> Table:
    found = goals(study, rows)
    header = ["variant", "lr", "sent values", "up / client round", "down / client round", "whole run"]
    header += ["final", "best", f"against {study.reference}"]
    header += [f"rounds, bytes to {share:.0%} of {study.full}" for share in found]
    cells = []
    for row in rows:
        n = row.numbers
        assert row.winner is not None
        line = [row.name, _rate(row), f"{n['sent_values']:,.0f}", size(n["up_per_client_round"]),
                size(n["down_per_client_round"]), size(n["payload"]), spread(row.final), spread(row.best),
                _against(row)]  # fmt: skip
        for goal in found.values():
            point = row.reach(goal)
            line.append("not reached" if point is None else f"{point.round}, {size(point.payload_bytes)}")
        cells.append(line)
    title = "Quality on the reported rows (mean ± standard deviation over the seeds) and payload bytes"
    return Table("quality", title, header, cells)


def _cost(study: Study, rows: Sequence[Summary]) -> Table:
    header = ("variant", "trained values", "head values", "stored result", "masks up / client",
              "masks down / client", "whole run, authors' format", "messages, whole run", "client CPU s",
              "peak memory")  # fmt: skip
    cells = []
    for row in rows:
        n = row.numbers
        peak = n.get("peak_memory_bytes")
        cells.append(
            [row.name, f"{n['trained_values']:,.0f}", f"{n['head_values']:,.0f}", size(n["stored_bytes"]),
             _masks(study, row, "up"), _masks(study, row, "down"), _released(row, rows), size(n["message"]),
             f"{n['client_seconds']:.1f}", size(peak) if peak else "-"]
        )  # fmt: skip
    return Table("cost", "What each variant trains, stores and costs", header, cells)


def _masks(study: Study, row: Summary, way: str) -> str:
    """Bytes that say which entries, by client: in messages of their own, and in those that train."""
    told = row.numbers.get(f"positions_{way}_per_client")
    settings = study.run | row.variant.settings
    if told is None and row.variant.method in TASK_SPECIFIC and settings.get("placement") == "client":
        return "in the updates"  # an older result, which did not count them apart
    return size(row.numbers[f"mask_{way}_per_client"] + (told or 0.0))


def _released(row: Summary, rows: Sequence[Summary]) -> str:
    method = row.variant.method
    if method not in TASK_SPECIFIC:
        return "-"
    if RELEASED[method] is None:
        return "none released"
    whole = [one.numbers["sent_values"] for one in rows if METHODS[one.variant.method].dense == "full"]
    backbone = row.numbers.get("backbone_size") or max(whole, default=0.0)  # older results do not say it
    if row.packed is None or not backbone:
        return "-"
    weights = backbone + row.numbers["head_values"]
    found = released_payload(method, row.numbers["payload"], row.packed, weights)
    return "-" if found is None else size(found)


def _equal(study: Study, rows: Sequence[Summary]) -> list[Table]:
    """The variants within 1 % of the reference's sent values, and of its bytes over the whole run."""
    reference = next((row for row in rows if row.name == study.reference), None)
    if reference is None:
        return []
    out = []
    views: tuple[tuple[str, str, Callable[[Summary], float]], ...] = (
        ("equal_values", "sent values", lambda row: row.numbers["sent_values"]),
        ("equal_bytes", "payload bytes over the whole run", lambda row: row.numbers["payload"]),
    )
    for name, words, value in views:
        goal = value(reference)
        near = [row for row in rows if abs(value(row) - goal) <= TOLERANCE * goal]
        if len(near) > 1:
            header = ("variant", "trained values", "sent values", "whole run", "final", "best",
                      f"against {study.reference}")  # fmt: skip
            cells = [
                [
                    row.name,
                    f"{row.numbers['trained_values']:,.0f}",
                    f"{row.numbers['sent_values']:,.0f}",
                    size(row.numbers["payload"]),
                    spread(row.final),
                    spread(row.best),
                    _against(row),
                ]
                for row in sorted(near, key=_quality, reverse=True)
            ]
            title = f"Equal {words}: within {TOLERANCE:.0%} of {reference.name}"
            out.append(Table(name, title, header, cells))
    return out


def budget_steps(rows: Sequence[Summary]) -> list[float]:
    """Round byte budgets (1, 2, 5, 10, ...) from the cheapest round to the dearest run."""
    points = [point.payload_bytes for row in rows for point in row.curve if point.round]
    steps = [lead * 10.0**power for power in range(3, 13) for lead in (1, 2, 5)]
    inside = [step for step in steps if min(points) <= step]
    return [step for i, step in enumerate(inside) if i == 0 or inside[i - 1] < max(points)]


def _budgets(rows: Sequence[Summary]) -> Table:
    steps = budget_steps(rows)
    cells = []
    for row in rows:
        points = [row.within(step) for step in steps]
        cells.append([row.name, *("-" if p is None else f"{100 * p.quality:.1f}" for p in points)])
    title = "Quality after the last round that a byte budget pays for (all clients, both directions)"
    return Table("budgets", title, ("variant", *(size(step) for step in steps)), cells)


def _by_task(study: Study, rows: Sequence[Summary]) -> Table:
    names = [task.name for task in study.tasks]
    cells = [[row.name, *(spread(row.by_task.get(name)) for name in names)] for row in rows]
    return Table("tasks", "Final quality by task", ("variant", *names), cells)


def _search(rows: Sequence[Summary]) -> Table:
    cells = []
    for row in rows:
        for lr in row.variant.lr:
            if lr in row.grid:
                score = row.grid[lr]
                won = row.winner is not None and row.winner.lr == lr
                note = ("best so far" if row.provisional else "chosen") if won else ""
                if won and row.winner is not None and row.winner.edge and not row.provisional:
                    note += ", edge of the grid"
                cells.append([row.name, f"{lr:g}", "failed" if score is None else f"{100 * score:.1f}", note])
    return Table("search", "The search: validation quality by learning rate, first seed",
                 ("variant", "learning rate", "validation", ""), cells)  # fmt: skip


def _state(study: Study, rows: Sequence[Summary]) -> Table:
    cells = []
    for row in rows:
        seeds = 0 if row.final is None else row.final.count
        whole = len(row.grid) == len(row.variant.lr) and seeds == row.wanted
        said = "complete" if whole else "not started" if not row.grid else "unfinished"
        cells.append([row.name, row.variant.method, f"{len(row.grid)} of {len(row.variant.lr)}",
                      f"{seeds} of {row.wanted}", said, "; ".join(row.errors)[:200]])  # fmt: skip
    header = ("variant", "method", "rates searched", "seeds", "", "failures")
    return Table("state", "What has run and what has not", header, cells)


def spread(found: Spread | None) -> str:
    """``93.4 ± 0.6`` in per cent; one seed has no deviation."""
    if found is None:
        return "-"
    if found.deviation is None:
        return f"{100 * found.mean:.1f} (1 seed)"
    more = "" if found.count > 2 else f" ({found.count} seeds)"
    return f"{100 * found.mean:.1f} ± {100 * found.deviation:.1f}{more}"


def _rate(row: Summary) -> str:
    assert row.winner is not None
    if row.provisional:
        return f"{row.winner.lr:g} ({len(row.grid)} of {len(row.variant.lr)} tried)"
    return f"{row.winner.lr:g}" + (" (edge)" if row.winner.edge else "")


def _against(row: Summary) -> str:
    if row.against is None:
        return "-"
    lower, mean, upper = (100 * value for value in row.against)
    return f"{mean:+.1f} [{lower:+.1f}, {upper:+.1f}]"


def _quality(row: Summary) -> float:
    assert row.final is not None
    return row.final.mean
