"""A round's mean where the trained entries differ between rounds or clients.

A mask that moves is the same for all clients of a round, so any strategy without a memory works on it as on
a fixed one. With a mask a client each entry is averaged over those that hold it. Strategies that keep a
state a coordinate are refused: the coordinates of the next round are others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedmask.aggregation import SparseUpdate, TaskSums, add_update, averaged, start_sums, union_mean
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError
from fedmask.unions import Indices, SparseChange, grow, put, take
from fedmask.workspace import Workspace
from server.catalogue import MEAN, resolve
from server.exact import ExactTally
from server.state import RunState
from server.strategy import Combined, Contribution, Strategy, Tally

WITH_STATE = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
_ANY_MASK = (MEAN, "fedavg")
_TASK_TOTAL = 1 << 20


def refuse_strategy(config: RunConfig) -> None:
    """Raises ``ConfigError`` for a strategy that unequal masks have no meaning for."""
    if not config.has_views:
        return
    name = resolve(config.server.strategy)
    if config.mask_schedule == "fixed" and name not in _ANY_MASK:
        raise ConfigError(
            f"server.strategy {name!r} compares or remembers whole vectors, and with placement 'client' every"
            f" client's has other entries: use {_ANY_MASK[1]!r} or {MEAN!r}, or placement 'agreed'"
        )
    if name in WITH_STATE:
        raise ConfigError(
            f"server.strategy {name!r} keeps a state for each trained entry, and with mask_schedule"
            f" {config.mask_schedule!r} they are others in the next round: use 'fedavg', {MEAN!r} or a robust"
            " one, or mask_schedule 'fixed'"
        )


def start_tally(strategy: Strategy, workspace: Workspace, state: RunState, most_examples: int) -> Tally:
    """The round after ``state``, whatever masks its clients have."""
    round, heads = state.round + 1, state.heads
    if workspace.products is not None:
        tally = strategy.start(round, state.shared[workspace.products.residual_size :], heads, most_examples)
        return ExactTally(tally, workspace.products, workspace.config, state.shared)
    if not workspace.config.has_views:
        return strategy.start(round, state.shared, heads, most_examples)
    known = state.positions(workspace).known(state.round)
    if workspace.config.mask_schedule != "fixed":
        mask = workspace.schedule.mask(round).indices
        return MovingTally(strategy, round, known, mask, state.shared, heads, most_examples)
    weighting = workspace.config.server.task_weighting
    return UnionTally(known, state.shared, heads, most_examples, weighting, workspace.space.size)


class MovingTally:
    """A round on one mask of many: the strategy sees that mask's entries and what is trained besides."""

    def __init__(
        self,
        strategy: Strategy,
        round: int,
        known: Indices,
        mask: Indices,
        shared: np.ndarray,
        heads: Mapping[str, np.ndarray],
        most_examples: int,
    ) -> None:
        """``shared``: float32, values at ``known`` (int64) and what is trained besides; ``mask``: int64."""
        self.mask = mask
        self.change = SparseChange(known, shared[: known.size])
        seen = np.concatenate([take(self.change, mask), shared[known.size :]])
        self.inner: Tally = strategy.start(round, seen, heads, most_examples)

    def add(self, reply: Contribution) -> None:
        """See ``Tally``."""
        self.inner.add(reply)

    def result(self) -> Combined:
        """See ``Tally``; ``shared`` has the new entries too."""
        found = self.inner.result()
        after = put(self.change, self.mask, found.shared[: self.mask.size])
        return replace(found, shared=np.concatenate([after.values, found.shared[self.mask.size :]]))


class UnionTally:
    """A round of unequal masks. Holds the replies' masked values: O(sum of k)."""

    def __init__(
        self,
        known: Indices,
        shared: np.ndarray,
        heads: Mapping[str, np.ndarray],
        most_examples: int,
        weighting: str,
        size: int,
    ) -> None:
        """``shared``: float32, values at ``known`` (int64), the rest; ``size``: length of the index space."""
        self.change = SparseChange(known, shared[: known.size])
        self.beside, self.heads, self.weighting, self.size = shared[known.size :], heads, weighting, size
        sizes = {task: self.beside.size + head.size for task, head in heads.items()}
        self.sums: TaskSums = start_sums(sizes, most_examples)
        self.replies: list[tuple[Contribution, np.ndarray]] = []

    def add(self, reply: Contribution) -> None:
        """See ``Tally``; the reply says which entries it has trained."""
        if reply.indices is None:
            raise FederationError(f"client {reply.client}: expected the entries of its mask, found none")
        k = reply.indices.size
        add_update(self.sums, reply.task, reply.change[k:], reply.examples)
        self.replies.append((replace(reply, change=reply.change[:0]), reply.change[:k]))

    def result(self) -> Combined:
        """See ``Tally``; ``shared`` has the new entries too."""
        if not self.replies:
            raise FederationError("expected an update or more, found none")
        updates = [
            SparseUpdate(reply.indices, values, weight)
            for (reply, values), weight in zip(self.replies, self._weights(), strict=True)
            if reply.indices is not None
        ]
        places, mean = union_mean(updates, self.size, over="holders")
        grown = grow(self.change, places)
        after = put(grown, places, take(grown, places) + mean)
        beside, heads = averaged(self.sums, self.beside, self.heads, self.weighting)  # type: ignore[arg-type]
        shared = np.concatenate([after.values, beside])
        if not all(np.isfinite(vector).all() for vector in (shared, *heads.values())):
            raise FederationError("the vector has left the range of float32; lower the learning rate")
        return Combined(shared, heads, tuple(sorted(reply.client for reply, _ in self.replies)))

    def _weights(self) -> list[int]:
        """Whole weights: examples, or (``equal``, several tasks) such that each task's add up to the same."""
        totals: dict[str, int] = {}
        for reply, _ in self.replies:
            totals[reply.task] = totals.get(reply.task, 0) + reply.examples
        if self.weighting == "examples" or len(totals) == 1:
            return [reply.examples for reply, _ in self.replies]
        return [max(1, round(reply.examples * _TASK_TOTAL / totals[reply.task])) for reply, _ in self.replies]
