"""The run's folder: what is written, when, and in which form."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

import fedmask
from fedmask.config import RunConfig
from fedmask.errors import ConfigError
from fedmask.ledger import Ledger

Existing = Literal["refuse", "overwrite", "number"]
PACKAGES = ("torch", "transformers", "flwr", "flwr-datasets", "datasets", "numpy", "numba", "ray")


class RunFolder:
    """``<runs_dir>/<name>``.

    ``existing`` says what an existing folder means: ``refuse`` (``ConfigError``), ``overwrite`` (an
    older run there is removed; anything else is refused) or ``number`` (``name-2``, ``name-3``, ...:
    for apps that nobody can ask). Nothing is touched before ``create``.
    """

    def __init__(self, config: RunConfig, existing: Existing = "refuse") -> None:
        self.existing = existing
        self.path = Path(config.runs_dir).expanduser().absolute() / config.name
        if not _taken(self.path):
            return
        if existing == "number":
            count = 2
            while _taken(self.path.with_name(f"{config.name}-{count}")):
                count += 1
            self.path = self.path.with_name(f"{config.name}-{count}")
        elif existing == "refuse":
            raise ConfigError(
                f"{self.path}: expected a new folder, found an older run; give another name, or --overwrite"
            )
        elif not (self.path / "config.json").is_file():
            raise ConfigError(
                f"{self.path}: expected an older run to overwrite, found something else; remove it"
            )

    def create(self) -> None:
        """Make the folder, empty."""
        if self.existing == "overwrite" and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)

    def write_config(self, record: Mapping[str, Any]) -> None:
        """``config.json``: settings, versions, machine and facts, before the first round."""
        write_json(self.path / "config.json", record)

    def append_round(self, row: Mapping[str, Any]) -> None:
        """One line of ``rounds.jsonl``."""
        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(_dump(row) + "\n")

    def save_ledger(self, ledger: Ledger) -> None:
        """Append to ``ledger.jsonl`` what is not there yet: a run that dies leaves what it did."""
        ledger.write_jsonl(self.path / "ledger.jsonl")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """``summary.json``, last and in one step: its presence means a complete run."""
        write_json(self.path / "summary.json", summary)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON, written beside the target and moved over it."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(_dump(value, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "fedmask": fedmask.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """The machine in a few words."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "byte_order": sys.byteorder,
    }


def vector_digest(shared: np.ndarray, heads: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over the shared values and the heads in the order of the tasks, little-endian float32."""
    digest = hashlib.sha256(shared.astype("<f4", copy=False).tobytes())
    for task in heads:
        digest.update(heads[task].astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _taken(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _dump(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """``value`` for strict JSON: NumPy numbers as numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
