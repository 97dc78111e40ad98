"""Reading clients' replies. Whatever is wrong with one becomes an ``EnvelopeError`` with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedmask.channel import Terms
from fedmask.codecs import read_header, unpack_update
from fedmask.flower import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    HELD,
    HELD_OUT,
    METRICS,
    ROWS,
    RecordError,
    read_metrics,
    record_bytes,
)
from server.strategy import Contribution

T = TypeVar("T")
_DIGEST = re.compile("(?:[0-9a-f]{64})?")  # a SHA-256; a spare node has none to say


@dataclass(frozen=True)
class Most:
    """What one client can truthfully claim: rows it trains on, rows it holds out, steps of a round.

    A client that claims more would outweigh the others, or spoil the sums.
    """

    rows: int
    held_out: int
    steps: int


@dataclass(frozen=True)
class Joined:
    """What a node said when it was asked to join."""

    partition: int
    status: str
    digest: str
    checkpoint: str
    reason: str
    held: int = 0
    rows: tuple[int, int] | None = None


def read_join(message: Message) -> Joined:
    """The answer to ``query.join`` and ``query.mask``. Raises ``RecordError``."""
    record = _record(_records(message.content, CONFIG), CONFIG, ConfigRecord)
    partition = record.get("partition")
    texts = [record.get(key, "") for key in ("status", "digest", "checkpoint", "reason")]
    if isinstance(partition, bool) or not isinstance(partition, int):
        raise RecordError(f"partition: expected a whole number, found {partition!r}")
    if not all(isinstance(text, str) for text in texts):
        raise RecordError("expected texts for status, digest and checkpoint")
    held = record.get(HELD, 0)
    if isinstance(held, bool) or not isinstance(held, int) or held < 0:
        raise RecordError(f"{HELD}: expected a version, found {held!r}")
    status, digest, checkpoint, reason = (str(text) for text in texts)
    for key, text in (("digest", digest), ("checkpoint", checkpoint)):
        if not _DIGEST.fullmatch(text):
            raise RecordError(f"{key}: expected 64 hex digits, found {text[:80]!r}")
    return Joined(partition, status, digest, checkpoint, reason, held, _rows(record.get(ROWS)))


def _rows(found: object) -> tuple[int, int] | None:
    """Rows of a client's own: those that it trains on, one or more, and those that it holds out."""
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(count) is int for count in found):
        raise RecordError(f"{ROWS}: expected two numbers of rows, found {found!r}")
    if found[0] < 1 or found[1] < 0:
        raise RecordError(f"{ROWS}: expected one row or more to train on, found {found!r}")
    return found[0], found[1]


def read_training(
    message: Message,
    *,
    client: int,
    task: str,
    terms: Terms,
    round: int,
    codec: str,
    most: Most,
    brought: bool = False,
) -> Contribution:
    """A training reply as a contribution. ``brought``: a mask comes with it (``server.uplink``).

    ``terms``: what the values must mean; ``codec``: the one in which they must come. Raises ``EnvelopeError``
    (or a subclass) for anything that is not exactly the agreed records, or that claims more than ``most``.
    """
    content = _records(message.content, ARRAYS, METRICS, *([CONFIG] if brought else []))
    arrays = _record(content, ARRAYS, ArrayRecord)
    metrics = read_metrics(
        _record(content, METRICS, MetricRecord), required=(EXAMPLES, "train-loss", "steps")
    )
    examples = _examples(metrics, least=1, most=most.rows)
    _count(metrics, "steps", most.steps)
    if HELD_OUT in metrics:
        _count(metrics, HELD_OUT, most.held_out)
    envelope = record_bytes(arrays)
    if (found := read_header(envelope).codec) != codec:
        raise RecordError(f"expected values as {codec}, found {found}")
    change = unpack_update(envelope, layout=terms.layout, digest=terms.digest, round=round)
    return Contribution(client, task, examples, change, metrics)


def read_scores(message: Message, *, most: Most) -> dict[str, float]:
    """The metrics of an evaluation reply, over at most ``most.held_out`` rows. Raises ``RecordError``."""
    scalars = _record(_records(message.content, METRICS), METRICS, MetricRecord)
    metrics = read_metrics(scalars, required=(EXAMPLES,))
    _examples(metrics, least=0, most=most.held_out)
    return metrics


def _examples(metrics: dict[str, float], least: int, most: int) -> int:
    found = metrics[EXAMPLES]
    if not isinstance(found, int) or not least <= found <= most:
        raise RecordError(f"{EXAMPLES}: expected a whole number from {least} to {most}, found {found!r}")
    return found


def _count(metrics: dict[str, float], key: str, most: int) -> None:
    found = metrics[key]
    if not 0 <= found <= most or found != int(found):
        raise RecordError(f"{key}: expected a whole number from 0 to {most}, found {found!r}")


def _records(content: RecordDict, *names: str) -> RecordDict:
    """``content``, which must hold exactly the records called ``names``."""
    if set(content) != set(names):
        raise RecordError(f"expected the records {sorted(names)}, found {sorted(content)[:6]}")
    return content


def _record(content: RecordDict, name: str, kind: type[T]) -> T:
    record = content[name]
    if not isinstance(record, kind):
        raise RecordError(f"{name}: expected {kind.__name__}, found {type(record).__name__}")
    return record
