"""Vectors and masks <-> Flower records, and the bytes that a message weighs.

The only module of the library that knows Flower. A message carries at most one array: a frame or an
envelope (see ``fedmask.channel``) or a packed mask, as uint8. One array per message matters: with Flower's
transport each further array costs requests and headers of its own.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.task_identity import TaskIdentity

from fedmask.channel import payload_bytes
from fedmask.config import RunConfig, from_json
from fedmask.errors import ConfigError, EnvelopeError

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
UPDATE = "update"
MASK = "mask"
RECIPE = "recipe"
HELD = "held"
PRECISION = "precision"
SECONDS = "seconds"
KERNEL = "kernel"
SEAT, TAKE = "seat", "take"
ROWS = "rows"
NOT_JOINED = "this node has not joined the run"
PLACES = "places"
INDICES = "indices"
COUNTED = "counted"
AFTER = "after"
MAX_METRICS = 9
_FULL_ID = 2**64 - 1
EXAMPLES = "num-examples"
HELD_OUT = "held-out"
SCORES = ("global-score", "personal-score")
LOSSES = ("train-loss", "global-loss", "personal-loss")
# A perfect correlation may exceed 1 in its last bits; no loss computed in float32 exceeds its range.
_MOST_SCORE = 1 + 1e-6
_MOST_LOSS = float(np.finfo(np.float32).max)

QUERY_JOIN = "query.join"
QUERY_MASK = "query.mask"
QUERY_SCORES = "query.scores"
TRAIN: Final = "train"
EVALUATE: Final = "evaluate"


class RecordError(EnvelopeError):
    """A message whose records are not the ones agreed on."""


def config_of(run_config: Mapping[str, object], default: Callable[[], RunConfig] | None = None) -> RunConfig:
    """The run's settings from the one declared key ``config`` of a Flower run config.

    An empty text means ``default()``. Raises ``ConfigError`` when there is neither, or no sound JSON.
    """
    text = run_config.get("config", "")
    if not isinstance(text, str):
        raise ConfigError(f"run config: expected JSON text under 'config', found {type(text).__name__}")
    if text.strip():
        return from_json(text)
    if default is None:
        raise ConfigError("run config: the key 'config' is empty; give the run's settings as one JSON string")
    return default()


def bytes_record(data: bytes, name: str = UPDATE) -> ArrayRecord:
    """An ArrayRecord with exactly one uint8 array [len(data)] called ``name``.

    As ``numpy.save`` writes it, without the spaces that align it on disk: 55 bytes less a message.
    """
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(data)},), }}\n".encode()
    whole = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data
    return ArrayRecord({name: Array("uint8", (len(data),), "numpy.ndarray", whole)})


def record_bytes(record: ArrayRecord, name: str = UPDATE) -> bytes:
    """The bytes of a record made by ``bytes_record``.

    Raises ``RecordError`` when the record holds anything else than one uint8 vector called ``name``.
    """
    if list(record) != [name]:
        raise RecordError(f"expected one array called {name!r}, found {sorted(record)[:4]}")
    array = record[name]
    if array.dtype != "uint8" or len(array.shape) != 1 or array.stype != "numpy.ndarray":
        raise RecordError(f"expected a vector of uint8, found {array.dtype} of shape {tuple(array.shape)}")
    return _npy_bytes(array.data)


def _npy_bytes(data: bytes) -> bytes:
    """The bytes of one uint8 vector as ``numpy.save`` writes it.

    NumPy's own reader would first allocate whatever the header claims, and takes archives of arrays, too.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("expected version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # NumPy's reader raises many types on damaged bytes
        raise RecordError(f"the array cannot be read: {' '.join(str(error).split())[:200]}") from None
    if dtype != np.uint8 or len(shape) != 1:
        raise RecordError(f"expected a vector of uint8, found {dtype} of shape {shape}")
    if shape[0] != (left := len(data) - file.tell()):
        raise RecordError(f"the array cannot be read: expected {shape[0]} bytes, found {left}")
    return data[file.tell() :]


def update_content(frame: bytes, round: int, counted: int | None = None) -> RecordDict:
    """What the server sends for training and evaluation: the frame and the round's number.

    ``counted``: the last round whose reply was used, for a client whose later ones were not.
    """
    said: dict[str, ConfigRecordValues] = {"round": round}
    if counted is not None:
        said[COUNTED] = counted
    return RecordDict({ARRAYS: bytes_record(frame), CONFIG: ConfigRecord(said)})


def behind_content(held: int) -> RecordDict:
    """What a client answers to changes that it cannot use: the version that it does hold."""
    return RecordDict({CONFIG: ConfigRecord({HELD: held})})


def behind_version(content: RecordDict) -> int | None:
    """The inverse of ``behind_content``; None for any other content."""
    if set(content) != {CONFIG}:
        return None
    held = content.config_records.get(CONFIG, ConfigRecord()).get(HELD)
    return held if isinstance(held, int) and not isinstance(held, bool) and held >= 0 else None


def reply_content(envelope: bytes | None, metrics: dict[str, float]) -> RecordDict:
    """What a client answers: its envelope (training only) and scalar metrics."""
    content = RecordDict()
    if envelope is not None:
        content[ARRAYS] = bytes_record(envelope)
    content[METRICS] = MetricRecord(dict(metrics))
    return content


def read_metrics(record: MetricRecord, required: tuple[str, ...]) -> dict[str, float]:
    """The metrics of a reply, checked: scalars, finite, ``required`` present, at most nine.

    Besides the required keys there may be ``held-out`` (a number of rows), ``SCORES`` (from -1 to 1) and
    ``LOSSES`` (not negative). Raises ``RecordError``.
    """
    found: dict[str, float] = {}
    if len(record) > MAX_METRICS:
        raise RecordError(f"expected at most {MAX_METRICS} metrics, found {len(record)}")
    for key, value in record.items():
        if key not in (*required, HELD_OUT, *SCORES, *LOSSES):
            raise RecordError(f"unknown metric {key[:40]!r}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecordError(f"metric {key[:40]!r}: expected one number, found {type(value).__name__}")
        if not math.isfinite(value):
            raise RecordError(f"metric {key[:40]!r} is not finite")
        if key in SCORES and abs(value) > _MOST_SCORE:
            raise RecordError(f"{key}: expected a score from -1 to 1, found {value!r}")
        if key in LOSSES and not 0 <= value <= _MOST_LOSS:
            raise RecordError(f"{key}: expected a loss from 0 to {_MOST_LOSS:.2g}, found {value!r}")
        found[key] = value
    for key in required:
        if key not in found:
            raise RecordError(f"metric {key!r} is missing")
    return found


def message_bytes(messages: Sequence[Message]) -> list[int]:
    """Bytes of each whole serialized message: the message and all records, arrays and chunks below it.

    Objects of equal content count once per message, as Flower sends them. HTTP is not counted. Messages
    that share their content are measured together so that a large vector is serialized once. The ids of
    run, nodes, tasks and messages count at their full width (``_with_full_ids``): a run's figures then do
    not depend on the engine's random numbers.
    """
    sizes: dict[str, int] = {}
    totals = []
    with no_object_id_recompute():
        for message in messages:
            parts = get_all_nested_objects(message)
            for name, part in parts.items():
                if part is not message and name not in sizes:
                    sizes[name] = len(part.deflate())
            below = sum(sizes[name] for name, part in parts.items() if part is not message)
            totals.append(below + len(_with_full_ids(message).deflate()))
    return totals


def _with_full_ids(message: Message) -> Message:
    """The message with random ids as a SuperLink writes them: 64-bit numbers, a SHA-256 in hex.

    It draws the numbers of runs, nodes and tasks from 64 bits; nearly all take 9 or 10 bytes, here always 10.
    Its own node number, 1, stays.
    """
    given = message.metadata
    full = copy.copy(given)
    for name in ("run_id", "src_node_id", "dst_node_id", "src_task_id", "dst_task_id"):
        if getattr(given, name) is not None and (not name.endswith("node_id") or getattr(given, name) > 1):
            full.__dict__[f"_{name}"] = _FULL_ID
    full.__dict__["_reply_to_message_id"] = "0" * 64 if given.reply_to_message_id else ""
    copied = copy.copy(message)
    copied.__dict__["_metadata"] = full
    return copied


def content_payload_bytes(content: RecordDict) -> int:
    """Bytes of values, indices or recipe in a message's content, without headers, names and metrics.

    Unreadable content counts as nothing: the whole message's bytes are counted beside it anyway.
    """
    total = 0
    for arrays in content.array_records.values():
        for name, array in arrays.items():
            try:
                data = record_bytes(ArrayRecord({name: array}), name)
                total += payload_bytes(data) if name == UPDATE else len(data)
            except EnvelopeError:
                continue
    for config in content.config_records.values():
        recipe = config.get(RECIPE)
        if isinstance(recipe, str):
            total += len(recipe.encode())
        for key in (PLACES, INDICES):
            packed = config.get(key)
            total += len(packed) if isinstance(packed, bytes) else 0
    return total


def held_bytes(content: RecordDict) -> int:
    """Bytes of names, arrays, texts and numbers as they lie in memory, found without copying any."""
    total = 0
    for name, record in content.items():
        total += len(name)
        for key, value in record.items():
            total += len(key) + (len(value.data) if isinstance(value, Array) else _held(value))
    return total


def _held(value: object) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list):
        return sum(map(_held, value)) if value and isinstance(value[0], str | bytes) else 8 * len(value)
    return 8


def ensure_identity() -> None:
    """Give this process a task identity when no Flower runtime did: ``Message(...)`` needs one."""
    for name in ("run_id", "task_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 1)
