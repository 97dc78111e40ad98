"""The command line's options as settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.options import (
    DEMO,
    KEYS,
    STUDIES,
    build_config,
    deal_clients,
    parse_task,
    with_absolute_paths,
)
from fedmask.config import load_config
from fedmask.errors import ConfigError


def test_nothing_given_is_the_demo_under_another_name() -> None:
    demo = load_config(DEMO)
    assert demo.name == "demo"
    assert build_config(None, {}) == demo.model_copy(update={"name": "run"})


def test_an_option_wins_over_the_file_and_none_means_not_given(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("density = 0.1\nrounds = 3\n[train]\nlr = 0.5\n[[tasks]]\nname = 'bbc'\nclients = 2\n")
    config = build_config(path, {"density": 0.2, "lr": None, "alpha": 9.0})
    assert (config.density, config.rounds, config.train.lr, config.partition.alpha) == (0.2, 3, 0.5, 9.0)


def test_epochs_are_not_cut_short_by_the_file_s_steps() -> None:
    assert build_config(None, {}).train.steps is not None
    assert build_config(None, {"epochs": 2.0}).train.steps is None
    assert build_config(None, {"epochs": 2.0, "steps": 3}).train.steps == 3
    assert build_config(None, {"epochs": 2.0}, sets=["train.steps=4"]).train.steps == 4


def test_none_clears_a_setting() -> None:
    config = build_config(None, {}, sets=["train.steps=none", "train.clip_norm=none"])
    assert (config.train.steps, config.train.clip_norm) == (None, None)


def test_adapters_have_a_rate_of_their_own() -> None:
    config = build_config(None, {"lr": 0.5, "adapter_lr": 0.25})
    assert (config.train.lr, config.train.adapter_lr, config.train.head_lr) == (0.5, 0.25, None)


def test_local_names_become_absolute_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    own = "name=own,source=rows.csv,dev=dev.csv,text=t,label=l,clients=1"
    hub = "name=hub,source=owner/rows,dev=validation,text=t,label=l,clients=1"
    config = with_absolute_paths(build_config(None, {"model": "model"}, tasks=["bbc:1", own, hub]))
    assert config.model == str(tmp_path / "model")
    assert [(task.source, task.dev, task.test) for task in config.tasks] == [
        ("", "", ""),
        (str(tmp_path / "rows.csv"), str(tmp_path / "dev.csv"), ""),
        ("owner/rows", "validation", ""),
    ]
    assert with_absolute_paths(build_config(None, {"model": "owner/name"})).model == "owner/name"


def test_every_option_reaches_a_setting() -> None:
    config = build_config(None, {}).model_dump()
    for dotted in KEYS.values():
        value = config
        for key in dotted.split("."):
            value = value[key]


def test_tasks_replace_the_files_tasks() -> None:
    config = build_config(None, {}, tasks=["bbc:3"])
    assert [(task.name, task.clients) for task in config.tasks] == [("bbc", 3)]


def test_strategy_options_and_any_other_setting() -> None:
    config = build_config(
        None,
        {"strategy": "fedtrimmedavg"},
        options=["beta=0.1"],
        sets=["train.optimizer=sgd", "partition.held_out=0", "per_tensor=true", "train.clip_norm=2"],
    )
    assert config.server.options == {"beta": 0.1}
    assert (config.train.optimizer, config.partition.held_out, config.per_tensor) == ("sgd", 0, True)


def test_a_task_in_full() -> None:
    spec = "name=reviews,source=rows.csv,text=title+body,label=stars,metric=f1,clients=4"
    assert parse_task(spec) == {
        "name": "reviews",
        "source": "rows.csv",
        "text": ["title", "body"],
        "label": "stars",
        "metric": "f1",
        "clients": 4,
    }


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("tweets", ["NAME:CLIENTS"]),
        (":4", ["NAME:CLIENTS"]),
        ("tweets:many", ["number of clients", "'many'"]),
        ("name=a,clients=x", ["number of clients", "'x'"]),
        ("name=a,clinets=3", ["'clinets'", "nearest is 'clients'"]),
        ("name=a,name=b", ["'name'", "twice"]),
        ("name=a,clients", ["key=value", "'clients'"]),
    ],
)
def test_a_bad_task_is_one_line(spec: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task(spec)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"options": ["beta"]}, "--option 'beta': expected key=value"),
        ({"sets": ["train.lrr=1"]}, "nearest is 'lr'"),
        ({"sets": ["seed.x=1"]}, "'seed'"),
        ({"sets": ["=1"]}, "expected key=value"),
    ],
)
def test_bad_pairs(arguments: dict[str, list[str]], part: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        build_config(None, {}, **arguments)
    assert part in str(caught.value)


def test_the_settings_of_an_earlier_run(run_folder: Path) -> None:
    config = build_config(run_folder / "config.json", {"name": "again", "rounds": 5})
    assert (config.name, config.rounds) == ("again", 5)
    assert [task.metric for task in config.tasks] == ["accuracy", "f1"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 1}'])
def test_a_json_file_that_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: expected"):
        build_config(path, {})


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_study_is_a_valid_config(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    ("before", "clients", "after"), [([6, 2], 4, [3, 1]), ([6, 2], 16, [12, 4]), ([6, 2], 2, [1, 1]),
                                     ([6, 2], 8, [6, 2]), ([1, 1, 1], 5, [2, 2, 1])]
)  # fmt: skip
def test_clients_are_dealt_to_the_tasks_in_their_proportion(
    before: list[int], clients: int, after: list[int]
) -> None:
    tasks = [{"name": f"t{number}", "clients": count} for number, count in enumerate(before)]
    deal_clients(tasks, clients)
    assert [task["clients"] for task in tasks] == after
    assert build_config(None, {}, clients=4).clients == 4
    with pytest.raises(ConfigError, match=r"--clients: expected 2 or more"):
        build_config(None, {}, clients=1)
