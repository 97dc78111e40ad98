"""For ``make test-containers``: these tests are collected only when FEDMASK_TEST_CONTAINERS is set.

With ``required`` in it a machine that cannot have an engine is a failure; else it is a reason to skip. Each
file has a worker of its own: the image is built while the tests run that need no container, and the
containers get the machine when these have ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.containers.federation import Containers, write_data
from tests.end_to_end.link import Site, superlink_at

collect_ignore_glob = [] if os.environ.get("FEDMASK_TEST_CONTAINERS") else ["test_*.py"]
HERE = Path(__file__).parent
NO_ENGINE = 3


@contextlib.contextmanager
def machine(factory: pytest.TempPathFactory, *, alone: bool) -> Iterator[None]:
    """The machine, shared with the other process tests or ``alone``: a round in containers has a deadline."""
    root = factory.getbasetemp()
    root = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    with (root / "machine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@pytest.fixture(scope="module", autouse=True)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A file without containers keeps its share until its last test has ended."""
    if any("containers" in item.fixturenames for item in request.node.collect()):
        yield
    else:
        with machine(tmp_path_factory, alone=False):
            yield


def start_engine() -> dict[str, str]:
    """The environment for docker and compose. A machine that cannot have an engine says why."""
    started = subprocess.run([str(HERE / "engine.sh"), "start"], capture_output=True, text=True, check=False)
    if started.returncode == NO_ENGINE:
        reason = started.stderr.strip().splitlines()[-1]
        (pytest.fail if os.environ["FEDMASK_TEST_CONTAINERS"] == "required" else pytest.skip)(reason)
    assert started.returncode == 0, started.stderr
    command = ["bash", "-c", f"{started.stdout}\nenv -0"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(word.split("=", 1) for word in words.split("\0") if "=" in word)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """A federation of four clients, started as a user would; it and the engine are gone afterwards."""
    folder = tmp_path_factory.mktemp("containers")
    write_data(folder)
    made = Containers(start_engine(), folder)
    try:
        made.compose("build", minutes=15)
        with machine(tmp_path_factory, alone=True):
            made.compose("up", "--build", "-d", minutes=15)
            yield made
    except BaseException:
        print(made.compose("logs", "--tail", "40", check=False)[-8000:])
        raise
    finally:
        made.compose("down", "-v", "-t", "3", check=False)
        subprocess.run([str(HERE / "engine.sh"), "stop"], check=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A SuperLink with two SuperNodes that keep what their clients remember on disk."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    monkeypatch.setenv("FEDMASK_STATE", str(tmp_path / "state"))
    with superlink_at(tmp_path / "flower") as made:
        yield made
