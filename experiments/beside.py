"""Another run on the same shards beside a run: both up to the last round that both have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.results import counted, score, size
from experiments.runs import Run, read_run
from fedmask.errors import ConfigError

# What must be equal: clients with other rows, or another model, are another federation.
_SAME = ("seed", "model", "head", "tasks", "partition", "train")


def read_beside(run: Run, folder: str | Path) -> Run:
    """The run in ``folder``. Raises ConfigError when it is none, or one on other shards than ``run``."""
    other = read_run(folder)
    for key in _SAME:
        if run.config[key] != other.config[key]:
            raise ConfigError(
                f"--beside: {folder} has another {key!r} than {run.folder}, so their rounds do not compare;"
                f" run it with the same {key!r}"
            )
    if run.facts["partitions"] != other.facts["partitions"]:
        raise ConfigError(f"--beside: {folder} was run on other rows than {run.folder}; run it on the same")
    return other


def rounds_of_both(run: Run, other: Run) -> int:
    """The last round that both runs have."""
    return min(int(one.summary["rounds"]) for one in (run, other))


def beside(run: Run, other: Run) -> list[dict[str, Any]]:
    """A row for each of the two, over rounds 1 to n, the last that both have; masks count, too.

    ``label``; ``values`` (sent by a client, without its head); ``up`` and ``down``: payload of a client and
    round (mean), ``last_down``: the same in round n; ``total``: of all clients; ``times``: against ``run``;
    ``union``: entries of all clients' masks together, in multiples of one; ``dev``: score in round n by task.
    """
    last = rounds_of_both(run, other)
    rows = [_row(one, last) for one in (run, other)]
    return [row | {"times": row["total"] / max(1, rows[0]["total"])} for row in rows]


def table(run: Run, other: Run) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """The same for people: what it shows, the columns, a row for each run."""
    last, tasks = rounds_of_both(run, other), list(run.metrics)
    title = f"Two runs on the same shards: payload of rounds 1 to {last}, dev score in round {last}"
    columns = ("", "values", "up", "down", f"down, round {last}", "all clients", "times", "union", *tasks)
    rows = [
        (
            row["label"],
            f"{row['values']:,}",
            *(size(row[key]) for key in ("up", "down", "last_down", "total")),
            f"{row['times']:.2f}",
            f"{row['union']:.2f} x k" if row["union"] else "-",
            *(score(row["dev"].get(task)) for task in tasks),
        )
        for row in beside(run, other)
    ]
    return title, columns, rows


def _row(run: Run, last: int) -> dict[str, Any]:
    sent = [row for row in run.ledger if counted(row) and row.round <= last and row.status == "ok"]
    trained = [row for row in sent if row.kind == "train"]

    def mean(direction: str, rounds: range) -> float:
        found = [r.payload_bytes for r in trained if r.direction == direction and r.round in rounds]
        return sum(found) / max(1, len(found))

    layout = next(iter(run.facts["layout"].values()))
    overlap = run.summary.get("overlap") or {}
    dev = run.rounds[last]["dev"]
    own = run.config["placement"] == "client" and "rule" in overlap and not overlap.get("batches")
    return {
        "label": f"{run.config['method']}, a mask a client" if own else run.config["method"],
        "values": sum(count for name, count in layout if not name.startswith("head/")),
        "up": mean("up", range(1, last + 1)),
        "down": mean("down", range(1, last + 1)),
        "last_down": mean("down", range(last, last + 1)),
        "total": sum(row.payload_bytes for row in sent),
        "union": overlap["union"] / overlap["k"] if own else 0.0,
        "dev": {task: dev.get(task, {}).get(metric) for task, metric in run.metrics.items()},
    }
