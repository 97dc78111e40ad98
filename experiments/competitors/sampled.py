"""Our own way, prepared like the others."""

from __future__ import annotations

from torch import nn

from experiments.competitors.base import Contender
from fedmask.masks import Mask
from fedmask.sparse import sparsify


def sampled(model: nn.Module, mask: Mask) -> Contender:
    """The mask's entries (PaFi, arXiv 2305.16742), by the sampled gradient."""
    tuned = sparsify(model, mask)
    chosen = [p for p in tuned.parameters() if p.requires_grad]
    # The entries' stored values and what the weights hold now (4 bytes each), where each lies in its weight
    # (8), row and column (4 + 4).
    return Contender(tuned, chosen, mask.k, extra_bytes=mask.k * 24)
