"""A mask in figures: its size, its threshold, and where its entries lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from fedmask.masks import Mask
from fedmask.space import backbone_parameters, float32_chunks
from fedmask.stored import stored_reader


def mask_facts(model: nn.Module, mask: Mask) -> dict[str, Any]:
    """What ``fedmask mask`` prints, as plain values.

    ``threshold`` is the largest |w| inside the mask (stored values, float32); ``zeros`` counts the exact
    zeros inside it; ``tensors`` has one row an eligible tensor with its size, its masked entries and
    their share of the tensor.
    """
    read = stored_reader(model, backbone_parameters(model))
    chosen = mask.per_tensor()
    threshold, zeros, rows = 0.0, 0, []
    for name, shape in zip(mask.space.names, mask.space.shapes, strict=True):
        inside = chosen.get(name, np.empty(0, dtype=np.int64))
        if inside.size:
            values = np.abs(_values(read(name), inside))
            threshold = max(threshold, float(values.max()))
            zeros += int(np.count_nonzero(values == 0))
        size = int(np.prod(shape))
        rows.append(
            {"tensor": name, "shape": list(shape), "size": size, "masked": int(inside.size),
             "share": inside.size / size}
        )  # fmt: skip
    return {
        "k": mask.k,
        "eligible_size": mask.space.eligible_size,
        "density": mask.rule.density,
        "eligible": mask.rule.eligible,
        "per_tensor": mask.rule.per_tensor,
        "threshold": threshold,
        "zeros": zeros,
        "digest": mask.digest,
        "checkpoint_digest": mask.space.checkpoint,
        "recipe_bytes": len(mask.recipe().to_json().encode()),
        "tensors": rows,
    }


def _values(tensor: Any, indices: np.ndarray) -> np.ndarray:
    """Entries of a tensor as float32, read chunk by chunk: a checkpoint may be larger than what is free."""
    parts, start = [], 0
    for chunk in float32_chunks(tensor):
        low, high = np.searchsorted(indices, (start, start + chunk.size))
        parts.append(chunk[indices[low:high] - start])
        start += chunk.size
    return np.concatenate(parts)
