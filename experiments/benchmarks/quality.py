"""What bfloat16 costs in quality: ``python -m experiments.benchmarks.quality``.

The demo's federation (both bundled tasks, 8 clients, label skew, the default method) in float32 and in
bfloat16, with the same seed, rows, batches and learning rates; ``--rounds`` of it. Scored once at the end on
all test rows. Differences are paired by seed, with the 95 % interval of their mean (Student's t).
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.benchmarks.measuring import show, write

ROUNDS, SEEDS = 4, (1, 2, 3)
DEMO = Path(__file__).parents[1] / "studies" / "demo.toml"


def run_one(precision: str, seed: int, rounds: int, threads: int, **changes: Any) -> dict[str, Any]:
    """One run's score on each task's test rows (``scores``), their numbers and the last training losses."""
    from experiments.engines import run_inprocess
    from experiments.options import read_settings
    from fedmask.config import from_dict
    from fedmask.workspace import get_workspace

    values = read_settings(DEMO)
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "name": f"{precision}-{seed}",
            "precision": precision,
            "seed": seed,
            "rounds": rounds,
            "threads": threads,
            "workers": 1,
            "overlap_batches": 0,
            "eval_rows": 200,
            "runs_dir": folder,
        }
        config = from_dict({**values, **own, **changes})
        summary = run_inprocess(config, client_evaluation=False).summary
        workspace = get_workspace(config)
        tasks = workspace.tasks
        return {
            "precision": precision,
            "seed": seed,
            "scores": {task: summary["test"][task][workspace.data(task).metric] for task in tasks},
            "losses": {task: summary["test"][task]["loss"] for task in tasks},
            "rows": {task: len(workspace.central(task, "test")) for task in tasks},
            "seconds": summary["seconds"],
        }


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task: mean scores in per cent, the mean paired difference and half its interval's width."""
    from scipy import stats

    found = []
    at = {(run["precision"], run["seed"]): run for run in runs}
    seeds = [seed for precision, seed in at if precision == "fp32"]
    for task in runs[0]["scores"]:
        full, half = (
            [100 * at[precision, seed]["scores"][task] for seed in seeds] for precision in ("fp32", "bf16")
        )
        pairs = [one - other for one, other in zip(half, full, strict=True)]
        width = math.nan
        if len(pairs) > 1:
            width = float(stats.t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs))
        found.append(
            {
                "task": task,
                "rows": runs[0]["rows"][task],
                "seeds": len(seeds),
                "fp32": fmean(full),
                "bf16": fmean(half),
                "difference": fmean(pairs),
                "half_width": width,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run, print a table, write JSON if asked to."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="file to write all numbers to")
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args(arguments)
    runs = [
        run_one(precision, seed, given.rounds, given.threads)
        for seed in given.seeds
        for precision in ("fp32", "bf16")
    ]
    rows = compared(runs)
    show(
        f"The demo after {given.rounds} rounds, {len(given.seeds)} seeds: score on the test rows, per cent",
        ("task", "rows", "fp32", "bf16", "difference", "95 %"),
        [
            (row["task"], f"{row['rows']:,}", f"{row['fp32']:.2f}", f"{row['bf16']:.2f}",
             f"{row['difference']:+.2f}", f"± {row['half_width']:.2f}")
            for row in rows
        ],
    )  # fmt: skip
    write(given.json, settings={"rounds": given.rounds, "seeds": given.seeds}, quality=rows, runs=runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
