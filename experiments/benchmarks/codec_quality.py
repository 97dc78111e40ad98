"""What coarser values cost in quality: ``python -m experiments.benchmarks.codec_quality --data DIR``.

One task at a time, dealt to 8 clients with label skew 0.5, all of which train in every round; the default
method. Each setting of ``--up`` and ``--down`` is compared with fp32 both ways at the same seed, rounds, rows
and learning rates: the mean of the paired differences over the seeds, with its 95 % interval (Student's t).
All rows of the reported file are scored once, at the end. The table gives points and their 95 % interval.

A run that is there is not done again: one JSON file each, below ``--out``. ``--write FILE`` gathers them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

TASKS: dict[str, dict[str, Any]] = {
    "agnews10k": {"train": "agnews10k/train.tsv", "reported": "agnews10k/dev.tsv"},
    "trec6": {"train": "trec6/train.tsv", "reported": "trec6/dev.tsv"},
    "sst2_sentences": {"train": "sst2_sentences/train.tsv", "reported": "sst2_sentences/test.tsv"},
}
SETTINGS: dict[str, tuple[str, str]] = {
    "fp32": ("fp32", "fp32"),
    "int4": ("int4+ef", "int4+delta"),
    "sign": ("sign", "sign+delta"),
    "int2": ("int2+ef", "int2+delta"),
    "topk3": ("topk:0.03/int4", "topk:0.03/int4+delta"),
    "topk10": ("topk:0.1/int4", "topk:0.1/int4+delta"),
    "int8": ("int8+ef", "int8+delta"),
    "fp16": ("fp16", "fp16"),
}
CLIENTS, TRAIN_ROWS, ROUNDS, SEEDS = 8, 1200, 4, (1, 2, 3, 4, 5)
REFERENCE = "fp32"


def prepared(task: str, data: Path | None, out: Path) -> dict[str, Path]:
    """The task's files: the same rows for every seed and setting."""
    from experiments.compare.data import prepare
    from experiments.compare.study import Study

    study = Study(
        name="codec-quality",
        narrow="one learning rate for all settings: only the codec may differ",
        tasks=(
            {
                "name": task,
                **TASKS[task],
                "clients": CLIENTS,
                "train_rows": TRAIN_ROWS,
                "validation_rows": 200,
            },
        ),  # type: ignore[arg-type]
        variants=({"name": "codecs", "method": "pafi", "lr": (0.005,)},),  # type: ignore[arg-type]
    )
    return dict(prepare(study, data, out)[task].files)


def settings(task: str, files: dict[str, Path], setting: str, seed: int, folder: Path) -> Any:
    """The run's config."""
    from fedmask.config import from_dict

    up, down = SETTINGS[setting]
    return from_dict(
        {
            "name": f"{task}-{setting}-{seed}",
            "runs_dir": str(folder),
            "seed": seed,
            "up": up,
            "down": down,
            "precision": "bf16",
            "rounds": ROUNDS,
            "workers": 1,
            "eval_rows": 200,
            "overlap_batches": 0,
            "partition": {"kind": "dirichlet", "alpha": 0.5, "held_out": 0.0},
            "train": {"batch_size": 16, "max_tokens": 32, "dropout": 0.0},
            "tasks": [
                {"name": task, "source": str(files["train"]), "dev": str(files["validation"]),
                 "test": str(files["reported"]), "text": ["text"], "label": "label", "clients": CLIENTS}
            ],
        }
    )  # fmt: skip


def run_one(config: Any) -> dict[str, Any]:
    """Scores and bytes of one run; its folder is removed."""
    from experiments.compare.reuse import workspace_for
    from experiments.engines import run_inprocess

    torch.set_num_threads(1)
    workspace = workspace_for(config)
    result = run_inprocess(config, existing="overwrite", client_evaluation=False)
    size = workspace.layout(workspace.tasks[0]).size
    train = result.summary["bytes"]["kinds"]["train"]
    rounds = [json.loads(line) for line in (result.folder / "rounds.jsonl").read_text().splitlines()]
    found = {
        "accuracy": result.summary["test"][config.tasks[0].name]["accuracy"],
        "rows": len(workspace.central(config.tasks[0].name, "test")),
        "values": size,
        "up_bytes_per_value": train["up"]["payload_bytes"] / (CLIENTS * ROUNDS * size),
        "down_bytes_per_value": train["down"]["payload_bytes"] / (CLIENTS * ROUNDS * size),
        "train_loss": [row["train_loss"].get(config.tasks[0].name) for row in rounds[1:]],
        "seconds": result.summary["seconds"],
    }
    shutil.rmtree(result.folder)
    return found


def done_runs(out: Path) -> list[dict[str, Any]]:
    """The results that are there."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task and setting: bytes a value, accuracy, difference to fp32 with its interval (points)."""
    from scipy import stats

    at = {(run["task"], run["setting"], run["seed"]): run for run in runs}
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        for setting in SETTINGS:
            mine = {s: run for (t, name, s), run in at.items() if (t, name) == (task, setting)}
            if not mine:
                continue
            pairs = [
                100 * (run["accuracy"] - at[task, REFERENCE, seed]["accuracy"])
                for seed, run in mine.items()
                if (task, REFERENCE, seed) in at
            ]
            half = None
            if len(pairs) > 1:
                half = float(stats.t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs))
            one = next(iter(mine.values()))
            rows.append(
                {
                    "task": task,
                    "rows": one["rows"],
                    "up": SETTINGS[setting][0],
                    "down": SETTINGS[setting][1],
                    "up_bytes_per_value": one["up_bytes_per_value"],
                    "down_bytes_per_value": one["down_bytes_per_value"],
                    "seeds": len(mine),
                    "accuracy": 100 * fmean(run["accuracy"] for run in mine.values()),
                    "difference": fmean(pairs) if pairs else None,
                    "half_width": half,
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| task (rows) | up | down | bytes a value up, down | seeds | accuracy, % | against fp32, points |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        half = f" ± {row['half_width']:.2f}" if row["half_width"] is not None else ""
        against = "-" if row["up"] == REFERENCE else f"{row['difference']:+.2f}{half}"
        lines.append(
            f"| {row['task']} ({row['rows']:,}) | `{row['up']}` | `{row['down']}` |"
            f" {row['up_bytes_per_value']:.3f}, {row['down_bytes_per_value']:.3f} |"
            f" {row['seeds']} | {row['accuracy']:.2f} | {against} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the tasks' files; else FEDMASK_DATA")
    parser.add_argument("--out", type=Path, default=Path("runs/codec-quality"), help="one JSON file a run")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["trec6", "agnews10k"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--write", type=Path, help="gather all results into one JSON file")
    options = parser.parse_args(arguments)
    from experiments.compare.data import data_folder
    from server.record import machine, versions

    options.out.mkdir(parents=True, exist_ok=True)
    cells = [(t, name, seed) for name in options.settings for seed in options.seeds for t in options.tasks]
    for task, name, seed in cells:
        target = options.out / f"{task}.{name}.seed-{seed}.json"
        if target.exists():
            continue
        files = prepared(task, data_folder(options.data), options.out / "rows")
        with tempfile.TemporaryDirectory() as folder:
            found = run_one(settings(task, files, name, seed, Path(folder)))
        up, down = SETTINGS[name]
        head = {"task": task, "setting": name, "up": up, "down": down, "seed": seed}
        part = target.with_suffix(".part")
        part.write_text(json.dumps(head | found, indent=1) + "\n")
        os.replace(part, target)
        print(f"{target.stem}: {100 * found['accuracy']:.2f} %, {found['seconds']:.0f} s", flush=True)
    rows = table(done_runs(options.out))
    if options.write:
        record = {"table": rows, "runs": done_runs(options.out), "versions": versions(), "machine": machine()}
        options.write.write_text(json.dumps(record, indent=1) + "\n")
    print(show(rows))


if __name__ == "__main__":
    main()
