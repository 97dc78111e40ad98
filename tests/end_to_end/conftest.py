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
    with superlink_at(tmp_path / "flower") as site:
        yield site
