"""What a task-specific rule gives: one score an eligible entry, from labelled rows and a model.

Each such rule is a function ``(model, space, evidence, settings) -> Scores``. The mask is the k entries of
largest score, so that whoever holds scores may choose: a client for itself, a server with rows of its own,
or many clients together (``fedmask.masks.votes``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedmask.config import ScoreConfig, TrainConfig
from fedmask.masks.base import Mask, Rule
from fedmask.masks.select import choose
from fedmask.rng import rng_for
from fedmask.space import ParameterSpace
from fedmask.tasks import Tokenized


@dataclass(frozen=True, eq=False)
class Evidence:
    """The labelled rows that a rule looks at, how they are batched, and whose random streams it uses.

    ``plan``: batch size, and for rules that train also optimizer, clipping and dropout. ``client`` is the
    partition, -1 for a server.
    """

    data: Tokenized
    pad_id: int
    plan: TrainConfig
    seed: int
    client: int = -1

    def generator(self, purpose: str) -> np.random.Generator:
        """The stream of one purpose, of no round: scoring comes before the first."""
        return rng_for(self.seed, -1, self.client, purpose)


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each eligible entry matters: the larger the number, the more.

    ``tensors``: float32, not negative, one for each tensor of ``space`` in its shape. They are all that is
    held: N numbers; choosing from them reads them in chunks.
    """

    space: ParameterSpace
    tensors: Sequence[torch.Tensor]

    def read(self, name: str) -> torch.Tensor:
        """The scores of one tensor by name, float32 in its shape."""
        return self.tensors[self.space.names.index(name)]

    def at(self, indices: np.ndarray) -> np.ndarray:
        """The scores (float32 ``[k]``) at sorted flat indices (int64 ``[k]``)."""
        parts = zip(self.tensors, self.space.split(indices), strict=True)
        return np.concatenate([t.reshape(-1)[torch.from_numpy(part)].numpy() for t, part in parts])

    def mask(self, rule: Rule) -> Mask:
        """The k entries of largest score, overall or (``rule.per_tensor``) in each tensor.

        Exactly k, also where fewer have a score above zero; ties by tensor order, then flat index.
        CheckpointError naming the tensor where a score is not finite.
        """
        return Mask(choose(self.space, self.read, rule, largest=True), self.space, rule)


Scorer = Callable[[nn.Module, ParameterSpace, Evidence, ScoreConfig], Scores]
"""``model``: the task's, with its head, nothing attached, in evaluation mode; it is left as it was."""
