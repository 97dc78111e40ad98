"""Metrics, each computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedmask.errors import ConfigError, DataError
from fedmask.tasks import score


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "expected"),
    [
        ("accuracy", [0, 1, 2, 2], [0, 1, 1, 2], 3 / 4),
        # 2 true positives, 1 false positive, 1 false negative: 2 * 2 / (2 * 2 + 1 + 1)
        ("f1", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2 / 3),
        ("f1", [0, 0], [0, 0], 0.0),
        # TP 2, TN 1, FP 1, FN 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
        ("matthews", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 1 / 6),
        ("matthews", [0, 1, 2], [0, 1, 2], 1.0),
        ("matthews", [1, 1, 1], [0, 1, 0], 0.0),
        ("matthews", [1], [1], 0.0),
        # ranks 1 2 3 4 against 1 2 4 3: 1 - 6 * 2 / (4 * 15)
        ("spearman", [0.1, 0.2, 0.3, 9.0], [1.0, 2.0, 4.0, 3.0], 0.8),
        # ties share a rank: 1, 2.5, 2.5 against 1, 2, 3: cov 1.5 / sqrt(1.5 * 2)
        ("spearman", [1.0, 2.0, 2.0], [1.0, 2.0, 3.0], math.sqrt(3) / 2),
        ("spearman", [5.0, 5.0], [1.0, 2.0], 0.0),
        ("spearman", [1.0], [1.0], 0.0),
    ],
)
def test_by_hand(metric: str, predictions: list[float], labels: list[float], expected: float) -> None:
    assert score(metric, np.array(predictions), np.array(labels)) == pytest.approx(expected, abs=1e-12)


def test_bad_calls() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'acuracy'; the nearest is 'accuracy'"):
        score("acuracy", np.zeros(1), np.zeros(1))
    for predictions, labels in (
        (np.zeros(0), np.zeros(0)),
        (np.zeros(2), np.zeros(3)),
        (np.zeros((2, 3)),) * 2,
    ):
        with pytest.raises(DataError, match="expected as many predictions as labels"):
            score("accuracy", predictions, labels)
