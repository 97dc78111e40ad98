"""Federated fine-tuning of pre-trained transformers through one shared, magnitude-chosen sparse mask."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmask.errors import FedmaskError
    from fedmask.masks import Mask, Recipe, Rule, derive_mask, magnitude_mask
    from fedmask.sparse import load_delta, save_delta, sparsify, weight_adapters
    from fedmask.tuner import merge

__version__ = "0.1.0"

_HOME = {
    "FedmaskError": "fedmask.errors",
    "Mask": "fedmask.masks",
    "Recipe": "fedmask.masks",
    "Rule": "fedmask.masks",
    "derive_mask": "fedmask.masks",
    "magnitude_mask": "fedmask.masks",
    "load_delta": "fedmask.sparse",
    "save_delta": "fedmask.sparse",
    "sparsify": "fedmask.sparse",
    "weight_adapters": "fedmask.sparse",
    "merge": "fedmask.tuner",
}

__all__ = [
    "FedmaskError",
    "Mask",
    "Recipe",
    "Rule",
    "derive_mask",
    "load_delta",
    "magnitude_mask",
    "merge",
    "save_delta",
    "sparsify",
    "weight_adapters",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the command line and the config must not wait for torch.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fedmask' has no attribute {name!r}")
