"""A run's bytes in rows: by direction, kind, round and client, beside the formula and the other ways."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from experiments.results import comparisons, counted, size
from experiments.runs import Run
from fedmask.costs import INDEX_FORMATS


def accounts(run: Run) -> dict[str, Any]:
    """Everything that ``fedmask ledger`` says, as plain values in bytes.

    ``totals`` are sums over all messages by ``by`` (``direction_kind_status``, ``round``, ``client``).
    ``formula`` compares, by direction, what was measured with ``fedmask.costs``' figure for this run: payload
    of masks and training, without what only an interruption cost. ``bits_per_backbone_parameter``: mean
    payload of a client and round, by direction. ``ways``: see ``experiments.results.comparisons``, each with
    its ``index_share`` (of the whole run) and its total in released index formats.
    ``wire_bytes``: SuperLink's own counters, from and to the SuperNodes, or None.
    """
    return {
        "totals": {
            name: [
                dict(zip(keys, group, strict=True)) | asdict(found)
                for group, found in run.ledger.totals(*keys).items()
            ]
            for name, keys in (
                ("direction_kind_status", ("direction", "kind", "status")),
                ("round", ("round", "direction")),
                ("client", ("client", "direction")),
            )
        },
        "total": asdict(run.ledger.total()),
        "formula": _formula(run),
        "bits_per_backbone_parameter": {
            way: 8 * _mean_payload(run, way) / run.facts["backbone_size"] for way in ("up", "down")
        },
        "ways": _ways(run),
        "wire_bytes": {"up": run.wire["inbound"], "down": run.wire["outbound"]} if run.wire else None,
    }


def _mean_payload(run: Run, direction: str) -> float:
    total = run.ledger.total(kind="train", direction=direction, status="ok")
    return total.payload_bytes / max(1, total.messages)


def _formula(run: Run) -> list[dict[str, Any]]:
    """One row a direction; ``formula`` None for a run that was made before there was one."""
    cost = run.summary.get("costs", {}).get("this-run")
    out = []
    for way in ("up", "down"):
        rows = [row for row in run.ledger if counted(row) and row.direction == way]
        out.append(
            {
                "direction": way,
                "formula": cost[f"{way}_bytes"] if cost else None,
                "payload": sum(row.payload_bytes for row in rows),
                "message": sum(row.message_bytes for row in rows),
            }
        )
    return out


def _ways(run: Run) -> list[dict[str, Any]]:
    rows = comparisons(run)
    for row in rows:
        cost = run.summary.get("costs", {}).get(row["way"], {})
        row["index_share"] = cost.get("index_share")
        row["index_formats"] = cost.get("index_formats", {}) if cost.get("mask_indices") else {}
    return rows


def way_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of ``ways`` in words: label, up, down, whole run, times, share of indices, released formats."""
    share = row["index_share"]
    formats = [row["index_formats"].get(name) for name in INDEX_FORMATS]
    return (
        row["label"],
        *(size(row[key]) for key in ("up", "down", "total")),
        f"{row['ratio']:.2f}",
        "-" if share is None else f"{share:.1%}",
        *(
            "-" if one is None else f"{size(one['total_bytes'])} ({one['index_share']:.0%})"
            for one in formats
        ),
    )


WAY_COLUMNS = ("", "up", "down", "whole run", "times this run", "indices", *INDEX_FORMATS)
