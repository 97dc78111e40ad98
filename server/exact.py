"""A round whose mean is that of LoRA's products: the factors' means, and in the weights what they miss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmask.channel import down_way
from fedmask.config import RunConfig
from fedmask.products import Products
from server.strategy import Combined, Contribution, Tally, reply_weights


class ExactTally:
    """Sees factors and heads as any round does, and keeps the replies' factors for the residual: O(n f)."""

    def __init__(self, inner: Tally, products: Products, config: RunConfig, shared: np.ndarray) -> None:
        """``inner``: the round's mean of factors and heads; ``shared``: float32, residual, then factors."""
        self.inner, self.products, self.config = inner, products, config
        self.residual, self.start = np.split(shared, [products.residual_size])
        self.replies: list[Contribution] = []

    def add(self, reply: Contribution) -> None:
        """See ``Tally``."""
        self.inner.add(reply)
        self.replies.append(replace(reply, change=reply.change[: self.start.size].copy()))

    def result(self) -> Combined:
        """See ``Tally``; ``shared`` begins with the residual."""
        found = self.inner.result()
        ordered = [
            one for one in sorted(self.replies, key=lambda one: one.client) if one.client in found.selected
        ]
        weights = np.array(reply_weights(ordered, self.config.server.task_weighting))
        replies = (
            [reply.change for reply in ordered],
            (weights / weights.sum()).tolist(),
            found.shared.astype(np.float64) - self.start,
        )
        factors = None
        if self.products.sends_factors(down_way(self.config.down).change):
            # All parties add up what the codec leaves of the factors, the server too.
            factors = self.products.rounded(self.products.stacked(*replies), self.config.down)
            residual = self.products.added(self.residual, factors)
        else:
            residual = self.products.summed(self.residual, *replies)
        return replace(found, shared=np.concatenate([residual, found.shared]), factors=factors)
