"""The strategy ``mean``: replies are added up as they arrive and let go, whatever their number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmask.aggregation import TaskSums, add_update, averaged, start_sums
from fedmask.aggregation.tasks import Weighting
from fedmask.config import ServerConfig
from fedmask.errors import FederationError
from server.catalogue import MEAN, checked_options, resolve
from server.strategy import Combined, Contribution, ServerStrategy, Strategy, Tally


class StreamingMean:
    """FedAvg's mean with memory for one sum a task instead of every reply.

    The bits do not depend on the order of arrival: see ``fedmask.aggregation.fixed``. Carries nothing from
    round to round. Raises ``ConfigError`` for options: there are none.
    """

    name = MEAN

    def __init__(
        self, options: Mapping[str, float] | None = None, task_weighting: Weighting = "equal"
    ) -> None:
        checked_options(MEAN, options or {})
        self.task_weighting: Weighting = task_weighting

    def check(self, clients: int, shared: int) -> None:
        """Any number of clients and of shared values will do."""

    def start(
        self, round: int, shared: np.ndarray, heads: Mapping[str, np.ndarray], most_examples: int
    ) -> Tally:
        """See ``Strategy``: float32 ``[n]`` vectors."""
        sizes = {task: shared.size + head.size for task, head in heads.items()}
        return _Running(shared, heads, start_sums(sizes, most_examples), self.task_weighting)

    def state(self) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Nothing to load."""


class _Running:
    """A round of which only sums are kept."""

    def __init__(
        self, shared: np.ndarray, heads: Mapping[str, np.ndarray], sums: TaskSums, weighting: Weighting
    ) -> None:
        self.shared, self.heads, self.sums, self.weighting = shared, heads, sums, weighting
        self.clients: list[int] = []

    def add(self, reply: Contribution) -> None:
        add_update(self.sums, reply.task, reply.change, reply.examples)
        self.clients.append(reply.client)

    def result(self) -> Combined:
        if not self.clients:
            return Combined(self.shared, dict(self.heads), (), f"{MEAN} had no replies: the old vector stays")
        shared, heads = averaged(self.sums, self.shared, self.heads, self.weighting)
        if not all(np.isfinite(vector).all() for vector in (shared, *heads.values())):
            raise FederationError(
                f"{MEAN}: the vector has left the range of float32; lower the learning rate"
            )
        return Combined(shared, heads, tuple(sorted(self.clients)))


def make_strategy(settings: ServerConfig) -> Strategy:
    """The strategy that a run asks for. Raises ``ConfigError``."""
    if resolve(settings.strategy) == MEAN:
        return StreamingMean(settings.options, settings.task_weighting)
    return ServerStrategy(settings.strategy, settings.options, settings.task_weighting)
