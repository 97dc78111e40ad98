"""What stands at the end of a run: the final change as a file, and what other ways would have cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedmask.channel import down_way, value_bytes
from fedmask.codecs import pack_indices
from fedmask.costs import RunFacts, compare, lora_values, query_value_shapes
from fedmask.delta import write_delta
from fedmask.layout import sent
from fedmask.methods import TASK_SPECIFIC
from fedmask.sharing import stored_names, travelling
from fedmask.space import backbone_parameters
from fedmask.tuner import tuning_of
from fedmask.views import beside_size, union_mask, up_layout
from fedmask.workspace import Workspace
from server.record import vector_digest
from server.state import RunState


def save_change(workspace: Workspace, state: RunState, path: Path) -> None:
    """``delta.safetensors``: the shared segments and every task's head, as changes from the reference."""
    segments: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {}
    view, mask, sharing = state.view(workspace), workspace.mask, workspace.config.server.sharing
    if view is not None:
        mask = union_mask(view.carried, workspace.space, workspace.no_mask.rule)
    for task in workspace.tasks:
        vector = np.concatenate([state.shared, state.heads[task]])
        layout = travelling(workspace.layout(task), sharing)
        if mask is not None and view is not None:
            layout = up_layout(layout, mask.k)
        stored = stored_names(layout, task, sharing)
        segments |= {stored[name]: vector[where] for name, where in layout.slices().items()}
        for trainable in tuning_of(workspace.model(task)).trainables:
            if trainable.size and hasattr(trainable, "names"):
                names[stored.get(trainable.segment, trainable.segment)] = list(trainable.names)
    write_delta(
        path,
        segments,
        checkpoint=workspace.checkpoint_digest,
        mask=mask,
        names=names,
        more={"vector_sha256": vector_digest(state.shared, state.heads), "run": workspace.config.name},
    )


def costs(
    workspace: Workspace, schedule: Sequence[Sequence[int]], unions: Sequence[int] | None = None
) -> dict[str, Any]:
    """Payload bytes of this run done in other ways, by formula (``fedmask.costs``), by way.

    ``schedule``: the partitions asked in each round; ``unions``: see ``fedmask.costs.RunFacts``.
    """
    config, k = workspace.config, workspace.k
    sharing = config.server.sharing
    layouts = {task: travelling(workspace.layout(task), sharing) for task in workspace.tasks}
    heads = {task: layout.size - layout.shared_size for task, layout in layouts.items()}
    beside = beside_size(sent(next(iter(layouts.values()))))
    changes, products = down_way(config.down).change, workspace.products
    backbone = backbone_parameters(workspace.backbone.model)
    recipe = workspace.recipe()
    once = _for_the_mask(workspace)
    found = compare(
        RunFacts(
            k=k,
            eligible_size=workspace.space.eligible_size if k else 0,
            backbone_size=workspace.backbone_size,
            client_heads=[heads[workspace.task_of(client)] for client in range(config.clients)],
            schedule=schedule,
            up_value_bytes=value_bytes(config.up),
            down_value_bytes=value_bytes(config.down),
            changes_down=changes,
            beside=beside,
            down_alone=products.down_size(changes) if products else 0,
            recipe_bytes=len(recipe.to_json().encode()) if recipe else 0,
            once_up_bytes=once[0],
            once_down_bytes=once[1],
            unions=unions,
            lora_values=lora_values(query_value_shapes(list(backbone), [p.shape for p in backbone.values()])),
        )
    )
    if config.has_views:  # masks that differ by client or by round: the first has a formula, the other none
        found.pop("this-run")
        if config.mask_schedule == "fixed":
            found["this-run"] = replace(found["client-masks"], way="this-run")
    return {way: cost.to_dict() for way, cost in found.items()}


def _for_the_mask(workspace: Workspace) -> tuple[int, int]:
    """Payload that each client sends and receives once so that it holds the run's mask."""
    config, mask = workspace.config, workspace.mask
    if mask is None:
        return 0, 0
    specific = config.method in TASK_SPECIFIC
    recipe = 0 if specific else len(mask.recipe().to_json().encode())
    if not specific and config.mask_transport == "recipe":
        return 0, recipe
    packed = len(pack_indices(mask.indices, mask.space.size, mask.space.offsets))
    if not specific or config.placement == "server":
        return 0, recipe + packed
    return packed + 2 * mask.k * (config.agree_by == "scores"), packed
