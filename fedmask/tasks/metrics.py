"""The score of a task's predictions. Higher is better for each metric."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedmask.errors import ConfigError, DataError, unknown

Values = npt.NDArray[np.generic]


def score(metric: str, predictions: Values, labels: Values) -> float:
    """The metric over n rows; ``predictions`` and ``labels`` have shape [n].

    Class ids for ``accuracy`` (share in [0, 1]), ``f1`` (of class 1 against class 0, in [0, 1]) and
    ``matthews`` (in [-1, 1], any number of classes); values for ``spearman`` (in [-1, 1], equal
    values share their mean rank). Where a metric is undefined (no positive row or prediction; all
    predictions or all labels equal) it is 0. From scikit-learn and SciPy. Raises ConfigError for an
    unknown metric, DataError for no rows or unequal lengths.
    """
    if metric not in METRICS:
        raise ConfigError(unknown("metric", metric, METRICS))
    if predictions.shape != labels.shape or labels.ndim != 1 or not labels.size:
        raise DataError(
            f"metric {metric}: expected as many predictions as labels and one or more,"
            f" found shapes {predictions.shape} and {labels.shape}"
        )
    return METRICS[metric](predictions, labels)


def _accuracy(predictions: Values, labels: Values) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: Values, labels: Values) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels == 1, predictions == 1, zero_division=0.0))


def _matthews(predictions: Values, labels: Values) -> float:
    from sklearn.metrics import matthews_corrcoef

    return 0.0 if _constant(predictions, labels) else float(matthews_corrcoef(labels, predictions))


def _spearman(predictions: Values, labels: Values) -> float:
    from scipy.stats import spearmanr

    return 0.0 if _constant(predictions, labels) else float(spearmanr(predictions, labels).statistic)


def _constant(predictions: Values, labels: Values) -> bool:
    return bool(np.all(predictions == predictions[0]) or np.all(labels == labels[0]))


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "spearman": _spearman,
}
