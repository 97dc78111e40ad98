"""A run's result in rows: what the report and the terminal both show."""

from __future__ import annotations

from typing import Any

from experiments.figures import scores
from experiments.runs import Run
from fedmask.ledger import LedgerRow

# The ways that fedmask.costs knows, in the order and the words of the tables.
WAYS = {
    "shared-mask": "one mask from the checkpoint",
    "agreed-mask": "one agreed task mask, by votes",
    "client-masks": "a mask per client, with union",
    "lora": "LoRA, r = 8 on query and value",
    "full": "full fine-tuning",
}


def trained(run: Run) -> str:
    """What trains, in words: ``64,604 of 22,565,376 backbone values (0.286 %: ...), and a head a task
    (tweets 1,155, bbc 1,925)``.
    """
    sizes = ", ".join(
        f"{task} {sum(size for name, size in layout if name.startswith('head/')):,}"
        for task, layout in run.facts["layout"].items()
    )
    heads = f"and a head a task ({sizes})"
    layout = next(iter(run.facts["layout"].values()))
    shared = {name: count for name, count in layout if not name.startswith("head/")}
    count, total = sum(shared.values()), run.facts["backbone_size"]
    if not count:
        return f"none of {total:,} backbone values, {heads}"
    parts = ", ".join(f"{name} {count:,}" for name, count in shared.items())
    return f"{count:,} of {total:,} backbone values ({100 * count / total:.3g} %: {parts}), {heads}"


def quality(run: Run) -> list[dict[str, Any]]:
    """One row a task: its metric on dev before and after training, on test, and on the clients' own rows."""
    out = []
    for task, metric in run.metrics.items():
        dev, personal = scores(run, "dev", task), scores(run, "personal", task)
        out.append(
            {
                "task": task,
                "metric": metric,
                "before": dev[0][1] if dev else None,
                "dev": dev[-1][1] if dev else None,
                "test": run.summary["test"].get(task, {}).get(metric),
                "personal": personal[-1][1] if personal else None,
            }
        )
    return out


def traffic(run: Run) -> list[dict[str, Any]]:
    """Bytes per client and round in each direction: means over the training messages that were answered."""
    out = []
    for direction in ("up", "down"):
        total = run.ledger.total(kind="train", direction=direction, status="ok")
        count = max(1, total.messages)
        out.append(
            {
                "direction": direction,
                "payload": total.payload_bytes / count,
                "message": total.message_bytes / count,
            }
        )
    return out


def measured_bytes(run: Run) -> int:
    """Payload of masks and training, both directions, as in the formulas.

    The closing evaluation stands apart, and so does what only an interruption cost (``repeated``).
    """
    return sum(row.payload_bytes for row in run.ledger if counted(row))


def messages(run: Run) -> int:
    """Bytes of the whole messages that ``measured_bytes`` counts the payload of."""
    return sum(row.message_bytes for row in run.ledger if counted(row))


def repeated(run: Run) -> int:
    """Payload that an uninterrupted run would not have had: rounds that broke off, and joining again."""
    return sum(row.payload_bytes for row in run.ledger if _again(row))


def counted(row: LedgerRow) -> bool:
    """Whether the tables count a message: masks and training, but not what only an interruption cost."""
    return row.kind != "evaluate" and not _again(row)


def _again(row: LedgerRow) -> bool:
    return row.status == "aborted" or row.round < 0


def usable(run: Run) -> dict[str, int]:
    """How many usable replies there were, and how many of them the strategy used."""
    return {
        key: sum(len(row.get(key, row["replied"])) for row in run.rounds) for key in ("replied", "selected")
    }


def comparisons(run: Run) -> list[dict[str, Any]]:
    """This run's payload as measured, then every way that ``fedmask.costs`` computed for the same schedule.

    Each row: ``way`` (its name in ``fedmask.costs``), ``label``, ``up`` and ``down`` (bytes per client and
    round), ``total`` (the whole run),
    ``ratio`` (against this run), ``not_charged`` (what the bytes do not show).
    """
    total = measured_bytes(run)
    up, down = (row["payload"] for row in traffic(run))
    rows = [
        {
            "way": "this-run",
            "label": f"this run ({run.config['method']}), measured",
            "up": up,
            "down": down,
            "total": total,
            "ratio": 1.0,
            "not_charged": "",
        }
    ]
    costs = run.summary.get("costs", {})  # none for a run that is not over
    for way, label in WAYS.items():
        if way in costs:
            cost = costs[way]
            rows.append(
                {
                    "way": way,
                    "label": label,
                    "up": cost["up_bytes_per_client_round"],
                    "down": cost["down_bytes_per_client_round"],
                    "total": cost["total_bytes"],
                    "ratio": cost["total_bytes"] / max(1, total),
                    "not_charged": cost["not_charged"],
                }
            )
    return rows


def score(value: float | None) -> str:
    """Three decimals, or a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def size(count: float) -> str:
    """Bytes for people, in powers of ten: ``212 B``, ``212.3 kB``, ``1.70 MB``."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.{1 if power == 3 else 2}f} {unit}"
    return f"{count:.0f} B"
