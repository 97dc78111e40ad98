"""The tables of docs/performance.md, made from the published results.

``python -m experiments.benchmarks.tables`` writes them anew between the page's ``<!-- name -->`` and
``<!-- end -->`` marks, from ``experiments/results/benchmarks/name.json``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "experiments" / "results" / "benchmarks"
_MB = 2**20
_BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.S)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _by_model(rows: Sequence[dict[str, Any]], key: str, cells: Callable[[dict[str, Any]], list[str]]) -> str:
    """One line a method, with the same columns for each model side by side."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row[key] for row in rows))
    found = {(row["model"], row[key]): cells(row) for row in rows}
    width = len(next(iter(found.values())))
    lines = [
        [name, *(cell for m in models for cell in found.get((m, name), ["-"] * width))] for name in names
    ]
    return _table([key, *(f"{m}: {c}" for m in models for c in _COLUMNS[width])], lines)


_COLUMNS = {3: ("trained", "ms", "to the floor"), 2: ("ms", "times faster")}


def step(found: dict[str, Any]) -> str:
    """Number 1: a step of each method against the floor."""
    return _by_model(
        found["steps"],
        "method",
        lambda row: [f"{row['trained']:,}", f"{row['ms']:.0f}", f"{row['ratio_to_floor']:.2f}"],
    )


def precision(found: dict[str, Any]) -> str:
    """Number 2: each method in its best precision."""
    return _by_model(found["steps"], "way", lambda row: [f"{row['ms']:.0f}", f"{row['times_faster']:.2f}"])


def memory(found: dict[str, Any]) -> str:
    """Number 3: megabytes of a step, and of what is trained."""
    columns = ("method", "model", "peak above the floor", "of it kept inputs", "trained state",
               "state, bytes a trained entry", "masks and indices")  # fmt: skip
    rows = [
        [f"{row['method']}, {row['precision']}", row["model"],
         *(f"{row[key] / _MB:.1f}" for key in ("peak_above_floor", "kept_above_floor", "state_bytes")),
         f"{row['state_bytes_per_trained_entry']:,.0f}", f"{row['beside_bytes'] / _MB:.1f}"]
        for row in found["memory"]
    ]  # fmt: skip
    return _table(columns, rows)


def masking(found: dict[str, Any]) -> str:
    """Number 6: deriving a mask."""
    rows = [
        [
            row["model"],
            f"{row['k']:,}",
            f"{row['seconds']:.2f}",
            f"{row['model_mb']:.0f}",
            f"{row['extra_mb']:.0f}",
        ]
        for row in found["masks"]
    ]
    return _table(("model", "k", "seconds", "model, MB", "memory on top, MB"), rows)


def latency(found: dict[str, Any]) -> str:
    """Number 7: inference with merged and unmerged models."""
    rows = [
        [row["variant"], row["model"], f"{row['rows']} x {row['tokens']}", f"{row['ms']:.1f}",
         f"{row['ratio_to_original']:.2f}"]
        for row in found["latency"]
    ]  # fmt: skip
    return _table(("model served", "shape", "batch", "ms", "to the original"), rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    one.__name__: one for one in (step, precision, memory, masking, latency)
}


def filled(text: str, results: Path) -> str:
    """The page with every block made from its result."""

    def block(match: re.Match[str]) -> str:
        found = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        where = found["machine"]
        busy = f", load before the end {where['load']}" if "load" in where else ""
        note = f"\nMeasured on {where['cores']} cores, threads: {where['threads']}{busy}.\n"
        return f"{match[1]}{TABLES[match[2]](found)}{note}{match[3]}"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
