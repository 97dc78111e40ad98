"""Sparse fine-tuning as published tools do it: the dense gradient, multiplied by a mask.

After FISH Mask (Sung et al., arXiv 2111.09839) and LT-SFT (Ansell et al., arXiv 2110.07560), whose public
code trains the dense weights and masks their gradients before the optimizer's step. What differs: the mask
is ours, and its tensors are bool.
"""

from __future__ import annotations

import torch
from torch import nn

from experiments.competitors.base import Contender, train_only
from fedmask.masks import Mask


def dense_with_mask(model: nn.Module, mask: Mask) -> Contender:
    """The mask's entries, by dense gradients of the tensors that hold them."""
    parts = mask.per_tensor()
    chosen = train_only(model, parts.__contains__)
    named = dict(model.named_parameters())
    masks: list[tuple[nn.Parameter, torch.Tensor]] = []
    for name, indices in parts.items():
        keep = torch.zeros(named[name].numel(), dtype=torch.bool)
        keep[torch.from_numpy(indices)] = True
        masks.append((named[name], keep.view(named[name].shape)))

    def apply() -> None:
        for parameter, keep in masks:
            if parameter.grad is not None:
                parameter.grad.mul_(keep)

    return Contender(model, chosen, mask.k, apply, sum(keep.numel() for _, keep in masks))
