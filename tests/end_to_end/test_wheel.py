"""What an installed copy consists of: the packages, the studies, and what a SuperLink's bundle needs."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


def test_every_module_is_in_the_wheel_and_no_test(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("fedmask", "clients", "server", "experiments"):
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert modules <= names
    assert not [name for name in names if name.startswith(("tests", "runs", "docs"))]
    assert "experiments/studies/demo.toml" in names


def test_the_apps_own_pyproject_comes_along(wheel: zipfile.ZipFile) -> None:
    carried = tomllib.loads(wheel.read("experiments/_app/pyproject.toml").decode())
    assert carried == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert wheel.read("experiments/_app/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_one_console_script(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert wheel.read(name).decode().split() == ["[console_scripts]", "fedmask", "=", "experiments.cli:main"]
