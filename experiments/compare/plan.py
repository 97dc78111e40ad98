"""From a study to its runs: the settings of each, in which order, and where their results lie."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.compare.data import Prepared
from experiments.compare.study import Study, StudyTask, Variant
from fedmask.config import RunConfig, from_dict
from fedmask.errors import ConfigError

CELLS = "cells"


@dataclass(frozen=True)
class Cell:
    """One run of a study: a variant at a learning rate and a seed."""

    variant: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """A name for files: ``pafi/lr-1e-02.seed-1``."""
        return f"{self.variant}/lr-{self.lr:g}.seed-{self.seed}"

    def path(self, out: Path) -> Path:
        """Where its result is written."""
        return out / CELLS / f"{self.key}.json"


def grid(study: Study, variant: Variant) -> list[Cell]:
    """The search: every learning rate on the first seed."""
    return [Cell(variant.name, lr, study.seeds[0]) for lr in variant.lr]


def repeats(study: Study, variant: Variant, lr: float) -> list[Cell]:
    """The other seeds with the learning rate that won."""
    return [Cell(variant.name, lr, seed) for seed in study.seeds[1:]]


def settings_of(
    study: Study, variant: Variant, lr: float, seed: int, sizes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A run's settings as the study states them, without tasks: what identifies its result.

    ``sizes``: the settings that a matched budget came to (``fedmask.compare.budget``). Raises ConfigError.
    """
    values = copy.deepcopy(study.run)
    own = {**variant.settings, **(sizes or {}), variant.tune: lr}
    own |= {key: factor * lr for key, factor in variant.follow.items()}
    for key, value in own.items():
        put(values, key, value)
    return values | {"method": variant.method, "seed": seed}


def put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``train.lr`` in nested tables. Raises ConfigError where a part of the key is no table."""
    *tables, last = dotted.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {table!r} is a value, so it has no key {last!r}")
    values[last] = value


def run_config(
    study: Study,
    settings: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Path]],
    *,
    name: str,
    runs_dir: Path,
) -> RunConfig:
    """The run that the settings state, on the prepared files (task -> split -> file). Raises ConfigError."""
    tasks = [_task(task, files[task.name]) for task in study.tasks]
    # Clients train one after the other: the processes of a study are its runs.
    fixed = {"tasks": tasks, "workers": 1, "test_every_round": True, "name": name, "runs_dir": str(runs_dir)}
    return from_dict(dict(settings) | fixed)


def _task(task: StudyTask, files: Mapping[str, Path]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": task.name,
        "source": str(files["train"]),
        "dev": str(files["validation"]),
        "test": str(files["reported"]),
        "text": task.text,
        "label": task.label,
        "metric": task.metric,
        "clients": task.clients,
    }
    if task.partition is not None:
        out["partition"] = task.partition.model_dump()
    return out


def configs_without_data(study: Study) -> Iterator[tuple[Variant, RunConfig]]:
    """Each variant's first run, on files that need not be there: it checks all settings."""
    names = {task.name: {split: Path(f"{split}.jsonl") for split in ("train", "validation", "reported")}
             for task in study.tasks}  # fmt: skip
    return iter([(variant, _checked(study, variant, names)) for variant in study.variants])


def _checked(study: Study, variant: Variant, files: Mapping[str, Mapping[str, Path]]) -> RunConfig:
    try:
        settings = settings_of(study, variant, variant.lr[0], study.seeds[0])
        config = run_config(study, settings, files, name=study.name, runs_dir=Path("runs"))
        if config.server.sharing == "local-heads":  # every run would fail, after it has trained
            raise ConfigError(
                "server.sharing: expected 'all' or 'by-task', found 'local-heads': a study scores the model"
                " of the server each round, which lacks the heads that stay with the clients"
            )
        return config
    except ConfigError as error:
        raise ConfigError(f"variant {variant.name!r}: {error}") from None


def fingerprint(settings: Mapping[str, Any], study: Study, prepared: Mapping[str, Prepared]) -> str:
    """SHA-256 (hex) over all that a result depends on in the study's words, and over the rows.

    Settings that a later version adds do not change it, so that results can be added to.
    """
    tasks = [task.model_dump(mode="json", include=_OF_TASKS, exclude_defaults=True) for task in study.tasks]
    digests = {name: one.digest for name, one in prepared.items()}
    text = json.dumps([dict(settings), tasks, digests], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


_OF_TASKS = {"name", "text", "label", "metric", "clients", "partition"}
