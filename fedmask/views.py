"""What one client trains in one round, and what it must know of the rest of the run's change."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from fedmask.layout import HEAD_PREFIX, Layout, Segment
from fedmask.masks import Mask, Rule
from fedmask.space import ParameterSpace
from fedmask.trainables import MaskedEntries
from fedmask.tuner import attach, detach, tuning_of
from fedmask.unions import SparseChange, take, without

UNION = "union"
"""The segment of a down-link vector with values of the union."""


@dataclass(frozen=True, eq=False)
class View:
    """``trained``: the entries that train. ``carried``: int64 ``[c]``, sorted, the others that have changed.

    A model that looks through a view has the segments ``carried``, ``mask`` and whatever the method trains
    besides, in this order.
    """

    trained: Mask
    carried: np.ndarray

    def read(self, change: SparseChange, beside: np.ndarray) -> np.ndarray:
        """The vector (float32) that a model starts from: carried, trained, then ``beside`` as it is."""
        return np.concatenate([take(change, self.carried), take(change, self.trained.indices), beside])

    def sent(self, vector: np.ndarray) -> np.ndarray:
        """Of such a vector (flat) the part that a client sends: all but the carried values."""
        return vector[self.carried.size :]


def view_of(change: SparseChange, trained: Mask) -> View:
    """The view of a client that trains ``trained`` and carries all else of ``change``."""
    return View(trained, without(change.indices, trained.indices))


def turn(model: nn.Module, mask: Mask) -> None:
    """Let a tuned ``model`` train another mask; all else that is attached to it stays."""
    parts = tuning_of(model).trainables
    detach(model)
    turned = [
        MaskedEntries(model, mask, kernel=part.kernel) if isinstance(part, MaskedEntries) else part
        for part in parts
    ]
    attach(model, turned)


def union_mask(indices: np.ndarray, space: ParameterSpace, rule: Rule) -> Mask:
    """A union of masks (int64, sorted) as a mask itself, which no rule derives: for files of a whole run."""
    share = indices.size / space.eligible_size
    return Mask(indices, space, replace(rule, name="union", density=share, per_tensor=False))


def down_layout(beside: Layout, entries: int) -> Layout:
    """Segments of a down-link vector: ``entries`` values of the union, then all but masks of ``beside``."""
    return Layout((Segment(UNION, entries), *_others(beside)))


def up_layout(beside: Layout, entries: int) -> Layout:
    """Segments of an update: the ``entries`` trained values, then all but masks of ``beside``."""
    return Layout((Segment("mask", entries), *_others(beside)))


def beside_size(layout: Layout) -> int:
    """Number of values that all clients share outside of masks (biases and the like)."""
    return sum(s.size for s in _others(layout) if not s.name.startswith(HEAD_PREFIX))


def _others(layout: Layout) -> tuple[Segment, ...]:
    return tuple(s for s in layout.segments if s.name not in ("carried", "mask"))
