"""Masks that clients are told: their bytes, counted and in their authors' form, against the ledger's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.compare.campaign import Campaign, all_results
from experiments.compare.jobs import run_all
from experiments.compare.released import RELEASED, packed, released_payload
from experiments.compare.report import write_comparison
from experiments.compare.study import Study, study_from
from experiments.results import size
from fedmask.methods import TASK_SPECIFIC
from tests.support import save_two_tasks

PLACEMENTS = ("client", "agreed", "server")
CASES = [(method, placement) for method in sorted(TASK_SPECIFIC) for placement in PLACEMENTS]
CLIENTS, ROUNDS = 2, 2


def study_in(folder: Path) -> Study:
    public = {
        "name": "topic",
        "source": str(folder / "topic.tsv"),
        "text": "text",
        "label": "label",
        "rows": 20,
    }
    return study_from(
        {
            "name": "masks",
            "narrow": "a test",
            "seeds": [1],
            "reference": "fish-client",
            "run": {
                "model": str(folder / "model"),
                "rounds": ROUNDS,
                "density": 0.05,
                "overlap_batches": 0,
                "partition": {"held_out": 0.0},
                "scores": {"samples": 8, "batches": 1, "steps": 2},
                "train": {"max_tokens": 16, "batch_size": 8, "steps": 1},
            },
            "tasks": [
                {"name": "mood", "train": "mood.tsv", "reported": "mood.tsv", "clients": CLIENTS,
                 "train_rows": 40, "validation_rows": 8, "reported_rows": 8}
            ],
            "variants": [
                {"name": f"{method}-{placement}", "method": method, "lr": [1e-2],
                 "settings": {"placement": placement} | ({"public": public} if placement == "server" else {})}
                for method, placement in CASES
            ],
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder, the results, and the rows of the cost table, by variant."""
    folder = save_two_tasks(tmp_path_factory.mktemp("masks"))
    study, out = study_in(folder), folder / "out"
    for result in run_all(Campaign(study, out, folder).next_task, 1):
        assert result["status"] == "ok", result
    cost = next(table for table in write_comparison(study, out, "x") if table.name == "cost")
    rows = {row[0]: dict(zip(cost.header, row, strict=True)) for row in cost.rows}
    return out, {result["variant"]: result for result in all_results(out)}, rows


@pytest.mark.parametrize(("method", "placement"), CASES)
def test_what_is_not_values_is_masks(ran: Any, method: str, placement: str) -> None:
    """All values are four bytes, so the indices are what is left of the ledger's payload."""
    _, results, rows = ran
    result, row = results[f"{method}-{placement}"], rows[f"{method}-{placement}"]
    k, head, payload = result["sent_values"], result["head_values"]["mood"], result["bytes"]["payload"]
    up = 4 * CLIENTS * ROUNDS * (k + head)
    down = up
    indices, sets, scores = {
        "client": (0, 0, 0),
        "agreed": (2 * CLIENTS * k, 2 * CLIENTS, CLIENTS * (2 * k + 4)),
        "server": (CLIENTS * k, CLIENTS, 0),
    }[placement]
    if placement == "client":  # nothing goes down in round 1, the union and the head in round 2
        union = round(result["overlap"]["growth"][-1]["union"])
        assert union > k
        down = 4 * CLIENTS * (union + head)
        indices, sets = CLIENTS * (k + union - k), 2 * CLIENTS
        assert result["bytes"]["mask_up_per_client"] == 0
        told = result["positions"]
        total = {way: result["bytes"][f"{way}_per_client_round"] * CLIENTS * ROUNDS for way in ("up", "down")}
        assert (told["bytes_up"], told["bytes_down"]) == (total["up"] - up, total["down"] - down)
        assert row["masks up / client"] == size(told["bytes_up"] / CLIENTS)
        assert row["masks down / client"] == size(told["bytes_down"] / CLIENTS)
    found = packed(result)
    assert found is not None
    assert (found.payload, found.indices, found.sets) == (payload - up - down - scores, indices, sets)
    values = up + down + scores
    theirs = {
        "fish": values + sets * 4 * (result["backbone_size"] + head),
        "lt-sft": values + 4 * indices,
        "gradient": values + 16 * indices,
        "diff-pruning": None,
    }[method]
    assert released_payload(method, payload, found, result["backbone_size"] + head) == theirs
    assert row["whole run, authors' format"] == ("none released" if theirs is None else size(theirs))


def test_every_task_specific_method_has_a_form_or_none() -> None:
    assert RELEASED.keys() == TASK_SPECIFIC


def test_results_that_did_not_count_positions_say_so_and_have_no_figure(ran: Any, tmp_path: Path) -> None:
    out, results, _ = ran
    figure = out / "figures" / "union_growth.png"
    assert figure.stat().st_size > 5000
    for name in ("fish-client", "fish-agreed"):
        old = {key: value for key, value in results[name].items()
               if key not in ("positions", "overlap", "backbone_size")}  # fmt: skip
        path = tmp_path / "cells" / name / "lr-0.01.seed-1.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(old))
    tables = write_comparison(study_in(out.parent), tmp_path, "x")
    cost = next(table for table in tables if table.name == "cost")
    rows = {row[0]: dict(zip(cost.header, row, strict=True)) for row in cost.rows}
    assert rows["fish-client"]["masks up / client"] == "in the updates"
    assert rows["fish-client"]["whole run, authors' format"] == "-"
    assert rows["fish-agreed"]["masks up / client"] != "in the updates"
    assert not (tmp_path / "figures" / "union_growth.png").exists()
