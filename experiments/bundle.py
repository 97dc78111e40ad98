"""The folder from which ``flwr run`` builds the app's bundle."""

from __future__ import annotations

import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmask.errors import ConfigError

PACKAGES = ("fedmask", "clients", "server", "experiments")
VALID_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
_HERE = Path(__file__).resolve().parent


@contextmanager
def app_folder() -> Iterator[Path]:
    """A folder with ``pyproject.toml``, ``LICENSE`` and the four packages.

    The checkout's root when fedmask runs from one, else a temporary copy of what is installed: the
    wheel carries both files as ``experiments/_app``. Raises ``ConfigError`` when they are missing.
    """
    root = _HERE.parent
    carried = root if _is_app(root / "pyproject.toml") else _HERE / "_app"
    if not _is_app(carried / "pyproject.toml"):
        raise ConfigError(f"{carried}: expected the pyproject.toml of the Flower app; install fedmask again")
    if carried == root and VALID_NAME.fullmatch(root.name):
        yield root
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "fedmask"  # Flower takes letters, digits and hyphens only, and not many
        for package in PACKAGES:
            shutil.copytree(
                root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "_app")
            )
        for file in ("pyproject.toml", "LICENSE"):
            shutil.copyfile(carried / file, folder / file)
        yield folder


def _is_app(path: Path) -> bool:
    if not path.is_file():
        return False
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    return found.get("project", {}).get("name") == "fedmask" and "flwr" in found.get("tool", {})
