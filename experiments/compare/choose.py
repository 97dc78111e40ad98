"""Which learning rate won: by validation rows alone, the reported rows have no say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Winner:
    """The learning rate that is used for all seeds. ``edge``: it is the smallest or largest that was tried,
    so a better one may lie outside."""

    lr: float
    score: float
    edge: bool


def score_of(point: Mapping[str, Any], split: str) -> float:
    """The mean over the tasks of a curve's point; ``split`` is ``validation`` or ``reported``."""
    return fmean(point[split].values())


def best_point(result: Result) -> Mapping[str, Any]:
    """The round of the best validation score (the earliest of equals): what stopping early would keep."""
    points: Sequence[Mapping[str, Any]] = result["curve"]
    return max(points, key=lambda point: (score_of(point, "validation"), -point["round"]))


def choose(
    results: Sequence[Result], rates: Sequence[float], select: Literal["final", "best"]
) -> Winner | None:
    """The winner among the finished searches of one variant; None when none has finished.

    Equal scores: the lower validation loss wins, then the smaller rate. A failed run cannot win, and a
    winner beside it is no edge: the search has seen that side.
    """
    done = {result["lr"]: result for result in results if result["status"] == "ok"}
    if not done:
        return None

    def rank(lr: float) -> tuple[float, float, float]:
        point = done[lr]["curve"][-1] if select == "final" else best_point(done[lr])
        return score_of(point, "validation"), -fmean(point["validation_loss"].values()), -lr

    lr = max(done, key=rank)
    return Winner(lr, rank(lr)[0], len(rates) > 1 and lr in (min(rates), max(rates)))
