"""One round's aggregation: a strategy of ``flwr.serverapp.strategy`` over what all clients share.

The wrapped strategy sees one float32 array per reply: the shared segments as base + change. It never
samples, sends or sees a head; heads are averaged here, per task, over the replies that it selected.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid

from fedmask.errors import ConfigError, FederationError
from fedmask.flower import ensure_identity
from server.catalogue import STRATEGIES, checked_options, resolve

SHARED = "shared"
WEIGHT = "num-examples"
CLIENT = "client"


@dataclass(frozen=True)
class Contribution:
    """One accepted reply.

    ``change``: float32 ``[n]``, local vector - received vector, shared segments first, the task's head last.
    ``indices``: int64 ``[k]``, the entries of the client's own mask, where clients have one each.
    """

    client: int
    task: str
    examples: int
    change: np.ndarray
    metrics: Mapping[str, float] = field(default_factory=dict)
    indices: np.ndarray | None = None


@dataclass(frozen=True)
class Combined:
    """Vectors after a round (float32), the clients that counted, a note when the old ones were kept.

    ``factors``: float32, flat, of the products that have been added to its residual (``fedmask.products``).
    """

    shared: np.ndarray
    heads: dict[str, np.ndarray]
    selected: tuple[int, ...]
    note: str = ""
    factors: np.ndarray | None = None


class Tally(Protocol):
    """One round under way: replies come in as they arrive, the result at the end."""

    def add(self, reply: Contribution) -> None:
        """Take one accepted reply."""

    def result(self) -> Combined:
        """The vectors after the round. Raises ``FederationError`` when there can be none."""


class Strategy(Protocol):
    """What the rounds need of a strategy."""

    name: str

    def check(self, clients: int, shared: int) -> None:
        """Refuse before round 1 what could never work. Raises ``ConfigError``."""

    def start(
        self, round: int, shared: np.ndarray, heads: Mapping[str, np.ndarray], most_examples: int
    ) -> Tally:
        """Begin round ``round`` from the vectors (float32 ``[n]``) that the clients receive.

        ``most_examples``: rows that all replies together may claim.
        """

    def state(self) -> dict[str, np.ndarray]:
        """What is carried from round to round, by name."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """The inverse of ``state``."""


class ServerStrategy:
    """A Flower strategy by name, given what it needs and nothing else.

    ``name``: a key of ``STRATEGIES`` (case, '-' and '_' do not matter); ``options``: its own settings.
    ``task_weighting``: ``equal`` gives each task the same total weight, ``examples`` the sum of its rows.
    Flower's strategies take a list, so all of a round's replies are held until the last one is there.
    Raises ``ConfigError`` for an unknown or refused name and for unknown or impossible options.
    """

    def __init__(
        self, name: str, options: Mapping[str, float] | None = None, task_weighting: str = "equal"
    ) -> None:
        self.name = resolve(name)
        if self.name not in STRATEGIES:
            raise ConfigError(f"{name!r} is none of Flower's strategies; it is made by make_strategy")
        self.known = STRATEGIES[self.name]
        self.options = checked_options(self.name, options or {})
        self.task_weighting = task_weighting
        self.required = self.known.at_least + self.known.per_malicious * int(
            self.options.get("num_malicious_nodes", 0)
        )
        self.required = max(self.required, int(self.options.get("num_nodes_to_select", 1)))
        self._selected: tuple[int, ...] = ()
        ensure_identity()
        with _quiet():
            self.inner = self.known.cls(
                # No sampling and no waiting: this class chooses the clients itself. See _show_current.
                fraction_train=1.0,
                min_train_nodes=0,
                min_available_nodes=0,
                weighted_by_key=WEIGHT,
                # Every strategy calls this hook with exactly the replies that it averages, which is how
                # the selection of Krum, MultiKrum and Bulyan becomes known without touching their code.
                train_metrics_aggr_fn=self._note_selected,
                **self.options,  # type: ignore[arg-type]  # checked against the catalogue
            )

    def check(self, clients: int, shared: int) -> None:
        """Refuse before round 1 what could never work: ``clients`` a round, ``shared`` values.

        Raises ``ConfigError``.
        """
        if shared == 0 and self.name != "fedavg":
            raise ConfigError(
                f"server.strategy {self.name!r} works on what all clients share, and this method shares"
                " nothing but heads: use 'fedavg'"
            )
        if clients < self.required:
            raise ConfigError(
                f"server.strategy {self.name!r} with {self.options or 'its defaults'} needs at least"
                f" {self.required} replies a round, found {clients} clients a round"
            )

    def start(
        self, round: int, shared: np.ndarray, heads: Mapping[str, np.ndarray], most_examples: int
    ) -> Tally:
        """See ``Strategy``: float32 ``[n]`` vectors."""
        return _Held(self, round, shared, heads)

    def combine(
        self,
        round: int,
        shared: np.ndarray,
        heads: Mapping[str, np.ndarray],
        replies: Sequence[Contribution],
    ) -> Combined:
        """The vectors after ``round`` (1 or more).

        ``shared``: float32 ``[s]``, ``heads``: float32 by task, both as sent to the clients. The replies are
        summed in the order of their clients, so the order of arrival cannot matter. Raises
        ``FederationError`` when the wrapped strategy fails.
        """
        ordered = sorted(replies, key=lambda reply: reply.client)
        if len(ordered) < self.required:
            note = f"{self.name} needs {self.required} replies, found {len(ordered)}: the old vector stays"
            return Combined(shared, dict(heads), (), note)
        selected = tuple(reply.client for reply in ordered)
        merged, note = shared, ""
        if shared.size:
            merged_or_none = self._run_inner(round, shared, ordered)
            selected = tuple(sorted(self._selected))
            if merged_or_none is None:
                note = f"{self.name} gave no result: the old vector stays"
                return Combined(shared, dict(heads), (), note)
            merged = merged_or_none
        chosen = [reply for reply in ordered if reply.client in selected]
        return Combined(merged, _mean_heads(heads, chosen, shared.size), selected, note)

    def _run_inner(
        self, round: int, shared: np.ndarray, ordered: Sequence[Contribution]
    ) -> np.ndarray | None:
        weights = reply_weights(ordered, self.task_weighting)
        messages = []
        for reply, weight in zip(ordered, weights, strict=True):
            moved = (shared + reply.change[: shared.size]).astype(np.float32, copy=False)
            content = RecordDict(
                {
                    "arrays": ArrayRecord({SHARED: Array(moved)}),
                    "metrics": MetricRecord({WEIGHT: weight, CLIENT: reply.client}),
                }
            )
            messages.append(Message(content, dst_node_id=0, message_type="train"))
        self._selected = ()
        try:
            with _quiet(), _young_garbage_only():
                self._show_current(round, shared)
                arrays, _ = self.inner.aggregate_train(round, messages)
        except (AppExitException, ValueError, ArithmeticError) as error:
            raise FederationError(f"{self.name} failed in round {round}: {error}") from error
        if arrays is None:
            return None
        with np.errstate(all="ignore"):  # what overflows is named below
            result = arrays[SHARED].numpy().astype(np.float32)
        if result.shape != shared.shape or not np.isfinite(result).all():
            raise FederationError(
                f"{self.name} gave values that are no vector of {shared.size} finite numbers in round"
                f" {round}; check its options"
            )
        return result

    def _show_current(self, round: int, shared: np.ndarray) -> None:
        # FedAvgM, FedAdam, FedYogi and FedAdagrad take the vector that the clients started from in
        # configure_train, the documented place. On a grid without nodes, and with no minimum, that
        # call samples nobody and makes no messages.
        current = ArrayRecord({SHARED: Array(shared)})
        for _ in self.inner.configure_train(round, current, ConfigRecord(), _NoNodes()):
            raise FederationError(f"{self.name} made messages of its own")

    def _note_selected(self, contents: list[RecordDict], _weighted_by: str) -> MetricRecord:
        self._selected = tuple(int(content.metric_records["metrics"][CLIENT]) for content in contents)  # type: ignore[arg-type]
        return MetricRecord()

    def state(self) -> dict[str, np.ndarray]:
        """What the strategy carries from round to round (moments, momentum), by name; empty for most."""
        out: dict[str, np.ndarray] = {}
        for name in ("m_t", "v_t"):
            held = getattr(self.inner, name, None)
            if held:
                out[name] = held[SHARED]
        momentum = getattr(self.inner, "momentum_vector", None)
        if momentum is not None:
            out["momentum_vector"] = momentum[0]
        return out

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """The inverse of ``state``; the next ``combine`` goes on as if nothing had happened."""
        for name, value in state.items():
            wrapped: Any = [value] if name == "momentum_vector" else {SHARED: value}
            setattr(self.inner, name, wrapped)
        # FedAvgM keeps its own copy of the vector; without one it takes the next round's.
        if hasattr(self.inner, "current_arrays"):
            self.inner.current_arrays = None


@dataclass
class _Held:
    """A round whose replies are all kept."""

    strategy: ServerStrategy
    round: int
    shared: np.ndarray
    heads: Mapping[str, np.ndarray]
    replies: list[Contribution] = field(default_factory=list)

    def add(self, reply: Contribution) -> None:
        self.replies.append(reply)

    def result(self) -> Combined:
        return self.strategy.combine(self.round, self.shared, self.heads, self.replies)


def reply_weights(replies: Sequence[Contribution], task_weighting: str) -> list[float]:
    """The weight of each reply: its rows, scaled so that every task's total is the same when asked for.

    With one task the factor is exactly 1, so the plain row counts reach the strategy.
    """
    per_task: dict[str, int] = {}
    for reply in replies:
        per_task[reply.task] = per_task.get(reply.task, 0) + reply.examples
    if task_weighting == "examples" or len(per_task) == 1:
        return [float(reply.examples) for reply in replies]
    mean = sum(per_task.values()) / len(per_task)
    return [reply.examples * mean / per_task[reply.task] for reply in replies]


def _mean_heads(
    heads: Mapping[str, np.ndarray], replies: Iterable[Contribution], start: int
) -> dict[str, np.ndarray]:
    """Per task: head + mean of the changes weighted by rows (summed in float64); others stay as they are."""
    sums: dict[str, np.ndarray] = {}
    rows: dict[str, int] = {}
    for reply in replies:
        part = reply.change[start:].astype(np.float64) * reply.examples
        sums[reply.task] = sums[reply.task] + part if reply.task in sums else part
        rows[reply.task] = rows.get(reply.task, 0) + reply.examples
    return {
        task: (head + sums[task] / rows[task]).astype(np.float32) if task in sums else head
        for task, head in heads.items()
    }


class _NoNodes(Grid):
    """A grid that no client is connected to."""

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the strategy's own lines ("Sampled 0 nodes") out of the log: the wrapper says what happened."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _young_garbage_only() -> Iterator[None]:
    """Let garbage collections skip all that is there already.

    Flower calls ``gc.collect`` once an array in ``ArrayRecord.to_numpy_ndarrays(keep_input=False)``, which
    Bulyan does for each reply; beside a loaded model that is seconds a reply for nothing.
    """
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()
