"""For ``make test-containers``: these tests are collected only when FEDMASK_TEST_CONTAINERS is set.

With ``required`` in it a machine that cannot have an engine is a failure; else it is a reason to skip. The
image is built while the tests run that need no container: they come first.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.end_to_end.containers.federation import Containers, write_data

collect_ignore_glob = [] if os.environ.get("FEDMASK_TEST_CONTAINERS") else ["test_*.py"]
HERE = Path(__file__).parent
NO_ENGINE = 3


class NoEngine(Exception):
    """Why this machine cannot have one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in containers go last."""
    items.sort(key=needs_containers)


def needs_containers(item: pytest.Item) -> bool:
    return "containers" in getattr(item, "fixturenames", ())


def start_engine(environment: dict[str, str]) -> dict[str, str]:
    """The environment for docker and compose, from one that no test has changed. Raises NoEngine."""
    started = subprocess.run(
        [str(HERE / "engine.sh"), "start"], env=environment, capture_output=True, text=True, check=False
    )
    if started.returncode == NO_ENGINE:
        raise NoEngine(started.stderr.strip().splitlines()[-1])
    assert started.returncode == 0, started.stderr
    command = ["bash", "-c", f"{started.stdout}\nenv -0"]
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return dict(word.split("=", 1) for word in words.split("\0") if "=" in word)


def build(folder: Path, environment: dict[str, str]) -> Containers:
    """A federation of four clients that can be started."""
    made = Containers(start_engine(environment), folder)
    made.compose("build", minutes=15)
    return made


@pytest.fixture(scope="session", autouse=True)
def building(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[Containers] | None]:
    """The federation on its way, where some test needs it; the engine ends with the tests."""
    if not any(map(needs_containers, request.session.items)):
        yield None
        return
    folder = tmp_path_factory.mktemp("containers")
    write_data(folder)  # here: two threads that import transformers at a time disturb each other
    with ThreadPoolExecutor(1) as worker:
        yield worker.submit(build, folder, dict(os.environ))
    subprocess.run([str(HERE / "engine.sh"), "stop"], check=False)


@pytest.fixture(scope="session")
def containers(building: Future[Containers]) -> Iterator[Containers]:
    """The federation, started as a user would; gone afterwards. A machine without an engine says why."""
    try:
        made = building.result()
    except NoEngine as reason:
        (pytest.fail if os.environ["FEDMASK_TEST_CONTAINERS"] == "required" else pytest.skip)(str(reason))
    try:
        made.compose("up", "--build", "-d", minutes=15)
        yield made
    except BaseException:
        print(made.compose("logs", "--tail", "40", check=False)[-8000:])
        raise
    finally:
        made.compose("down", "-v", "-t", "3", check=False)
