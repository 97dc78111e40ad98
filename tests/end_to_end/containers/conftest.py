"""For ``make test-containers``: these tests are collected only when FEDMASK_TEST_CONTAINERS is set.

With ``required`` in it a machine that cannot have an engine is a failure; else it is a reason to skip.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.containers.federation import Containers

collect_ignore_glob = [] if os.environ.get("FEDMASK_TEST_CONTAINERS") else ["test_*.py"]
HERE = Path(__file__).parent
NO_ENGINE = 3


@pytest.fixture(scope="session")
def engine() -> Iterator[dict[str, str]]:
    """The environment for docker and compose. A machine that cannot have an engine skips, and says why."""
    started = subprocess.run([str(HERE / "engine.sh"), "start"], capture_output=True, text=True, check=False)
    if started.returncode == NO_ENGINE:
        tell = pytest.fail if os.environ["FEDMASK_TEST_CONTAINERS"] == "required" else pytest.skip
        tell(started.stderr.strip().splitlines()[-1])
    assert started.returncode == 0, started.stderr
    words = subprocess.run(
        ["bash", "-c", f"{started.stdout}\nenv -0"], capture_output=True, text=True, check=True
    ).stdout
    yield dict(word.split("=", 1) for word in words.split("\0") if "=" in word)
    subprocess.run([str(HERE / "engine.sh"), "stop"], check=False)


@pytest.fixture(scope="session")
def containers(engine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """A federation of four clients, freshly built and started as a user would; gone afterwards."""
    made = Containers(engine, tmp_path_factory.mktemp("containers"))
    try:
        made.compose("up", "--build", "-d", minutes=15)
        yield made
    except BaseException:
        print(made.compose("logs", "--tail", "40", check=False)[-8000:])
        raise
    finally:
        made.compose("down", "-v", "-t", "3", check=False)
