import dataclasses
from pathlib import Path

import pytest

from fedmask.errors import DataError
from fedmask.ledger import Ledger, LedgerRow, Totals

ROWS = [
    LedgerRow(0, 0, "down", "mask", 200, 900),
    LedgerRow(0, 1, "down", "mask", 200, 900),
    LedgerRow(1, 0, "down", "train", 40, 1040),
    LedgerRow(1, 1, "down", "train", 44, 1044),
    LedgerRow(1, 0, "up", "train", 40, 1060),
    LedgerRow(1, 1, "up", "train", 44, 1064, "rejected"),
    LedgerRow(2, 0, "down", "train", 40, 1040),
    LedgerRow(2, 0, "up", "train", 0, 0, "failed"),
]


def test_totals_by_any_key() -> None:
    ledger = Ledger(ROWS)
    assert ledger.total() == Totals(8, 608, 7048)
    assert ledger.totals("direction") == {("down",): Totals(5, 524, 4924), ("up",): Totals(3, 84, 2124)}
    assert ledger.totals("round", "client", kind="train", direction="up") == {
        (1, 0): Totals(1, 40, 1060),
        (1, 1): Totals(1, 44, 1064),
        (2, 0): Totals(1, 0, 0),
    }
    assert ledger.total(status="rejected") == Totals(1, 44, 1064)
    assert ledger.total(kind="evaluate") == Totals(0, 0, 0)
    for call in (lambda: ledger.totals("rounds"), lambda: ledger.total(way="up")):
        with pytest.raises(DataError, match="expected one of round, client"):
            call()


def test_the_mean_spreads_what_is_sent_once() -> None:
    ledger = Ledger(ROWS)
    assert ledger.mean_per_client_round("down") == pytest.approx((400 + 40 + 44 + 40) / 3)
    assert ledger.mean_per_client_round("up", "message_bytes") == pytest.approx(2124 / 3)
    assert Ledger().mean_per_client_round("up") == 0.0


def test_rows_are_frozen_and_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROWS[0].client = 3  # type: ignore[misc]
    for change in ({"direction": "left"}, {"kind": "query"}, {"status": "lost"}, {"payload_bytes": -1},
                   {"round": 1.0}, {"client": True}, {"client": -2}):  # fmt: skip
        with pytest.raises(DataError, match=next(iter(change))):
            dataclasses.replace(ROWS[0], **change)
    assert dataclasses.replace(ROWS[0], client=-1, round=-1).client == -1


def test_jsonl_grows_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(ROWS[:3])
    ledger.write_jsonl(path)
    first = path.read_bytes()
    assert first.count(b"\n") == 3
    assert first.splitlines()[0] == (
        b'{"round":0,"client":0,"direction":"down","kind":"mask","payload_bytes":200,'
        b'"message_bytes":900,"status":"ok"}'
    )
    for row in ROWS[3:]:
        ledger.add(row)
    ledger.write_jsonl(path)
    ledger.write_jsonl(path)  # nothing new
    assert path.read_bytes().startswith(first)
    again = Ledger.read_jsonl(path)
    assert list(again) == ROWS
    again.add(ROWS[0])
    again.write_jsonl(path)
    assert list(Ledger.read_jsonl(path)) == [*ROWS, ROWS[0]]


def test_an_interrupted_write_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(ROWS[:2]).write_jsonl(path)
    with open(path, "a") as file:
        file.write('{"round":1,"cli')
    ledger = Ledger.read_jsonl(path)
    assert list(ledger) == ROWS[:2]
    ledger.add(ROWS[2])
    ledger.write_jsonl(path)
    assert list(Ledger.read_jsonl(path)) == ROWS[:3]


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"round": 1}', '{"way": "up"}', ""])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(ROWS[:1]).write_jsonl(path)
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"ledger\.jsonl:2: expected a ledger row"):
        Ledger.read_jsonl(path)


def test_a_missing_ledger_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a ledger, found none"):
        Ledger.read_jsonl(tmp_path / "none.jsonl")
