"""A task-specific mask: the entries whose gradient on some rows is largest.

After SIFT (arXiv 2312.11875), which takes the top share of |gradient| of the first batch in each tensor.
Here: the mean gradient of the given batches and one global threshold, as for the other rules. It
needs labelled rows and dense gradients, so it is no function of the checkpoint and has no recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import nn

from fedmask.masks.base import Mask, Rule, mask_size
from fedmask.masks.select import magnitude_keys, smallest, without
from fedmask.space import backbone_parameters, float32_chunks, parameter_space


def gradient_mask(model: nn.Module, losses: Iterable[Callable[[], torch.Tensor]], rule: Rule) -> Mask:
    """The k entries of largest absolute mean gradient.

    ``losses``: functions, each of which runs ``model`` on one batch and returns its scalar loss. The
    model must not be tuned at the moment. Ties by tensor order, then flat index; ``rule.per_tensor``
    is ignored. Leaves no gradients behind. CheckpointError for a gradient that is not finite.
    """
    space = parameter_space(model, rule.eligible)
    parameters = backbone_parameters(model)
    chosen = [parameters[name] for name in space.names]
    before = [p.requires_grad for p in chosen]
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in chosen]
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        for loss in losses:
            for total, gradient in zip(
                sums, torch.autograd.grad(loss(), chosen, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    total += gradient
    finally:
        for parameter, required in zip(chosen, before, strict=True):
            parameter.requires_grad_(required)

    def keys() -> Iterator[tuple[int, np.ndarray]]:
        for name, start, total in zip(space.names, space.offsets, sums, strict=False):
            at = start
            for values in float32_chunks(total):
                yield from without(space.excluded, at, magnitude_keys(values, name, largest=True))
                at += values.size

    return Mask(smallest(keys, mask_size(rule.density, space.eligible_size)), space, rule)
