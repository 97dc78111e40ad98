"""A SuperLink for the tests that need a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.link import Site, superlink_at


@pytest.fixture
def superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A SuperLink with two SuperNodes, and FLWR_HOME set to where its name stands."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    # A busy machine takes long to import Flower, which each question to the SuperLink does anew.
    monkeypatch.setattr("experiments.superlink._ANSWER_SECONDS", 120.0)
    monkeypatch.setattr("experiments.superlink._SETTLE_SECONDS", 240.0)
    with superlink_at(tmp_path / "flower") as site:
        yield site
