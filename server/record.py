"""The run's folder: what is written, when, and in which form."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError

import fedmask
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError

FOLDER_LINE = "fedmask: the run's folder is"  # in the log, for who follows it
Existing = Literal["refuse", "overwrite", "number", "resume"]
PACKAGES = ("torch", "transformers", "flwr", "flwr-datasets", "datasets", "numpy", "numba", "ray")


class RunFolder:
    """``<runs_dir>/<name>``.

    ``existing`` says what an existing folder means: ``refuse`` (``ConfigError``), ``overwrite`` (an
    older run there is replaced; anything else is refused), ``number`` (``name-2``, ``name-3``, ...:
    for apps that nobody can ask) or ``resume`` (it must be a run; ``create`` is for one that begins again).
    Nothing is touched before ``create``.
    """

    def __init__(self, config: RunConfig, existing: Existing = "refuse") -> None:
        self.existing = existing
        self.path = Path(config.runs_dir).expanduser().absolute() / config.name
        if existing == "number":
            self.path = _free(self.path)
        elif existing == "resume":
            if not is_run(self.path):
                raise ConfigError(f"{self.path}: expected an unfinished run to resume, found none")
        elif _taken(self.path):
            self._refuse()
        _check_writable(self.path)

    def _refuse(self) -> None:
        if not is_run(self.path):
            raise ConfigError(
                f"{self.path}: expected a new folder or an older run, found something else; remove it"
            )
        if self.existing not in ("overwrite", "resume"):
            finished = (self.path / "summary.json").is_file()
            how = "" if finished else "go on with it by --resume, "
            raise ConfigError(
                f"{self.path}: expected a new folder, found an older run; {how}replace it by --overwrite, or"
                " give another name"
            )

    def create(self, record: Mapping[str, Any]) -> None:
        """Make the folder with ``config.json`` (``record``) in it: settings, versions, machine and facts.

        It appears with its first file in one step, so that whatever fails before leaves nothing behind,
        and an older run is there until the new one is.
        """
        part, old = (self.path.with_name(f".{self.path.name}.{end}") for end in ("part", "old"))
        for left in (part, old):  # of a process that was killed right here
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            write_json(part / "config.json", record)
            if self.existing == "number":
                self.path = _free(self.path)
            elif _taken(self.path):
                self._refuse()  # it may have come meanwhile
                os.replace(self.path, old)
            if self.path.is_dir():
                self.path.rmdir()  # empty
            os.replace(part, self.path)
        except BaseException:
            shutil.rmtree(part)
            raise
        sync(self.path.parent)
        if old.is_symlink():
            old.unlink()
        elif old.exists():
            shutil.rmtree(old)

    def append_round(self, row: Mapping[str, Any]) -> None:
        """One line of ``rounds.jsonl``."""
        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(_dump(row) + "\n")
        sync(self.path / "rounds.jsonl")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """``summary.json``, last and in one step: its presence means a complete run."""
        write_json(self.path / "summary.json", summary)
        sync(self.path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses inside into one line. Raises ``FederationError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FederationError(
            f"{folder}: cannot be written ({reason}); what was complete is still there: make"
            " room (or give write permission) and go on with --resume"
        ) from error


def _check_writable(path: Path) -> None:
    """Say before anything is loaded that nothing could be written. Raises ``ConfigError``."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{path}: expected a folder that can be written, found no permission in {there}; give another"
            " --runs-dir"
        )


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: its ``config.json`` says so, as no other program's does."""
    try:
        return {"config", "facts", "versions"} <= read_json(path / "config.json").keys()
    except (ConfigError, OSError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``ConfigError`` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON, found an error ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON objects, one a line, in one step."""
    _replace(path, "".join(_dump(row) + "\n" for row in rows))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON, written beside the target and moved over it."""
    _replace(path, _dump(value, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until the disk has what a file holds, or which files a folder has.

    Without it a power cut may leave a new name with nothing behind it: the kernel writes when it likes.
    """
    # Other systems, and some file systems, know it for files only.
    with suppress(OSError) if path.is_dir() else nullcontext():
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


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


def _free(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that is free."""
    name, count, found = path.name, 1, path
    while _taken(found):
        count += 1
        found = path.with_name(f"{name}-{count}")
    return found


def unfinished(config: RunConfig) -> str:
    """The name of the newest run among ``name``, ``name-2``, ... that has not ended, for ``number``.

    Raises ``ConfigError`` when there is none.
    """
    first = Path(config.runs_dir).expanduser().absolute() / config.name
    count, path, found = 1, first, ""
    while _taken(path):
        if is_run(path) and not (path / "summary.json").is_file():
            found = path.name
        count += 1
        path = first.with_name(f"{first.name}-{count}")
    if not found:
        raise ConfigError(
            f"--resume: {first}: expected an unfinished run there (or numbered after it), found none"
        )
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _dump(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def plain(value: Any) -> Any:
    """``value`` for strict JSON: NumPy numbers as numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
