"""What the commands do, once their options are read. Each prints tables, or one JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from experiments.display import print_json, print_table
from experiments.runs import read_run
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, unknown

LEDGER_KEYS = ("round", "client", "direction", "kind", "status")


def show_mask(model: str, *, density: float, eligible: str, per_tensor: bool, as_json: bool) -> None:
    """Derive and describe a model's magnitude mask. Raises ConfigError and CheckpointError."""
    from experiments.masks import mask_facts
    from fedmask.masks import Rule, derive_mask
    from fedmask.models import load_backbone
    from fedmask.space import Eligible

    rule = Rule("magnitude", density, cast(Eligible, eligible), per_tensor)  # the space checks the word
    backbone = load_backbone(model).model
    facts = mask_facts(backbone, derive_mask(backbone, rule))
    if as_json:
        print_json(facts)
        return
    share = facts["k"] / facts["eligible_size"]
    rows = [
        ("masked entries", f"{facts['k']:,} of {facts['eligible_size']:,} eligible ({share:.4%})"),
        ("threshold, largest |w| inside", f"{facts['threshold']:.9g}"),
        ("exact zeros inside", f"{facts['zeros']:,}"),
        ("digest of the mask", facts["digest"]),
        ("digest of the checkpoint", facts["checkpoint_digest"]),
        ("recipe", f"{facts['recipe_bytes']} bytes"),
    ]
    print_table(f"Mask of {model}", ("", ""), rows, left=2)
    tensors = [
        (row["tensor"], "x".join(map(str, row["shape"])), f"{row['masked']:,}", f"{row['share']:.4%}")
        for row in facts["tensors"]
    ]
    print_table("Where its entries lie", ("tensor", "shape", "masked", "of the tensor"), tensors, left=2)


def show_ledger(folder: Path, by: str | None, *, as_json: bool) -> None:
    """Print a run's bytes, or with ``by`` their sums over those keys. ConfigError for an unknown key."""
    if by is not None:
        _show_sums(folder, by, as_json=as_json)
        return
    from experiments.accounts import WAY_COLUMNS, accounts, way_cells

    run = read_run(folder, finished=False)
    found = accounts(run)
    if as_json:
        print_json(found)
        return
    keys = ("direction", "kind", "status")
    sums = [[row[key] for key in keys] + _figures(row) for row in found["totals"]["direction_kind_status"]]
    total = ["all", "", "", *_figures(found["total"])]
    state = "" if run.summary else ", which is not over or failed"
    print_table(f"Messages of {folder}{state}", (*keys, *_FIGURES), [*sums, total], left=3)
    for name in ("round", "client"):
        rows = found["totals"][name]
        shown = [[row[name], row["direction"], *_figures(row)] for row in rows[:MOST_ROWS]]
        if len(rows) > MOST_ROWS:
            shown.append(["...", f"{len(rows) - MOST_ROWS} more with --by {name},direction", "", "", ""])
        print_table(f"By {name}", (name, "direction", *_FIGURES), shown, left=2)
    formula = [
        (row["direction"], *("-" if row[key] is None else f"{row[key]:,}" for key in _BESIDE),
         f"{found['bits_per_backbone_parameter'][row['direction']]:.4g}")
        for row in found["formula"]
    ]  # fmt: skip
    print_table(
        "Masks and training: payload by formula, measured, and as whole messages; bits of payload per client,"
        " round and backbone parameter",
        ("direction", *(f"{key} bytes" for key in _BESIDE), "bits a parameter"),
        formula,
    )
    print_table(
        "The same run in other ways: payload per client and round, and all of it; the share of indices in it;"
        " all of it with indices as released",
        WAY_COLUMNS,
        [way_cells(row) for row in found["ways"]],
    )
    wire = found["wire_bytes"]
    if wire is None:
        print("Wire, by SuperLink's own counters: unknown (another engine, or another machine).")
    else:
        print(f"Wire, by SuperLink's own counters: {wire['up']:,} bytes up, {wire['down']:,} bytes down.")


MOST_ROWS = 20  # of rounds or clients on a screen; --json has them all
_FIGURES = ("messages", "payload bytes", "message bytes")
_BESIDE = ("formula", "payload", "message")


def _figures(row: Mapping[str, int]) -> list[str]:
    return [f"{row[name.replace(' ', '_')]:,}" for name in _FIGURES]


def _show_sums(folder: Path, by: str, *, as_json: bool) -> None:
    keys = tuple(key.strip() for key in by.split(","))
    for key in keys:
        if key not in LEDGER_KEYS:
            raise ConfigError(f"--by: {unknown('key', key, LEDGER_KEYS)}")
    ledger = read_run(folder, finished=False).ledger
    sums, total = ledger.totals(*keys), ledger.total()
    if as_json:
        rows = [dict(zip(keys, group, strict=True)) | asdict(sums[group]) for group in sums]
        print_json({"rows": rows, "total": asdict(total)})
        return
    groups = [*sums.items(), (("all", *[""] * (len(keys) - 1)), total)]
    cells = [(*group, *_figures(asdict(found))) for group, found in groups]
    print_table(f"Messages of {folder}", (*keys, *_FIGURES), cells, left=len(keys))


def show_estimate(config: RunConfig, labels: str | None, link: str, *, as_json: bool) -> None:
    """Print what a run would send and how long that takes. Raises ConfigError and DataError."""
    from experiments.estimate import estimate, label_counts, parse_link
    from experiments.results import WAYS, size

    found = estimate(config, label_counts(config, labels), parse_link(link))
    if as_json:
        print_json(found)
        return
    shared = {name: n for layout in found["layout"].values() for name, n in layout if "/" not in name}
    heads = {name: n for layout in found["layout"].values() for name, n in layout if "/" in name}
    count, total = sum(shared.values()), found["backbone_size"]
    print(f"{config.method} on {config.model}: {count:,} of {total:,} backbone values ({count / total:.3%}),")
    print(f"heads: {', '.join(f'{name} {n:,}' for name, n in heads.items())}")
    print(f"{config.clients} clients, {config.rounds} rounds, up {found['codec']['up']}, down"
          f" {found['codec']['down']}\n")  # fmt: skip
    keys = ("kind", "direction")
    rows = [[row[key] for key in keys] + _figures(row) for row in found["rows"]]
    print_table("Messages", (*keys, *_FIGURES), [*rows, ["all", "", *_figures(found["total"])]], left=2)
    each = [
        (way, f"{one['payload_bytes']:,}", f"{one['message_bytes']:,}",
         f"{found['bits_per_backbone_parameter'][way]:.4g}")
        for way, one in found["per_client_round"].items()
    ]  # fmt: skip
    print_table("Per client and round", ("", "payload bytes", "message bytes", "bits a parameter"), each)
    ways = [
        (label, *(size(cost[f"{way}_bytes_per_client_round"]) for way in ("up", "down")),
         size(cost["total_bytes"]),
         f"{cost['total_bytes'] / max(1, found['costs']['this-run']['total_bytes']):.2f}",
         f"{cost['index_share']:.1%}")
        for way, label in {"this-run": "this run, by formula", **WAYS}.items()
        if (cost := found["costs"].get(way))
    ]  # fmt: skip
    print_table(
        "Payload in other ways: per client and round, and all of masks and training",
        ("", "up", "down", "whole run", "times this run", "indices"),
        ways,
    )
    seconds, speed = found["seconds"], found["link"]
    print(f"On a link of {speed['up_mbit']:g} Mbit/s up and {speed['down_mbit']:g} down at each client:"
          f" {seconds['round']:.2f} s a round, {seconds['run']:.1f} s in all (transfer alone).")  # fmt: skip


def rebuild_report(folder: Path, other: Path | None, *, as_json: bool) -> None:
    """Write the report again, and set another run beside it. Raises ConfigError for what is no finished run,
    or one on other shards."""
    from experiments.beside import beside, read_beside, table
    from experiments.report import write_report

    path = write_report(folder, other)
    run = read_run(folder)
    second = None if other is None else read_beside(run, other)
    if as_json:
        print_json({"report": str(path), "beside": [] if second is None else beside(run, second)})
        return
    if second is not None:
        print_table(*table(run, second))
    print(path)


def export_run(folder: Path, to: Path, *, overwrite: bool, as_json: bool) -> None:
    """Write one Hugging Face checkpoint a task. Raises ConfigError and CheckpointError."""
    from transformers.utils.logging import disable_progress_bar

    from fedmask.export import export_run as write_checkpoints

    disable_progress_bar()  # transformers' own, one for each file
    read_run(folder)  # the same words for an unfinished run as in the other commands
    written = write_checkpoints(folder, to, overwrite=overwrite)
    if as_json:
        print_json({"folders": [str(path) for path in written]})
    else:
        print(*written, sep="\n")
