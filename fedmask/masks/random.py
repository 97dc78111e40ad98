"""The data-free control: k entries drawn uniformly from a seed that all parties share."""

from __future__ import annotations

import numpy as np
from torch import nn

from fedmask.masks.base import Mask, Rule, mask_size
from fedmask.rng import rng_for
from fedmask.space import parameter_space


def random(model: nn.Module, rule: Rule) -> Mask:
    """k distinct eligible entries, uniform over the space, drawn from ``rule.seed``.

    ``per_tensor`` has no meaning for a uniform draw and is ignored.
    """
    space = parameter_space(model, rule.eligible)
    k = mask_size(rule.density, space.eligible_size)
    drawn = rng_for(rule.seed, -1, -1, "mask").choice(
        space.eligible_size, size=k, replace=False, shuffle=False
    )
    indices = np.sort(drawn.astype(np.int64))
    for start, stop in space.excluded:  # ranks among eligible entries -> flat indices
        indices[indices >= start] += stop - start
    return Mask(indices, space, rule)
