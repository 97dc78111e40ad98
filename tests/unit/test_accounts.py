"""``fedmask ledger`` on the made-up run of tests/conftest.py, against figures added up by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.accounts import accounts
from experiments.commands import show_ledger
from experiments.runs import read_run
from fedmask.costs import RunFacts, compare

# Payload of masks and training: 200 B to each of 3 clients, then 2 rounds of 504 + 504 + 516 B each way.
UP, DOWN = 2 * 1524, 600 + 2 * 1524


@pytest.fixture
def with_costs(run_folder: Path) -> Path:
    facts = RunFacts(100, 20000, 30000, (6, 6, 9), ((0, 1, 2),) * 2, beside=20, once_down_bytes=200)
    path = run_folder / "summary.json"
    costs = {way: cost.to_dict() for way, cost in compare(facts).items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"costs": costs}))
    return run_folder


def test_formula_and_measured_stand_side_by_side(with_costs: Path) -> None:
    found = accounts(read_run(with_costs))
    assert [(row["formula"], row["payload"]) for row in found["formula"]] == [(UP, UP), (DOWN, DOWN)]
    assert found["formula"][0]["message"] == UP + 6 * 1000
    # One reply was refused: the mean is over the five that count.
    up = (3 * 504 + 2 * 516) / 5
    assert found["bits_per_backbone_parameter"]["up"] == pytest.approx(8 * up / 30000)


def test_totals_hold_every_message(with_costs: Path) -> None:
    found = accounts(read_run(with_costs))
    assert set(found["totals"]) == {"direction_kind_status", "round", "client"}
    for rows in found["totals"].values():
        for key in ("messages", "payload_bytes", "message_bytes"):
            assert sum(row[key] for row in rows) == found["total"][key]
    (refused,) = [row for row in found["totals"]["direction_kind_status"] if row["status"] == "rejected"]
    assert (refused["direction"], refused["messages"], refused["payload_bytes"]) == ("up", 1, 504)
    assert {"round": 0, "direction": "down", "messages": 3, "payload_bytes": 600,
            "message_bytes": 2100} in found["totals"]["round"]  # fmt: skip


def test_ways_say_what_indices_cost_over_the_whole_run(with_costs: Path) -> None:
    ways = {row["way"]: row for row in accounts(read_run(with_costs))["ways"]}
    agreed = ways["agreed-mask"]
    index = 2 * 3 * 113  # log2 C(20000, 100) = 904 bits
    assert agreed["total"] == 2 * UP + index
    assert agreed["index_share"] == pytest.approx(index / (2 * UP + index))
    assert agreed["index_formats"]["two-int32"]["total_bytes"] == 2 * UP + 2 * 3 * 100 * 8
    assert ways["full"]["index_formats"] == {} and ways["full"]["index_share"] == 0.0
    assert ways["this-run"]["total"] == UP + DOWN


def test_what_is_printed(with_costs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_ledger(with_costs, None, as_json=False)
    out = capsys.readouterr().out
    for words in ("rejected", f"{UP:,}", f"{DOWN:,}", "coo-int64", "unknown"):
        assert words in out
    (with_costs / "wire.json").write_text(json.dumps({"run_id": "17", "inbound": 12_543, "outbound": 19_894}))
    show_ledger(with_costs, None, as_json=False)
    assert "12,543 bytes up, 19,894 bytes down" in capsys.readouterr().out
    show_ledger(with_costs, None, as_json=True)
    assert json.loads(capsys.readouterr().out)["wire_bytes"] == {"up": 12_543, "down": 19_894}


def test_a_run_from_before_the_formula_is_still_read(run_folder: Path) -> None:
    found = accounts(read_run(run_folder))
    assert [row["formula"] for row in found["formula"]] == [None, None]
    show_ledger(run_folder, None, as_json=False)


def test_a_run_that_failed_has_a_ledger_too(with_costs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (with_costs / "summary.json").unlink()
    (with_costs / "rounds.jsonl").unlink()
    show_ledger(with_costs, None, as_json=False)
    out = capsys.readouterr().out
    assert "not over or failed" in out and f"{UP:,}" in out
    show_ledger(with_costs, "status", as_json=True)
    assert json.loads(capsys.readouterr().out)["total"]["messages"] == 21


def test_many_clients_do_not_flood_the_screen(with_costs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_costs / "ledger.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    more = [json.dumps(row | {"client": client}) + "\n" for client in range(3, 500)]
    path.write_text(path.read_text() + "".join(more))
    show_ledger(with_costs, None, as_json=False)
    out = capsys.readouterr().out
    assert "483 more with --by client,direction" in out and len(out.splitlines()) < 80
