"""A tiny random BERT, two tiny tasks, and configs over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmask.config import RunConfig, from_dict
from tests.support import save_two_tasks


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``mood.tsv`` (2 classes) and ``topic.tsv`` (3 classes)."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_two_tasks(folder)


@pytest.fixture
def server_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's clock goes on only while it sleeps because no reply is there.

    So a client is late because its grid holds it back, never because the machine is busy.
    """
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    for module in ("exchange", "rounds"):
        monkeypatch.setattr(f"server.{module}.time", clock)


@pytest.fixture
def make_config(tiny: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``make_config(**changes)``: 5 clients (3 mood, 2 topic), 2 rounds; ``clients=(3, 2)`` changes that.

    Without measuring how far clients' own masks would overlap, which takes longer than the rounds.
    """

    def build(clients: tuple[int, ...] = (3, 2), **changes: Any) -> RunConfig:
        tasks = [
            {"name": name, "source": str(tiny / f"{name}.tsv"), "text": ["text"], "label": "label",
             "clients": count}
            for name, count in zip(("mood", "topic"), clients, strict=False)
        ]  # fmt: skip
        values: dict[str, Any] = {
            "name": "tiny",
            "model": str(tiny / "model"),
            "density": 0.02,
            "rounds": 2,
            "workers": 1,
            "eval_rows": 40,
            "overlap_batches": 0,
            "tasks": tasks,
            "partition": {"kind": "iid"},
            "train": {"steps": 2, "batch_size": 8, "max_tokens": 16},
            "runs_dir": str(tmp_path / "runs"),
        }
        return from_dict(values | changes)

    return build
