"""The short example is the same federation as the library's, to the last bit."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.engines import run_inprocess
from fedmask.config import RunConfig, from_dict
from tests.support import save_checkpoint, save_task

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation.py"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the library's clients: another number of threads would sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Two tasks of different sizes and classes, adapters, dropout, two rounds, two processes."""
    save_checkpoint(tmp_path / "model")
    save_task(tmp_path / "mood.tsv", ("no", "yes", "no", "yes"), rows=90, seed=1)
    save_task(tmp_path / "topic.tsv", ("art", "money", "sports", "art"), rows=60, seed=2)
    tasks = [
        {
            "name": name,
            "source": str(tmp_path / f"{name}.tsv"),
            "text": "text",
            "label": "label",
            "clients": count,
        }
        for name, count in (("mood", 3), ("topic", 2))
    ]
    values: dict[str, Any] = {
        "name": "example",
        "model": str(tmp_path / "model"),
        "method": "pafi+hiwi",
        "density": 0.05,
        "rounds": 2,
        "workers": 1,
        "tasks": tasks,
        "adapter": {"bottleneck": 4},
        "partition": {"kind": "dirichlet", "alpha": 5.0, "held_out": 0.0},
        "train": {"batch_size": 8, "max_tokens": 16, "lr": 0.01, "dropout": 0.2},
        "runs_dir": str(tmp_path / "runs"),
    }
    return from_dict(values)


def test_the_example_is_the_library_to_the_last_bit(config: RunConfig) -> None:
    shared, heads = runpy.run_path(str(EXAMPLE))["federate"](config)
    state = run_inprocess(config).state
    assert shared.dtype == state.shared.dtype == np.float32
    assert np.count_nonzero(state.shared) > 0.9 * state.shared.size
    assert np.array_equal(shared, state.shared)
    assert heads.keys() == state.heads.keys() == {"mood", "topic"}
    for task, head in heads.items():
        assert head.dtype == np.float32 and np.array_equal(head, state.heads[task])


def test_it_is_short_and_knows_neither_flower_nor_the_federation_s_parts() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for part in ("flwr", "workspace", "server", "clients.app", "fedmask.training"):
        assert (
            f"import {part}" not in text and f"from {part}" not in text and f"from fedmask.{part}" not in text
        )
