"""What a study may say, and which of its mistakes are refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.compare.plan import settings_of
from experiments.compare.study import load_study, study_from
from experiments.options import STUDIES
from fedmask.errors import ConfigError

GRID = [1e-3, 1e-2, 3e-2]


def values(**changes: Any) -> dict[str, Any]:
    """A study of two variants on one bundled task."""
    found: dict[str, Any] = {
        "name": "small",
        "seeds": [1, 2],
        "run": {"rounds": 1, "train": {"steps": 2}},
        "tasks": [{"name": "bbc", "clients": 2, "train_rows": 40, "reported_rows": 20}],
        "variants": [
            {"name": "pafi", "method": "pafi", "lr": GRID},
            {"name": "full", "method": "full", "lr": GRID},
        ],
    }
    return found | changes


def variants(**changes: Any) -> dict[str, Any]:
    return values(variants=[{"name": "one", "method": "pafi", "lr": GRID} | changes])


@pytest.mark.parametrize(
    ("study", "said"),
    [
        (values(sedes=[1]), "unknown key 'sedes'; the nearest is 'seeds'"),
        (variants(method="paffi"), "variants[0].method: unknown method 'paffi'; the nearest is 'pafi'"),
        (variants(grid=[1]), "variants[0]: unknown key 'grid'"),
        (variants(lr=[1e-3, 1e-2]), "expected a grid at least 30 times wide, found 10 times"),
        (variants(lr=[1e-3, 1e-3]), "expected different learning rates"),
        (variants(lr=[-1.0, 1e-3]), "expected positive learning rates"),
        (variants(settings={"densty": 0.1}), "variant 'one': unknown key 'densty'; the nearest is 'density'"),
        (variants(settings={"density": 1.5}), "variant 'one': density: expected a number greater than 0"),
        (variants(settings={"train.lr": 0.1}), "settings: train.lr is searched"),
        (variants(method="hiwi"), "adapters have a learning rate of their own"),
        (variants(budget={"like": "pafy"}), "budget.like: unknown variant 'pafy'"),
        (variants(budget={"values": 5, "bytes": 5}), "expected one of values, bytes and like, found 2"),
        (values(run={"round": 1}), "run: unknown key 'round'; the nearest is 'rounds'"),
        (values(run={"seed": 1}), "the study sets this for each run"),
        (values(tasks=[{"name": "bbc", "clients": 2, "train_rows": 40}]), "reported_rows: a bundled task"),
        (values(tasks=[{"name": "x", "clients": 1, "train_rows": 4, "train": "x.tsv"}]), "two files"),
        (values(variants=values()["variants"] * 2), "variants: each needs a name of its own"),
    ],
)
def test_mistakes_are_named_with_the_nearest_valid_word(study: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        study_from(study)
    assert said.split(";")[0] in str(error.value)
    assert said.split("; ")[-1] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_narrow_grid_is_allowed_only_with_its_reason() -> None:
    narrow = values(narrow="a test") | {"variants": [{"name": "one", "method": "pafi", "lr": [1e-3]}]}
    assert study_from(narrow).variants[0].lr == (1e-3,)


def test_a_reason_for_one_variant_s_narrow_grid_is_no_reason_for_the_others() -> None:
    narrow = {"name": "one", "method": "pafi", "lr": [1e-3], "narrow": "it is dear"}
    assert study_from(values(variants=[narrow])).variants[0].narrow
    other = {"name": "other", "method": "random", "lr": [1e-3]}
    with pytest.raises(ConfigError, match=r"variant 'other': lr: expected a grid at least 30 times wide"):
        study_from(values(variants=[narrow, other]))


def test_a_variant_s_settings_are_the_run_s_with_its_own_changes() -> None:
    study = study_from(
        values(
            variants=[
                {"name": "a", "method": "pafi+hiwi", "lr": GRID, "follow": {"train.adapter_lr": 0.2},
                 "settings": {"density": 0.01, "server.strategy": "mean"}}
            ]
        )
    )  # fmt: skip
    found = settings_of(study, study.variants[0], 1e-2, 7, {"density": 0.02})
    assert found == {
        "rounds": 1,
        "train": {"steps": 2, "lr": 1e-2, "adapter_lr": 0.2 * 1e-2},
        "density": 0.02,
        "server": {"strategy": "mean"},
        "method": "pafi+hiwi",
        "seed": 7,
    }
    assert study.run == {"rounds": 1, "train": {"steps": 2}}  # not changed by it


@pytest.mark.parametrize("path", sorted((STUDIES / "compare").glob("*.toml")), ids=lambda path: path.stem)
def test_every_study_that_comes_with_the_project_is_sound(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    names = [variant.name for variant in study.variants]
    assert study.full in names
    assert study.reference in names
    for task in study.tasks:
        assert not task.train or task.hub or task.fetch, f"{task.name}: nobody would know where to get it"


def test_the_file_is_named_in_the_message(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('name = "x"\n')
    with pytest.raises(ConfigError, match=r"study .*s\.toml: "):
        load_study(tmp_path / "s.toml")
