"""Settings: every mistake is one line that names the key, and good settings survive a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask.config import PartitionConfig, RunConfig, TaskConfig, from_dict, from_json, load_config
from fedmask.errors import ConfigError
from fedmask.methods import METHODS

TASKS = [{"name": "tweets", "clients": 6}, {"name": "bbc", "clients": 2}]

WRONG = {
    "density above one": (
        {"density": 2.0},
        ["density", "greater than 0 and at most 1", "2.0", "give such a number (the default is 0.005)"],
    ),
    "density of zero": ({"density": 0}, ["density", "greater than 0"]),
    "density not a number": ({"density": float("nan")}, ["density", "nan"]),
    "text for a number": ({"rounds": "8"}, ["rounds", "integer", "'8'"]),
    "true for a number": ({"rounds": True}, ["rounds", "True"]),
    "no rounds": ({"rounds": 0}, ["rounds", "at least 1", "found 0; give such"]),
    "unknown key": ({"methd": "pafi"}, ["methd", "nearest is 'method'"]),
    "unknown method": ({"method": "paffi"}, ["paffi", "nearest is 'pafi'"]),
    "unknown nested key": ({"train": {"lrr": 1.0}}, ["train", "lrr", "nearest is 'lr'"]),
    "negative rate": ({"train": {"lr": -1.0}}, ["train.lr", "greater than 0", "-1.0"]),
    "unknown partition": ({"partition": {"kind": "dirichlt"}}, ["partition.kind", "nearest is 'dirichlet'"]),
    "natural without column": ({"partition": {"kind": "natural"}}, ["partition", "column"]),
    "no tasks": ({"tasks": []}, ["tasks", "at least 1"]),
    "tasks missing": ({"tasks": None}, ["tasks"]),
    "no clients": ({"tasks": [{"name": "a", "clients": 0}]}, ["tasks[0].clients", "at least 1", "0; give"]),
    "clients missing": ({"tasks": [TASKS[0], {"name": "a"}]}, ["tasks[1].clients", "missing"]),
    "a task twice": ({"tasks": [TASKS[0], TASKS[0]]}, ["tasks", "'tweets'", "twice"]),
    "unknown metric": (
        {"tasks": [{"name": "a", "clients": 1, "metric": "acuracy"}]},
        ["tasks[0].metric", "nearest is 'accuracy'"],
    ),
    "own rows without columns": (
        {"tasks": [{"name": "a", "clients": 1, "source": "rows.csv"}]},
        ["tasks[0]", "'a'", "text and label"],
    ),
    "a name that leaves the folder": ({"name": "../x"}, ["name", "'../x'"]),
    "more sampled than there are": ({"server": {"clients_per_round": 9}}, ["clients_per_round", "8", "9"]),
    "more replies than sampled": (
        {"server": {"clients_per_round": 2, "min_replies": 3}},
        ["min_replies", "2", "3"],
    ),
    "a strategy option that is no number": (
        {"server": {"options": {"eta": "x"}}},
        ["server.options.eta: expected a number, found 'x'; give one, as in eta=0.1"],
    ),
    "none where it is not allowed": ({"rounds": "none"}, ["rounds", "'none'"]),
    "weight adapters alone": ({"method": "hiwi", "adapter": {"target": "weight"}}, ["hiwi", "pafi+hiwi"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_that_names_it(case: str) -> None:
    values, parts = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        from_dict({"tasks": TASKS, **values})
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_direct_construction_raises_the_same_error() -> None:
    with pytest.raises(ConfigError, match="alpha: expected a number greater than 0, found -1"):
        PartitionConfig(alpha=-1)


def test_the_text_none_clears_what_may_be_none() -> None:
    train = {"steps": "none", "clip_norm": "none", "head_lr": "none"}
    config = from_dict({"tasks": TASKS, "workers": "none", "train": train, "name": "none"})
    assert (config.train.steps, config.train.clip_norm, config.train.head_lr) == (None, None, None)
    assert (config.workers, config.name) == (None, "none")
    assert from_json(config.model_dump_json()) == config


def test_settings_cannot_be_changed() -> None:
    config = from_dict({"tasks": TASKS})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 2  # type: ignore[misc]


def test_one_text_column_needs_no_list() -> None:
    task = TaskConfig(name="own", source="rows.csv", text="body", label="y", clients=2)  # type: ignore[arg-type]
    assert task.text == ("body",)


def test_clients_are_counted_over_tasks() -> None:
    assert from_dict({"tasks": TASKS}).clients == 8


settings = st.fixed_dictionaries(
    {"tasks": st.just(TASKS)},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "density": st.floats(0, 1, exclude_min=True),
        "method": st.sampled_from(sorted(METHODS)),
        "up": st.sampled_from(["fp32", "int4+ef", "topk:0.25+noef"]),
        "down": st.sampled_from(["fp16", "int4+delta"]),
        "train": st.fixed_dictionaries(
            {}, optional={"lr": st.floats(1e-6, 10.0), "steps": st.none() | st.integers(1, 99)}
        ),
        "server": st.fixed_dictionaries(
            {},
            optional={
                "options": st.dictionaries(st.sampled_from("ab"), st.integers(-9, 9) | st.floats(-1, 1))
            },
        ),
    },
)


@given(settings)
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = from_dict(values)
    again = from_json(config.model_dump_json())
    assert again == config
    assert again.model_dump_json() == config.model_dump_json()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_json_that_is_no_config(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        from_json(text)


def test_toml_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match=r"run\.toml: cannot be read"):
        load_config(path)
    path.write_text("density = ")
    with pytest.raises(ConfigError, match=r"run\.toml: expected TOML"):
        load_config(path)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match=r"run\.toml: expected TOML"):
        load_config(path)
    path.write_text("densty = 0.1\n[[tasks]]\nname = 'bbc'\nclients = 2\n")
    with pytest.raises(ConfigError, match=r"run\.toml: unknown key 'densty'; the nearest is 'density'"):
        load_config(path)
    path.write_text("density = 0.1\n[[tasks]]\nname = 'bbc'\nclients = 2\n")
    assert load_config(path) == RunConfig(density=0.1, tasks=(TaskConfig(name="bbc", clients=2),))
