"""Which of Flower's strategies are offered, with which options, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.serverapp import strategy as flower

from fedmask.errors import ConfigError, unknown


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


MEAN = "mean"
"""Our own streaming mean (``server.streaming``), which holds no replies."""


def resolve(name: str) -> str:
    """The key of a strategy, or ``MEAN``; case, '-' and '_' do not matter.

    ConfigError for refused and unknown ones.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    if plain in REFUSED:
        raise ConfigError(f"server.strategy {name!r} cannot be used: {REFUSED[plain]}")
    if plain not in (*STRATEGIES, MEAN):
        raise ConfigError(unknown("server.strategy", name, (*STRATEGIES, MEAN)))
    return plain


def checked_options(name: str, options: Mapping[str, float]) -> dict[str, float]:
    """``options`` of the strategy ``name`` (a key), typed. ConfigError for unknown or impossible ones."""
    offered: Mapping[str, Limits] = STRATEGIES[name].options if name in STRATEGIES else {}
    out: dict[str, float] = {}
    for key, value in options.items():
        if key not in offered:
            if not offered:
                raise ConfigError(f"server.options: {name!r} takes no options, found {key!r}")
            raise ConfigError(unknown(f"option of {name!r}", key, offered))
        kind, low, high, closed = offered[key]
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
