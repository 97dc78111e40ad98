"""What ``flwr run`` ships, from a checkout and from an installed copy; and how the run's config travels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from experiments import bundle
from experiments.bundle import PACKAGES, VALID_NAME, app_folder
from experiments.superlink import run_config_toml
from fedmask.config import from_dict, from_json
from fedmask.errors import ConfigError

ROOT = Path(__file__).parents[2]


def build(folder: Path, into: Path) -> zipfile.ZipFile:
    """The app's bundle, built by ``flwr build``."""
    into.mkdir()
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", "build", "--app", str(folder)]
    environment = {**os.environ, "FLWR_HOME": str(into / "home")}
    done = subprocess.run(command, cwd=into, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = into.glob("*.fab")
    return zipfile.ZipFile(built)


def test_the_bundle_holds_what_the_apps_need(tmp_path: Path) -> None:
    with app_folder() as folder:
        # A checkout in a folder whose name Flower refuses is bundled from a copy.
        assert folder == ROOT or (folder.name == "fedmask" and not VALID_NAME.fullmatch(ROOT.name))
        with build(folder, tmp_path / "fab") as fab:
            names = set(fab.namelist())
            settings = tomllib.loads(fab.read("pyproject.toml").decode())
            demo = fab.read("experiments/studies/demo.toml")
    wanted = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not {"benchmarks", "compare", "competitors", "results"} & set(path.parts)
    }
    assert wanted <= names
    assert {"pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".json", ".jsonl", ".html", ".safetensors"))]
    assert not [name for name in names if name.startswith(("tests/", "runs/"))]
    assert demo == (ROOT / "experiments/studies/demo.toml").read_bytes()
    app = settings["tool"]["flwr"]["app"]
    assert app["config"] == {"config": "", "resume": False}
    assert app["components"] == {
        "serverapp": "experiments.flower_app:server_app",
        "clientapp": "experiments.flower_app:client_app",
    }


def test_the_components_are_there() -> None:
    from experiments.flower_app import client_app, server_app

    assert isinstance(client_app, ClientApp)
    assert isinstance(server_app, ServerApp)


def test_an_installed_copy_builds_the_same_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel lays it out: no pyproject beside the packages, but one inside ``experiments/_app``."""
    with app_folder() as checkout, build(checkout, tmp_path / "other") as other:
        names, text = set(other.namelist()), other.read("fedmask/flower.py")
    installed = tmp_path / "site-packages"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, installed / package, ignore=shutil.ignore_patterns("__pycache__"))
    carried = installed / "experiments" / "_app"
    carried.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, carried / name)
    monkeypatch.setattr(bundle, "_HERE", installed / "experiments")
    with app_folder() as folder:
        assert folder not in (ROOT, installed)
        with build(folder, tmp_path / "fab") as fab:
            assert set(fab.namelist()) == names
            assert fab.read("fedmask/flower.py") == text
    assert not folder.exists()
    shutil.rmtree(carried)
    with pytest.raises(ConfigError, match="install fedmask again"), app_folder():
        pass


def test_the_wheel_carries_the_app() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {
        "pyproject.toml": "experiments/_app/pyproject.toml",
        "LICENSE": "experiments/_app/LICENSE",
    }


def test_a_config_survives_toml_and_json() -> None:
    awkward = 'it\'s "quoted" \\ back\\slash \x7f naïve 😀 \n new line'
    task = {"name": "t", "clients": 2, "source": awkward, "text": ["a b", "ü"], "label": "l"}
    config = from_dict({"tasks": [task], "server": {"options": {"eta": 0.1}, "strategy": "fedadam"}})
    read = tomllib.loads(run_config_toml(config))
    assert list(read) == ["config"]
    assert from_json(read["config"]) == config
