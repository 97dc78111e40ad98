"""The tables of docs/performance.md, scale.md, bytes.md and deployment.md, made from the published results.

``python -m experiments.benchmarks.tables`` writes them anew between the pages' ``<!-- name -->`` and
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
PAGES = tuple(ROOT / "docs" / name for name in ("performance.md", "scale.md", "bytes.md", "deployment.md"))
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


_COLUMNS = {4: ("trained", "ms", "to the floor", "fastest to fastest"), 2: ("ms", "times faster")}


def step(found: dict[str, Any]) -> str:
    """Number 1: a step of each method against the floor."""
    return _by_model(
        found["steps"],
        "method",
        lambda row: [
            f"{row['trained']:,}",
            f"{row['ms']:.0f}",
            f"{row['ratio_to_floor']:.2f}",
            f"{row['ratio_of_least']:.2f}",
        ],
    )


def precision(found: dict[str, Any]) -> str:
    """Number 2: each method in its best precision."""
    return _by_model(found["steps"], "way", lambda row: [f"{row['ms']:.0f}", f"{row['times_faster']:.2f}"])


def memory(found: dict[str, Any]) -> str:
    """Number 3: megabytes of a step, and of what is trained."""
    columns = ("method", "model", "peak above the floor", "inputs kept above the floor", "trained state",
               "state, bytes a trained entry", "masks and indices")  # fmt: skip
    rows = [
        [f"{row['method']}, {row['precision']}", row["model"],
         *(f"{row[key] / _MB:.1f}" for key in ("peak_above_floor", "kept_above_floor", "state_bytes")),
         f"{row['state_bytes_per_trained_entry']:,.0f}", f"{row['beside_bytes'] / _MB:.1f}"]
        for row in found["memory"]
    ]  # fmt: skip
    return _table(columns, rows)


def kernels(found: dict[str, Any]) -> str:
    """The sampled weight gradient of one layer, float32 and all the machine's threads."""
    most = max(row["threads"] for row in found["rows"]), max(row["tokens"] for row in found["rows"])
    rows = [
        [f"{row['outputs']} x {row['inputs']}", f"{row['density']:.1%}",
         *(f"{row[name]:.2f}" for name in ("product_ms", "dense_ms", "sampled_ms")),
         f"{row['ratio_to_product']:.1f}", row["auto"]]
        for row in found["rows"]
        if row["precision"] == "fp32" and (row["threads"], row["tokens"]) == most
    ]  # fmt: skip
    columns = ("weight", "density", "product, ms", "product and gather, ms", "sampled, ms",
               "times the product's speed", "chosen")  # fmt: skip
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


def overhead(found: dict[str, Any]) -> str:
    """Number 4: a round through Flower against the same steps without it."""
    base = {"bare": "bare", "inprocess": "bare", "ray": "bare", "quickstart": "quickstart steps"}
    rows = [
        [name, f"{found['medians'][name]:.2f}",
         f"{found['medians'][other]:.2f}", f"{found['ratios'].get(name, 1.0):.3f}"]
        for name, other in base.items()
        if name in found["medians"]
    ]  # fmt: skip
    return _table(("way", "a round, s", "its steps alone, s", "ratio"), rows)


def scale(found: dict[str, Any]) -> str:
    """Number 5: federations of many clients."""
    columns = ("clients", "processes", "up", "values", "until all have joined, s", "a round, s",
               "peak memory, MB", "above a run of two clients, MB", "growth after round 1, MB")  # fmt: skip
    rows = [
        [f"{row['clients']:,}", f"{row['workers']}", row["up"], f"{row['values']:,}",
         f"{row['joined_seconds']:.1f}", f"{row['round_seconds']:.1f}", f"{row['peak_megabytes']:.0f}",
         f"{row['above_a_run_of_two_megabytes']:.0f}", f"{row['grown_after_round_1_megabytes']:.1f}"]
        for row in found["clients"]
    ]  # fmt: skip
    return _table(columns, rows)


def aggregation(found: dict[str, Any]) -> str:
    """Number 5: replies of a million entries."""
    one = found["aggregation"]
    rows = [
        [f"`{row['strategy']}`, a whole round", f"{row['replies']:,}", f"{row['seconds']:.2f}",
         f"{row['grown_megabytes']:.0f}", "-"]
        for row in found["held"]
    ]  # fmt: skip
    rates = one["gigabytes_per_second"]
    decoding = rates["decode and mean"]
    sums = [
        ["the sums of `mean` alone", f"{one['replies']:,}", f"{one['seconds']:.2f}", "-",
         f"{one['share_of_copy']:.2f}"],
        ["fp32 messages decoded and summed", f"{one['replies']:,}",
         f"{20e-9 * one['entries'] * one['replies'] / decoding:.2f}", "-",
         f"{decoding / rates['copy']:.2f}"],
    ]  # fmt: skip
    return _table(
        ("what", "replies", "s", "memory grown by, MB", "share of the bandwidth of a copy"), [*sums, *rows]
    )


def quality(found: dict[str, Any]) -> str:
    """What bfloat16 costs in quality."""
    rows = [
        [row["task"], f"{row['rows']:,}", str(row["seeds"]), f"{row['fp32']:.2f}", f"{row['bf16']:.2f}",
         f"{row['difference']:+.2f} ± {row['half_width']:.2f}"]
        for row in found["quality"]
    ]  # fmt: skip
    return _table(("task", "test rows", "seeds", "float32", "bfloat16", "difference, 95 %"), rows)


def codecs(found: dict[str, Any]) -> str:
    """Values, random masks and real masks as bytes."""
    values = [
        [row["codec"], f"{row['bytes_per_entry']:.4f}", f"{row['encode_megabytes_per_second']:,.0f}",
         f"{row['decode_megabytes_per_second']:,.0f}"]
        for row in found["values"]
    ]  # fmt: skip
    indices = [
        [f"{row['density']:.2%}", f"{row['size']:,}", f"{row['bits_per_index']:.3f}",
         f"{row['ratio_to_bound']:.4f}",
         f"{row['encode_indices_per_second'] / 1e6:,.0f}", f"{row['decode_indices_per_second'] / 1e6:,.0f}"]
        for row in found["indices"]
    ]  # fmt: skip
    keys = [key + end for key in ("bits_per_index", "ratio_to_bound") for end in ("", "_by_tensor")]
    masks = [[row["mask"], f"{row['k']:,}", *(f"{row[key]:.3f}" for key in keys)] for row in found["masks"]]
    speeds = ("million a second in", "out")
    return "\n".join(
        (
            _table(("codec of values", "bytes an entry", "MB of fp32 a second in", "out"), values),
            _table(("density", "entries", "bits an index", "to the bound", *speeds), indices),
            _table(("mask", "k", "bits an index", "by tensor", "to the flat bound", "by tensor"), masks),
        )
    )


def entropy(found: dict[str, Any]) -> str:
    """Bytes of entropy-coded changes against the plain codec's."""
    ways = ("entropy", "ours", "zlib", "zstandard", "constriction")
    rows = [
        [f"{row['way']}, {row['codec']}", f"{row['changes']}",
         *("-" if row[way] is None else f"{row[way]:.3f}" for way in ways)]
        for row in found["entropy"]
    ]  # fmt: skip
    columns = ("changes", "number", "entropy of the codes", "`int8h`, `int4h`, `int2h`", "zlib, level 9",
               "zstandard, level 3", "constriction, range coder")  # fmt: skip
    return _table(columns, rows)


def message(found: dict[str, Any]) -> str:
    """What a message costs where each one starts a process."""
    without, kept = found["seconds"]["without"], found["seconds"]["with"]
    rows = [[part, f"{value:.2f}", f"{kept[part]:.2f}"] for part, value in without.items()]
    parts = _table(("part", "nothing kept, s", "rows kept, s"), rows)
    way = found.get("linked")  # results of earlier versions have none
    if way is None:
        return parts
    seconds = [[part, f"{value:.2f}"] for part, value in way["seconds"].items()]
    memory = [[f"`{program}`", f"{value:.0f}"] for program, value in way["memory"].items()]
    return "\n".join(
        (
            parts,
            _table(("the way through a SuperLink, rows kept", "s"), seconds),
            _table(("process", "peak memory, MB"), memory),
        )
    )


def goals(found: dict[str, Any]) -> str:
    """What was aimed at before anything was measured, and what came out; ``found``: all results by name."""
    steps = {(row["model"], row["method"]): row["ratio_to_floor"] for row in found["step"]["steps"]}
    faster: dict[str, dict[str, float]] = {}
    for row in found["precision"]["steps"]:
        faster.setdefault(row["model"], {})[row["way"]] = row["times_faster"]
    amx = "" if found["precision"]["machine"]["amx"] else "; this machine has no AMX"
    entry = [row["state_bytes_per_trained_entry"] for row in found["memory"]["memory"]
             if row["method"] == "fedmask"]  # fmt: skip
    merged = [row["ratio_to_original"] for row in found["latency"]["latency"] if row["variant"] == "merged"]
    rows = []
    for model in dict.fromkeys(model for model, _ in steps):
        ours, lora = steps[model, "fedmask"], steps[model, "lora"]
        rows += [
            [f"a step to the frozen floor, {model}", "at most 1.10", f"{ours:.2f}", _met(ours <= 1.10)],
            [f"below LoRA, {model}", f"below {lora:.2f}", f"{ours:.2f}", _met(ours < lora)],
        ]
    for model, ways in faster.items():
        fp32 = ways["fedmask, fp32, ours"]
        best = max((way for way in ways if way.startswith("fedmask")), key=ways.__getitem__)
        rows += [
            [f"times faster than dense gradient and mask, both float32, {model}", "at least 1.25",
             f"{fp32:.2f}", _met(fp32 >= 1.25)],
            [f"the same in our best precision, {model}", "at least 3 with AMX",
             f"{ways[best]:.2f} ({best.split(', ')[1]}{amx})", _met(ways[best] >= 3) if not amx else "-"],
        ]  # fmt: skip
    rows += [
        ["bytes of state a trained entry", "at most 16", f"{max(entry):.0f}", _met(max(entry) <= 16)],
    ]  # fmt: skip
    if "overhead" in found:
        ratio = found["overhead"]["ratios"]["inprocess"]
        rows.append(["a round through Flower to its bare steps", "at most 1.03", f"{ratio:.3f}",
                     _met(ratio <= 1.03)])  # fmt: skip
    if "scale" in found:
        share = found["scale"]["aggregation"]["share_of_copy"]
        most = max(row["clients"] for row in found["scale"]["clients"])
        rows += [
            [
                "the share of the memory bandwidth, sums of `mean` alone",
                "at least 0.5",
                f"{share:.2f}",
                _met(share >= 0.5),
            ],
            ["clients on one machine of 2 cores", "10,000", f"{most:,}", _met(most >= 10_000)],
        ]
    rows.append(["a merged model's latency to the original's", "1.00 within noise",
                 f"{min(merged):.2f} to {max(merged):.2f}", "-"])  # fmt: skip
    return _table(("goal", "aimed at", "measured", ""), rows)


def _met(met: bool) -> str:
    return "reached" if met else "missed"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    one.__name__: one
    for one in (
        *(goals, step, precision, kernels, memory, overhead, masking, latency),
        *(scale, aggregation, quality, codecs, entropy, message),
    )
}
SOURCES = {"aggregation": "scale"}  # tables that are not from a result of their own name


def filled(text: str, results: Path) -> str:
    """The page with every block made from its result."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name == "goals":
            every = {
                path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")
            }
            return f"{match[1]}{goals(every)}{match[3]}"
        found = json.loads((results / f"{SOURCES.get(name, name)}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{TABLES[name](found)}{_note(found)}{match[3]}"

    return _BLOCK.sub(block, text)


def _note(found: dict[str, Any]) -> str:
    """Where and how a result was measured."""
    where = found["machine"]
    shares = [row["others"] for rows in found.values() if isinstance(rows, list) for row in rows
              if isinstance(row, dict) and "others" in row]  # fmt: skip
    shares += [found["others"]] if "others" in found else []
    busy = f"; load before the end {where['load']}" if "load" in where else ""
    if shares:
        busy = f"; other processes had at most {max(shares):.1%} of a core meanwhile"
    name = where.get("processor", "a machine")
    return f"\nMeasured on {name}, {where['cores']} cores, threads: {where['threads']}{busy}.\n"


def main() -> int:
    """Write the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
