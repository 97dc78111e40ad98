"""What a client keeps between messages, on its own disk too.

Flower keeps ``context.state`` in a SuperNode's memory, for one run. A SuperNode that is started again, and a
run that goes on as a new one (``--resume``), would begin with nothing: with error feedback that is another
result. So what builds on earlier rounds is written into the folder FEDMASK_STATE after each training, by
Flower's number of the run and the partition; the server names the numbers that a resumed run had before. What
is damaged or gone is rebuilt as for a new client. Arrays and JSON, nothing is unpickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, Context

from clients.heads import HEAD, HEAD_ROUND
from clients.link import NOTES, RECEIVED, RESIDUAL
from clients.union import OWN, UNION
from fedmask.flower import AFTER, bytes_record, record_bytes
from fedmask.shard_cache import pack_arrays, read_arrays, write_private

_NAMES = (RECEIVED, RESIDUAL, NOTES, HEAD, HEAD_ROUND, OWN, UNION)
_RUNS_KEPT = 8


def recall(context: Context, partition: int, offer: ConfigRecord | None = None) -> None:
    """Take what was kept of this run, or of those that ``offer`` (of a join message) says it goes on from.

    Nothing happens where the state is there, and without FEDMASK_STATE.
    """
    if any(name in context.state for name in _NAMES):
        return
    earlier = offer.get(AFTER) if offer is not None else None
    names = [str(context.run_id), *reversed(earlier if isinstance(earlier, list) else [])]
    for path in _files(names, partition):
        if (found := read_arrays(path, "state")) is None:
            continue
        said, arrays = found
        for record, values in said["settings"].items():
            context.state[record] = ConfigRecord(values)
        for record, parts in said["arrays"].items():
            context.state[record] = ArrayRecord(
                {part: bytes_record(arrays[f"{record}/{part}"].tobytes(), part)[part] for part in parts}
            )
        return


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
    for path in _files([str(context.run_id)], partition):
        new = not path.parent.exists()
        write_private(path, pack_arrays("state", {"settings": settings, "arrays": parts}, arrays))
        if new:
            _forget_all_but_the_last(path.parent.parent)


def _files(runs: Iterable[object], partition: int) -> list[Path]:
    """Where things are kept, by run. A number below 2 is no SuperLink's: in process all runs have that."""
    folder = os.environ.get("FEDMASK_STATE")
    numbers = [run for run in runs if isinstance(run, str) and run.isdecimal() and 1 < int(run) < 2**64]
    return [Path(folder) / "runs" / run / f"{partition}.safetensors" for run in numbers] if folder else []


def _forget_all_but_the_last(folder: Path) -> None:
    runs = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path in runs[:-_RUNS_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
