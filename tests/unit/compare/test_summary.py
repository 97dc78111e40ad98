"""Rows and tables from results that were made up, checked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from experiments.compare.study import Study, study_from
from experiments.compare.summary import goals, summarize
from experiments.compare.tables import Table, all_tables, budget_steps, spread


def study() -> Study:
    return study_from(
        {
            "name": "made",
            "narrow": "a test",
            "seeds": [1, 2, 3],
            "run": {"rounds": 2},
            "tasks": [{"name": "bbc", "clients": 2, "train_rows": 40, "reported_rows": 20}],
            "variants": [
                {"name": "full", "method": "full", "lr": [1e-4]},
                {"name": "pafi", "method": "pafi", "lr": [1e-3, 1e-2]},
                {"name": "random", "method": "random", "lr": [1e-3], "budget": {"like": "pafi"}},
                {"name": "head", "method": "head", "lr": [1e-3]},
            ],
        }
    )


def result(variant: str, lr: float, seed: int, scores: list[float], size: int = 100, **settings: Any) -> Any:
    curve = [
        {"round": i, "validation": {"bbc": score}, "reported": {"bbc": score}, "message_bytes": 0,
         "payload_bytes": 1000 * size * i, "validation_loss": {"bbc": 1.0}} for i, score in enumerate(scores)
    ]  # fmt: skip
    sizes = {"up_per_client_round": 400.0, "down_per_client_round": 400.0, "mask_up_per_client": 0.0,
             "mask_down_per_client": 0.0, "payload": curve[-1]["payload_bytes"], "message": 1.0}  # fmt: skip
    return {
        "variant": variant, "lr": lr, "seed": seed, "status": "ok", "curve": curve, "bytes": sizes,
        "config": {"method": variant},
        "settings": {"rounds": 2, "train": {"lr": lr}, "method": variant, "seed": seed} | settings,
        "trained_values": size, "sent_values": size, "stored_bytes": 500, "head_values": {"bbc": 5},
        "client_seconds": 2.0, "peak_memory_bytes": None,
    }  # fmt: skip


FULL = [result("full", 1e-4, seed, [0.2, 0.8, 0.9 + seed / 100], 10_000) for seed in (1, 2, 3)]
PAFI = [
    result("pafi", 1e-3, 1, [0.2, 0.3, 0.4]),
    result("pafi", 1e-2, 1, [0.2, 0.90, 0.91]),
    result("pafi", 1e-2, 2, [0.2, 0.90, 0.92]),
    result("pafi", 1e-2, 3, [0.2, 0.87, 0.88]),
]


def test_a_row_is_the_winner_over_the_seeds() -> None:
    full, pafi, random, head = summarize(study(), [*FULL, *PAFI])
    assert pafi.winner is not None
    assert pafi.winner.lr == 1e-2
    assert pafi.final is not None
    assert pafi.final.mean == pytest.approx((0.91 + 0.92 + 0.88) / 3)
    assert pafi.final.deviation == pytest.approx(0.0208167, rel=1e-5)
    assert pafi.grid == {1e-3: 0.4, 1e-2: 0.91}
    assert [point.payload_bytes for point in pafi.curve] == [0, 100_000, 200_000]
    # Paired differences 0.00, 0.00, 0.05: mean 0.0167, and t(0.975, 2) = 4.3027 for its interval.
    assert full.against is not None
    lower, mean, upper = full.against
    assert mean == pytest.approx(0.05 / 3)
    assert upper - mean == pytest.approx(mean - lower) == pytest.approx(4.3027 * 0.05 / 3, rel=1e-4)
    assert random.final is None
    assert head.winner is None


def test_an_unfinished_search_is_shown_as_such() -> None:
    row = summarize(study(), [*FULL, PAFI[1]])[1]
    assert row.provisional
    assert row.winner is not None
    tables = {t.name: t for t in all_tables(study(), summarize(study(), [*FULL, PAFI[1]]))}
    assert tables["quality"].rows[1][1] == "0.01 (1 of 2 tried)"
    assert ("pafi", "0.01", "91.0", "best so far") in {tuple(cells) for cells in tables["search"].rows}
    assert tables["state"].rows[1][4] == "unfinished"


def test_bytes_to_a_goal_are_those_of_the_first_round_that_reaches_it() -> None:
    rows = summarize(study(), [*FULL, *PAFI])
    found = goals(study(), rows)
    assert found == pytest.approx({0.95: 0.95 * 0.92, 0.99: 0.99 * 0.92})
    first, second = (rows[1].reach(goal) for goal in found.values())
    assert first is not None
    assert (first.round, first.payload_bytes) == (1, 100_000)  # 0.89 of 0.874
    assert second is None
    assert goals(study(), summarize(study(), PAFI)) == {}


def test_results_of_settings_that_the_study_no_longer_states_are_left_out() -> None:
    other = [result("pafi", 1e-2, 1, [0.2, 0.9, 0.9], rounds=3), result("gone", 1e-2, 1, [0.2])]
    assert summarize(study(), other)[1].grid == {}
    matched = result("random", 1e-3, 1, [0.2, 0.5, 0.6], density=0.0123)  # the density is what was matched
    assert summarize(study(), [matched])[2].final is not None


def test_tables_show_what_has_run_and_what_has_not() -> None:
    matched = [result("random", 1e-3, seed, [0.2, 0.8, 0.85], density=0.0123) for seed in (1, 2)]
    tables = {t.name: t for t in all_tables(study(), summarize(study(), [*FULL, *PAFI, *matched]))}
    assert list(tables) == ["quality", "cost", "equal_values", "equal_bytes", "budgets", "search", "state"]
    assert {row[0] for row in tables["equal_values"].rows} == {"pafi", "random"}
    assert ("random", "85.0 ± 0.0 (2 seeds)") in {(row[0], row[6]) for row in tables["quality"].rows}
    states = {row[0]: (row[2], row[3], row[4]) for row in tables["state"].rows}
    assert states == {
        "full": ("1 of 1", "3 of 3", "complete"),
        "pafi": ("2 of 2", "3 of 3", "complete"),
        "random": ("1 of 1", "2 of 3", "unfinished"),
        "head": ("0 of 1", "0 of 3", "not started"),
    }


def test_byte_budgets_are_round_numbers_that_reach_from_the_first_round_to_the_last() -> None:
    rows = summarize(study(), [*FULL, *PAFI])
    steps = budget_steps(rows)
    assert steps[0] == 100_000
    assert steps[-2] < 20_000_000 <= steps[-1]
    budgets = next(t for t in all_tables(study(), rows) if t.name == "budgets")
    assert dict(zip(budgets.header, budgets.rows[1], strict=True))["100.0 kB"] == "89.0"
    assert dict(zip(budgets.header, budgets.rows[0], strict=True))["100.0 kB"] == "-"


def test_a_table_in_three_forms() -> None:
    table = Table("t", "A & B", ("name", "%"), [("a|b_c", "93.1 ± 0.2")])
    assert table.markdown() == "| name | % |\n| --- | --- |\n| a\\|b_c | 93.1 ± 0.2 |\n"
    assert table.csv() == "name,%\na|b_c,93.1 ± 0.2\n"
    assert "\\caption{A \\& B}" in table.latex()
    assert r"a|b\_c & 93.1 $\pm$ 0.2 \\" in table.latex()


def test_spreads_say_how_many_seeds_there_are() -> None:
    rows = summarize(study(), [*FULL, *PAFI[:2]])
    assert spread(rows[1].final) == "91.0 (1 seed)"
    assert spread(None) == "-"
    assert rows[1].final is not None
    assert not math.isnan(rows[1].final.mean)
