"""The search: validation rows choose, the reported rows have no say."""

from __future__ import annotations

from typing import Any

from experiments.compare.choose import best_point, choose


def result(lr: float, *validation: float, reported: float = 0.5, loss: float = 1.0) -> dict[str, Any]:
    curve = [
        {"round": i, "validation": {"a": score, "b": score}, "reported": {"a": reported},
         "validation_loss": {"a": loss}} for i, score in enumerate(validation)
    ]  # fmt: skip
    return {"lr": lr, "status": "ok", "curve": curve}


RATES = (1e-3, 1e-2, 1e-1)


def test_the_best_final_validation_score_wins_whatever_is_reported() -> None:
    found = choose([result(1e-3, 0.1, 0.7, reported=0.9), result(1e-2, 0.2, 0.8), result(1e-1, 0.9, 0.6)],
                   RATES, "final")  # fmt: skip
    assert found is not None
    assert (found.lr, found.score, found.edge) == (1e-2, 0.8, False)


def test_the_best_round_may_choose_instead() -> None:
    found = choose([result(1e-2, 0.2, 0.8), result(1e-1, 0.9, 0.6)], RATES, "best")
    assert found is not None
    assert (found.lr, found.score, found.edge) == (1e-1, 0.9, True)


def test_equal_scores_go_by_loss_and_then_by_the_smaller_rate() -> None:
    lower = choose([result(1e-3, 0.8, loss=0.5), result(1e-2, 0.8, loss=0.4)], RATES, "final")
    smaller = choose([result(1e-2, 0.8), result(1e-3, 0.8)], RATES, "final")
    assert lower is not None
    assert smaller is not None
    assert (lower.lr, smaller.lr) == (1e-2, 1e-3)


def test_failed_runs_do_not_win_and_nothing_wins_without_a_finished_one() -> None:
    failed = {"lr": 1e-1, "status": "failed", "error": "x"}
    found = choose([result(1e-2, 0.2), failed], RATES, "final")
    assert found is not None
    assert (found.lr, found.edge) == (1e-2, False)
    assert choose([failed], RATES, "final") is None


def test_one_rate_has_no_edge() -> None:
    found = choose([result(1e-2, 0.2)], (1e-2,), "final")
    assert found is not None
    assert not found.edge


def test_stopping_early_keeps_the_first_of_equal_rounds() -> None:
    assert best_point(result(1e-2, 0.1, 0.6, 0.6, 0.5))["round"] == 1
