"""Equal budgets: within 1 %, or refused with the nearest that is possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from experiments.compare.budget import TOLERANCE, match_density, match_whole, resolve
from experiments.compare.campaign import Campaign
from experiments.compare.data import prepare
from experiments.compare.jobs import run_all
from experiments.compare.plan import run_config, settings_of
from experiments.compare.reuse import workspace_for
from experiments.compare.study import study_from
from fedmask.errors import ConfigError
from fedmask.masks import mask_size
from tests.support import save_two_tasks


@given(some.integers(1, 20_000_000), some.integers(0, 50_000), some.integers(1, 20_000_000))
def test_a_density_gives_exactly_the_wanted_values(eligible: int, beside: int, k: int) -> None:
    wanted = min(k, eligible) + beside
    match = match_density(wanted, eligible, beside)
    assert 0 < match.value <= 1
    assert mask_size(float(match.value), eligible) + beside == wanted == match.found


def test_impossible_densities_name_the_nearest_possible_budget() -> None:
    with pytest.raises(ConfigError, match=r"density of 1\.2, above 1; the nearest .* is 1,050 values"):
        match_density(1250, 1000, 50)
    with pytest.raises(ConfigError, match=r"none for the mask .* the nearest possible budget is 51 values"):
        match_density(50, 1000, 50)


@given(some.integers(1, 10_000), some.integers(0, 10_000), some.integers(1, 5_000_000))
def test_a_rank_is_within_one_per_cent_or_refused(per_unit: int, beside: int, wanted: int) -> None:
    nearest = max(1, round((wanted - beside) / per_unit)) * per_unit + beside
    if abs(nearest - wanted) <= TOLERANCE * wanted:
        match = match_whole(wanted, per_unit, beside)
        assert match.found == nearest
        assert match.error <= TOLERANCE
    else:
        with pytest.raises(ConfigError, match=f"the nearest possible budget is {nearest:,} values"):
            match_whole(wanted, per_unit, beside)


def test_the_ranks_of_minilm_by_hand() -> None:
    """12 matrices of 384 x 384: 9,216 values a rank. A mask of 0.5 % is rank 5.76, so the mask must move."""
    assert match_whole(55_296, 9_216).value == 6
    with pytest.raises(ConfigError, match=r"no whole rank \(5\.76\).* 55,296 values \(rank 6\), 4\.2 % away"):
        match_whole(53_084, 9_216)
    with pytest.raises(ConfigError, match=r"rank 0\.109, below 1; .* 9,216 values \(rank 1\)"):
        match_whole(1_000, 9_216)
    with pytest.raises(ConfigError, match=r"above 384; the nearest possible budget is 3,538,944 values"):
        match_whole(9_216 * 400, 9_216, most=384)
    assert match_density(55_296, 10_616_832).value == pytest.approx(0.0052083, abs=1e-7)


def study_of(folder: Path, variants: list[dict[str, Any]]) -> Any:
    grid = {"lr": [1e-3], "follow": {}}
    return study_from(
        {
            "name": "sizes",
            "narrow": "a test",
            "seeds": [1],
            "run": {"model": str(folder / "model"), "train": {"max_tokens": 16}},
            "tasks": [
                {"name": "mood", "train": "mood.tsv", "reported": "mood.tsv", "clients": 2, "train_rows": 40,
                 "validation_rows": 20, "reported_rows": 20}
            ],
            "variants": [grid | variant for variant in variants],
        }
    )  # fmt: skip


def resolved(folder: Path, variants: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """What the budgets came to, and the shared values that each variant then really sends."""
    study = study_of(folder, variants)
    files = {name: one.files for name, one in prepare(study, folder, folder / "data").items()}

    def config_of(variant: Any, sizes: Any) -> Any:
        settings = settings_of(study, variant, variant.lr[0], 1, sizes)
        return run_config(study, settings, files, name="x", runs_dir=folder)

    sizes = resolve(study, config_of)
    sent = {}
    for variant in study.variants:
        workspace = workspace_for(config_of(variant, sizes[variant.name]))
        sent[variant.name] = workspace.layout("mood").shared_size
    return sizes, sent


def test_variants_are_matched_on_the_model_itself(tmp_path: Path) -> None:
    save_two_tasks(tmp_path)
    sizes, sent = resolved(
        tmp_path,
        [
            {"name": "like", "method": "pafi", "budget": {"like": "both"}},
            {"name": "both", "method": "pafi+hiwi", "follow": {"train.adapter_lr": 0.2},
             "settings": {"density": 0.05}},
            {"name": "values", "method": "random", "budget": {"values": 700}},
        ],
    )  # fmt: skip
    assert sent["like"] == sent["both"]
    assert sent["values"] == 700
    assert sizes["both"] == {}


def test_equal_bytes_are_those_of_the_whole_run_as_the_ledger_counts_them(tmp_path: Path) -> None:
    """Narrow values, a mask that is agreed on, factors without a mask: all runs send the same within 1 %."""
    save_two_tasks(tmp_path)
    wanted = 20_000
    study = study_of(
        tmp_path,
        [
            {"name": "pafi", "method": "pafi", "budget": {"bytes": wanted}},
            {"name": "int4", "method": "pafi", "budget": {"bytes": wanted},
             "settings": {"up": "int4+ef", "down": "int8"}},
            {"name": "agreed", "method": "fish", "budget": {"bytes": wanted}},
            {"name": "lora", "method": "lora", "budget": {"bytes": wanted, "by": "lora.rank"},
             "settings": {"up": "fp16", "down": "fp16"}},
        ],
    )  # fmt: skip
    run = study.run | {"rounds": 3, "overlap_batches": 0, "scores": {"samples": 4}}
    study = study.model_copy(update={"run": run | {"train": {"max_tokens": 16, "steps": 1, "batch_size": 4}}})
    results = list(run_all(Campaign(study, tmp_path / "out", tmp_path).next_task, 1))
    assert len(results) == 4
    for result in results:
        assert abs(result["bytes"]["payload"] - wanted) <= TOLERANCE * wanted, result["variant"]


def test_impossible_budgets_of_a_study_are_refused_by_variant(tmp_path: Path) -> None:
    save_two_tasks(tmp_path)
    with pytest.raises(ConfigError, match="variant 'a': budget: 99,999,999 values need a density of"):
        resolved(tmp_path, [{"name": "a", "method": "pafi", "budget": {"values": 99_999_999}}])
    for variant, said in (
        ({"method": "full", "budget": {"values": 500}}, r"budget\.by: method 'full' has no density"),
        ({"method": "lora", "budget": {"values": 256 * 40, "by": "lora.rank"}},
         r"need lora\.rank 40, above 32; the nearest possible budget is 8,192 values"),
        ({"method": "lora", "settings": {"lora.rank": 33}}, r"lora\.rank: expected at most 32, .* found 33"),
        ({"method": "s2ft", "settings": {"density": 0.9}}, r"density 0\.9: .* more than the last"),
        ({"method": "pafi", "budget": {"bytes": 99_999_999}},
         r"no density comes to 99,999,999 bytes in the whole run; the nearest possible budget is "),
        ({"method": "lora", "budget": {"bytes": 100, "by": "lora.rank"}}, r"no lora\.rank comes to 100 b"),
        ({"method": "fish", "budget": {"bytes": 9000}, "settings": {"placement": "client"}},
         r"budget\.bytes: what comes down where each client has a mask"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"variant 'a': .*{said}"):
            resolved(tmp_path, [{"name": "a"} | variant])
