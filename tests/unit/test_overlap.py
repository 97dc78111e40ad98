"""Overlap of masks, on sets that can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from experiments.report import write_report
from fedmask.masks import Mask, Rule
from fedmask.masks.overlap import overlap_facts, overlap_figures
from fedmask.rng import rng_for
from fedmask.space import parameter_space
from tests.support import make_model, save_two_tasks


def masks(*chosen: list[int]) -> list[Mask]:
    space = parameter_space(make_model(), "linear")
    return [Mask(np.array(one, np.int64), space, Rule("magnitude", 0.01)) for one in chosen]


def test_counts_by_hand() -> None:
    shared, *own = masks([0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9])
    facts = overlap_facts(dict(enumerate(own)), ["a", "a", "b"], shared, seed=1)
    assert facts["jaccard"][0] == [1.0, 2 / 6, 0.0]
    assert facts["mean_jaccard"] == pytest.approx((2 / 6) / 3)
    assert facts["mean_jaccard_same_task"] == pytest.approx(2 / 6)
    assert facts["mean_jaccard_other_task"] == 0.0
    assert facts["mean_jaccard_with_shared"] == pytest.approx((1 + 2 / 6) / 3)
    assert (facts["chosen_by_all"], facts["chosen_by_one"]) == (0, 8)
    growth = facts["growth"]
    assert [row["clients"] for row in growth] == [1, 2, 3]
    assert (growth[0]["union"], growth[-1]["union"]) == (4.0, 10.0)
    assert (growth[1]["least"], growth[1]["most"]) == (6, 8)  # the first two share two entries
    assert growth[-1]["down_bytes"] == 40
    assert growth[-1]["shared_down_bytes"] == 16
    assert growth[1]["independent"] <= 8
    layers = facts["layers"]
    assert sum(row["client_mean"] for row in layers) == 4
    assert sum(row["union"] for row in layers) == 10
    assert sum(row["shared"] for row in layers) == 4


def test_random_sets_against_sets() -> None:
    rng = np.random.default_rng(2)
    chosen = [sorted(rng.choice(40, 9, replace=False).tolist()) for _ in range(6)]
    shared, *own = masks(*chosen)
    facts = overlap_facts(dict(enumerate(own)), ["a"] * 5, shared, seed=3)
    sets = [set(one) for one in chosen[1:]]
    assert facts["jaccard"] == [[len(a & b) / len(a | b) for b in sets] for a in sets]
    few = overlap_figures([one.indices for one in own])
    assert few == {"clients": 5, "union": len(set().union(*sets)), "mean_jaccard": facts["mean_jaccard"]}
    rng = rng_for(3, -1, -1, "overlap-orders")
    orders = [rng.permutation(5) for _ in range(facts["orders"])]
    for row in facts["growth"]:
        sizes = [len(set().union(*(sets[i] for i in order[: row["clients"]]))) for order in orders]
        assert (row["union"], row["least"], row["most"]) == (np.mean(sizes), min(sizes), max(sizes))


def test_the_command_writes_facts_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_two_tasks(tmp_path)
    arguments = [
        "overlap",
        "--density",
        "0.05",
        "--out",
        str(tmp_path / "out"),
        "--set",
        f"model={folder}/model",
    ]
    for name in ("mood", "topic"):
        spec = f"name={name},source={folder}/{name}.tsv,text=text,label=label,clients=2"
        arguments += ["--task", spec]
    arguments += ["--set", "train.max_tokens=16", "--set", "partition.held_out=0.0"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    facts = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert facts["tasks"] == ["mood", "mood", "topic", "topic"]
    assert facts["growth"][0]["union"] == facts["k"]
    assert 0 < facts["mean_jaccard"] < 1
    for name in ("union_growth", "jaccard", "layers"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    assert "mean Jaccard index" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--rule", "gradiant"])
    assert ended.value.code == 2
    assert "the nearest is 'gradient'" in capsys.readouterr().err


def test_the_report_shows_what_the_run_s_summary_says(run_folder: Path) -> None:
    """The union's growth as a table and figures; a run without it, or an older one, has neither."""
    shared, *own = masks([0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9])
    facts = overlap_facts(dict(enumerate(own)), ["tweets", "tweets", "bbc"], shared, seed=1)
    assert "as clients are added" not in write_report(run_folder).read_text()
    path = run_folder / "summary.json"
    overlap = {"rule": "fish", "batches": 0, "union": 10} | facts
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overlap": overlap}))
    text = write_report(run_folder).read_text()
    assert "| 3 | 10 | 2.50 |" in text and "as clients are added" in text
    for name in ("union_growth", "jaccard", "layers"):
        assert (run_folder / "figures" / f"{name}.png").stat().st_size > 2000
        assert f"(figures/{name}.png)" in text
