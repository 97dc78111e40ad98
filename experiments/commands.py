"""What the commands do, once their options are read. Each prints tables, or one JSON document."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import cast

from experiments.display import print_json, print_table
from experiments.runs import read_run
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


def show_ledger(folder: Path, by: str, *, as_json: bool) -> None:
    """Sum a run's ledger over the keys named in ``by``. Raises ConfigError for an unknown key."""
    keys = tuple(key.strip() for key in by.split(","))
    for key in keys:
        if key not in LEDGER_KEYS:
            raise ConfigError(f"--by: {unknown('key', key, LEDGER_KEYS)}")
    ledger = read_run(folder).ledger
    sums, total = ledger.totals(*keys), ledger.total()
    if as_json:
        rows = [dict(zip(keys, group, strict=True)) | asdict(sums[group]) for group in sums]
        print_json({"rows": rows, "total": asdict(total)})
        return
    groups = [*sums.items(), (("all", *[""] * (len(keys) - 1)), total)]
    cells = [(*group, *(f"{count:,}" for count in asdict(found).values())) for group, found in groups]
    columns = (*keys, "messages", "payload bytes", "message bytes")
    print_table(f"Messages of {folder}", columns, cells, left=len(keys))


def rebuild_report(folder: Path, *, as_json: bool) -> None:
    """Write the report again. Raises ConfigError when the folder holds no finished run."""
    from experiments.report import write_report

    path = write_report(folder)
    if as_json:
        print_json({"report": str(path)})
    else:
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
