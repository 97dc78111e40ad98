"""One round's aggregation: a strategy of ``flwr.serverapp.strategy`` over what all clients share.

The wrapped strategy sees one float32 array per reply: the shared segments as base + change. It never
samples, sends or sees a head; heads are averaged here, per task, over the replies that it selected.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import AppExitException

from fedmask.errors import ConfigError, FederationError, unknown
from fedmask.flower import ensure_identity

SHARED = "shared"
WEIGHT = "num-examples"
CLIENT = "client"


class Limits(NamedTuple):
    """Type and open or closed range of one option: ``low < x < high``, closed where ``closed`` says so."""

    kind: type
    low: float
    high: float
    closed: str = ""


class Known(NamedTuple):
    """A strategy that is offered: its class, its options, and how many replies it needs."""

    cls: type[flower.FedAvg]
    options: Mapping[str, Limits]
    # Replies needed = per_malicious x num_malicious_nodes + at_least (Krum: n > 2f + 2; Bulyan: n >= 4f + 3).
    per_malicious: int = 0
    at_least: int = 1


_RATE = Limits(float, 0.0, float("inf"))
_MOMENTUM = Limits(float, 0.0, 1.0, "low")
_COUNT = Limits(int, 0, 1_000_000, "low")
_ADAPTIVE = {"eta": _RATE, "tau": _RATE}
_MOMENTS = {"beta_1": _MOMENTUM, "beta_2": _MOMENTUM}

STRATEGIES: dict[str, Known] = {
    "fedavg": Known(flower.FedAvg, {}),
    "fedavgm": Known(flower.FedAvgM, {"server_learning_rate": _RATE, "server_momentum": _MOMENTUM}),
    "fedadam": Known(flower.FedAdam, {**_ADAPTIVE, **_MOMENTS}),
    "fedyogi": Known(flower.FedYogi, {**_ADAPTIVE, **_MOMENTS}),
    "fedadagrad": Known(flower.FedAdagrad, _ADAPTIVE),
    "fedmedian": Known(flower.FedMedian, {}),
    "fedtrimmedavg": Known(flower.FedTrimmedAvg, {"beta": Limits(float, 0.0, 0.5, "low")}),
    "krum": Known(flower.Krum, {"num_malicious_nodes": _COUNT}, 2, 3),
    "multikrum": Known(
        flower.MultiKrum,
        {"num_malicious_nodes": _COUNT, "num_nodes_to_select": Limits(int, 1, 1_000_000, "low")},
        2,
        3,
    ),
    "bulyan": Known(flower.Bulyan, {"num_malicious_nodes": _COUNT}, 4, 3),
}

_DP = "its noise is calibrated for full models clipped by Flower, not for a flat vector of changes"
_XGB = "it aggregates boosted trees, not vectors"
REFUSED: dict[str, str] = {
    "fedprox": "it needs a proximal term in the clients' loss, which the local update does not have",
    "qfedavg": "it needs each client's loss on the received model to weigh its reply",
    "fedopt": "it is the base of fedadam, fedyogi and fedadagrad; choose one of them",
    "fedxgbbagging": _XGB,
    "fedxgbcyclic": _XGB,
    "differentialprivacyserversidefixedclipping": _DP,
    "differentialprivacyserversideadaptiveclipping": _DP,
    "differentialprivacyclientsidefixedclipping": _DP,
    "differentialprivacyclientsideadaptiveclipping": _DP,
}


@dataclass(frozen=True)
class Contribution:
    """One accepted reply.

    ``change``: float32 ``[n]``, local vector - received vector, shared segments first, the task's head last.
    """

    client: int
    task: str
    examples: int
    change: np.ndarray
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Combined:
    """Vectors after a round (float32), the clients that counted, a note when the old ones were kept."""

    shared: np.ndarray
    heads: dict[str, np.ndarray]
    selected: tuple[int, ...]
    note: str = ""


class ServerStrategy:
    """A Flower strategy by name, given what it needs and nothing else.

    ``name``: a key of ``STRATEGIES`` (case, '-' and '_' do not matter); ``options``: its own settings.
    ``task_weighting``: ``equal`` gives each task the same total weight, ``examples`` the sum of its rows.
    Raises ``ConfigError`` for an unknown or refused name and for unknown or impossible options.
    """

    def __init__(
        self, name: str, options: Mapping[str, float] | None = None, task_weighting: str = "equal"
    ) -> None:
        self.name = _resolve(name)
        self.known = STRATEGIES[self.name]
        self.options = _checked(self.name, self.known, options or {})
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
                **self.options,
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
        weights = _weights(ordered, self.task_weighting)
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
            with _quiet():
                self._show_current(round, shared)
                arrays, _ = self.inner.aggregate_train(round, messages)
        except (AppExitException, ValueError, ArithmeticError) as error:
            raise FederationError(f"{self.name} failed in round {round}: {error}") from error
        if arrays is None:
            return None
        result = arrays[SHARED].numpy()
        if result.shape != shared.shape or not np.isfinite(result).all():
            raise FederationError(
                f"{self.name} gave values that are no vector of {shared.size} finite numbers in round"
                f" {round}; check its options"
            )
        return result.astype(np.float32)

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


def _resolve(name: str) -> str:
    plain = name.lower().replace("-", "").replace("_", "")
    if plain in REFUSED:
        raise ConfigError(f"server.strategy {name!r} cannot be used: {REFUSED[plain]}")
    if plain not in STRATEGIES:
        raise ConfigError(unknown("server.strategy", name, STRATEGIES))
    return plain


def _checked(name: str, known: Known, options: Mapping[str, float]) -> dict[str, float]:
    out: dict[str, float] = {}
    for key, value in options.items():
        if key not in known.options:
            if not known.options:
                raise ConfigError(f"server.options: {name!r} takes no options, found {key!r}")
            raise ConfigError(unknown(f"option of {name!r}", key, known.options))
        kind, low, high, closed = known.options[key]
        whole = float(value).is_integer()
        inside = low < value < high or (closed == "low" and value == low)
        if not inside or (kind is int and not whole):
            what = "a whole number" if kind is int else "a number"
            edge = "at least" if closed == "low" else "greater than"
            raise ConfigError(
                f"server.options.{key}: expected {what} {edge} {low} and below {high}, found {value}"
            )
        out[key] = kind(value)
    return out


def _weights(replies: Sequence[Contribution], task_weighting: str) -> list[float]:
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
