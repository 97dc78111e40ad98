"""The command ``fedmask overlap``: how far the masks that clients choose for themselves differ.

Each client's mask is found on its own shard, as a run with a mask per client would find it. Nothing is
trained with the masks: what is shown is how their union grows as clients are added, and what that costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.display import print_json, print_table
from experiments.overlap_figures import GROWTH_COLUMNS, draw_overlap, growth_cells
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, unknown
from fedmask.masks import SCORERS, Mask, derive_mask
from fedmask.masks.overlap import overlap_facts
from fedmask.workspace import Workspace, get_workspace
from server.record import write_json

MOST_CLIENTS = 64


def client_masks(workspace: Workspace, rule: str) -> dict[int, Mask]:
    """Each client's own mask by partition. Raises ConfigError for an unknown rule or too many clients."""
    config = workspace.config
    if rule not in SCORERS:
        raise ConfigError(f"--rule: {unknown('task-specific mask rule', rule, SCORERS)}")
    if config.clients > MOST_CLIENTS:
        raise ConfigError(
            f"expected at most {MOST_CLIENTS} clients, found {config.clients}; lower their number"
        )
    chosen = workspace.rule
    if chosen is None:
        raise ConfigError(f"method {config.method!r} has no mask to compare with; use one that has")
    return {client: workspace.scores(rule, client).mask(chosen) for client in range(config.clients)}


def show_overlap(config: RunConfig, rule: str, out: Path, *, as_json: bool) -> None:
    """Measure, write ``overlap.json`` and the figures into ``out``, and print. Raises FedmaskError."""
    workspace = get_workspace(config.model_copy(update={"method": "pafi"}))
    masks = client_masks(workspace, rule)
    assert workspace.rule is not None  # pafi has one
    shared = derive_mask(workspace.backbone.model, workspace.rule)
    tasks = [workspace.task_of(client) for client in sorted(masks)]
    facts = {"rule": rule, "density": config.density} | overlap_facts(masks, tasks, shared, config.seed)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "overlap.json", facts)
    figures = draw_overlap(facts, out)
    if as_json:
        print_json(facts | {"folder": str(out), "figures": figures})
        return
    _print(facts)
    print(f"Written: {out / 'overlap.json'}, {', '.join(str(out / name) for name in figures)}")


def _print(facts: Mapping[str, Any]) -> None:
    said = [
        ("each client's mask", f"{facts['k']:,} of {facts['eligible_size']:,} entries, rule {facts['rule']}"),
        ("mean Jaccard index of two clients", _share(facts["mean_jaccard"])),
        ("of two clients of one task", _share(facts["mean_jaccard_same_task"])),
        ("of two clients of different tasks", _share(facts["mean_jaccard_other_task"])),
        ("of a client and the shared mask", _share(facts["mean_jaccard_with_shared"])),
        ("entries that every client chose", f"{facts['chosen_by_all']:,}"),
        ("entries that one client alone chose", f"{facts['chosen_by_one']:,}"),
    ]
    print_table(f"Masks of {facts['clients']} clients", ("", ""), said, left=2)
    title = "The union as clients are added, and what each client receives per round"
    print_table(title, GROWTH_COLUMNS, growth_cells(facts), left=0)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
