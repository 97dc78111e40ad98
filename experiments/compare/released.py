"""What a run would have sent if masks found with data travelled as their authors' code writes them.

Only those masks have indices to send; values, scores and messages stay as they are. None of these projects
sends a mask over a network, so what is charged is the form in which each keeps or writes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmask.methods import TASK_SPECIFIC


@dataclass(frozen=True)
class Released:
    """``index_bytes``: for each index; ``weight_bytes``: for each weight of the model, head included."""

    words: str
    source: str
    index_bytes: int = 0
    weight_bytes: int = 0


RELEASED: dict[str, Released | None] = {
    "fish": Released(
        "a float32 0 or 1 for each weight of the model",
        "varunnair18/FISH, transformers/examples/text-classification/generate_masks.py: mask.bin",
        weight_bytes=4,
    ),
    "lt-sft": Released(
        "steps between flat indices, read as int32",
        "cambridgeltl/composable-sft, src/sft/sft.py: pytorch_diff.bin",
        index_bytes=4,
    ),
    # Kept in memory; the project writes whole models.
    "gradient": Released("row and column as two int64", "song-wx/SIFT, sift/sift.py", index_bytes=16),
    # dguo98/DiffPruning writes whole models, with all their gates.
    "diff-pruning": None,
}
"""By method; None where the authors' code has no form of its own for a mask."""


@dataclass(frozen=True)
class Packed:
    """What of a run's payload was packed indices: bytes, how many indices, and how many sets of them."""

    payload: float
    indices: float
    sets: float


def packed(result: Mapping[str, Any]) -> Packed | None:
    """The indices of a run's task-specific masks, from its result.

    None without such a mask, and for one a client in a result that did not count positions (older ones).
    """
    config, k = result["config"], result["sent_values"]
    if config["method"] not in TASK_SPECIFIC:
        return None
    if config["placement"] == "client":
        told = result.get("positions")
        if told is None:
            return None
        bytes_, sets = (told[f"{what}_up"] + told[f"{what}_down"] for what in ("bytes", "masks"))
        return Packed(bytes_, k * told["masks_up"] + told["entries_down"], sets)
    clients = sum(task["clients"] for task in config["tasks"])
    up, down = (result["bytes"][f"mask_{way}_per_client"] for way in ("up", "down"))
    if config["placement"] == "server":
        return Packed(clients * down, clients * k, clients)
    scores = 2 * k + 4 if config["agree_by"] == "scores" else 0  # fedmask.masks.votes.pack_top_scores
    return Packed(clients * (up - scores + down), 2 * clients * k, 2 * clients)


def released_payload(method: str, payload: float, found: Packed, weights: float) -> float | None:
    """A run's payload in bytes with its indices in the authors' form; None where they have none.

    ``weights``: how many the model has, its head included.
    """
    form = RELEASED[method]
    if form is None:
        return None
    masks = form.index_bytes * found.indices + form.weight_bytes * weights * found.sets
    return payload - found.payload + masks
