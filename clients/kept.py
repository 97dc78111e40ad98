"""What a client keeps between messages, on its own disk too.

Flower keeps ``context.state`` in a SuperNode's memory, for one run. A SuperNode that is started again, and a
run that goes on as a new one (``--resume``), would begin with nothing: with error feedback that is another
result. So what builds on earlier rounds is written into the folder FEDMASK_STATE after each training, by
Flower's number of the run and the partition; the server names the numbers that a resumed run had before. The
run's own name would not do: another user's run may have it, or a new one that replaces it. What is damaged
or gone is rebuilt as for a new client. Arrays and JSON, nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, Context

from clients.heads import HEAD, HEAD_ROUND
from clients.link import NOTES, RECEIVED, RESIDUAL
from clients.union import OWN, UNION
from fedmask.flower import AFTER, bytes_record, record_bytes
from fedmask.shard_cache import pack_arrays, read_arrays, write_private

# Not "runs": that is where results lie, and FEDMASK_STATE may be the project's folder.
FOLDER = "clients-kept"
_NAMES = (RECEIVED, RESIDUAL, NOTES, HEAD, HEAD_ROUND, OWN, UNION)
_FORMAT, _RUNS_KEPT = 1, 8


def recall(context: Context, partition: int, offer: ConfigRecord | None = None) -> None:
    """Take what was kept of this run, or of those that ``offer`` (of a join message) says it goes on from.

    Nothing happens where the state is there, and without FEDMASK_STATE.
    """
    if any(name in context.state for name in _NAMES):
        return
    earlier = offer.get(AFTER) if offer is not None else None
    newest = reversed(earlier[-_RUNS_KEPT:]) if isinstance(earlier, list) else ()
    for path in _files([str(context.run_id), *newest], partition):
        found = read_arrays(path, "state")
        if found is not None and (records := _records(*found)) is not None:
            for name, record in records.items():
                context.state[name] = record
            return


def _records(
    said: dict[str, Any], arrays: dict[str, np.ndarray]
) -> dict[str, ArrayRecord | ConfigRecord] | None:
    """What a file holds; None for a file of another release, which is as good as none."""
    if said.get("version") != _FORMAT:
        return None
    out: dict[str, ArrayRecord | ConfigRecord] = {}
    try:
        for name, values in said["settings"].items():
            out[name] = ConfigRecord(values)
        for name, parts in said["arrays"].items():
            out[name] = ArrayRecord(
                {part: bytes_record(arrays[f"{name}/{part}"].tobytes(), part)[part] for part in parts}
            )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return out


def remember(context: Context, partition: int) -> None:
    """Write what later rounds build on, in one step; the folders of all but the last runs go."""
    arrays: dict[str, np.ndarray] = {}
    parts: dict[str, list[str]] = {}
    settings: dict[str, dict[str, object]] = {}
    for name in _NAMES:
        record = context.state.get(name)
        if isinstance(record, ConfigRecord):
            settings[name] = dict(record)
        elif isinstance(record, ArrayRecord):
            parts[name] = list(record)
            for part in record:
                data = record_bytes(ArrayRecord({part: record[part]}), part)
                arrays[f"{name}/{part}"] = np.frombuffer(data, np.uint8)
    if not parts:
        return
    said = {"version": _FORMAT, "settings": settings, "arrays": parts}
    for path in _files([str(context.run_id)], partition):
        with suppress(OSError):  # where nothing can be kept, it is rebuilt after the next restart
            new = not path.parent.exists()
            write_private(path, pack_arrays("state", said, arrays))
            if new:
                _forget_all_but_the_last(path.parent.parent)


def _files(runs: Iterable[object], partition: int) -> list[Path]:
    """Where things are kept, by run. A number below 2 is no SuperLink's: in process all runs have that."""
    folder = os.environ.get("FEDMASK_STATE")
    numbers = [run for run in runs if isinstance(run, str) and _is_run(run) and 1 < int(run) < 2**64]
    return [Path(folder) / FOLDER / run / f"{partition}.safetensors" for run in numbers] if folder else []


def _is_run(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= 20


def _forget_all_but_the_last(folder: Path) -> None:
    """Remove the oldest runs. Other clients may share the folder and do the same at the same time."""
    for path in sorted((path for path in folder.iterdir() if _is_run(path.name)), key=_age)[:-_RUNS_KEPT]:
        with suppress(OSError):
            files = list(path.iterdir())
            # A process that was killed while it wrote leaves .N.safetensors.PID.
            if all(".safetensors" in file.name and file.is_file() for file in files):
                for file in files:
                    file.unlink(missing_ok=True)
                path.rmdir()


def _age(path: Path) -> int:
    """When it was changed last; 0 for what is gone by now."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0
