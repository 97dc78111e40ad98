"""Reading clients' replies. Whatever is wrong with one becomes an ``EnvelopeError`` with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedmask.codecs import unpack_update
from fedmask.flower import ARRAYS, CONFIG, EXAMPLES, METRICS, RecordError, read_metrics, record_bytes
from fedmask.layout import Layout
from server.strategy import Contribution

T = TypeVar("T")


@dataclass(frozen=True)
class Joined:
    """What a node said when it was asked to join."""

    partition: int
    status: str
    digest: str
    checkpoint: str
    reason: str


def read_join(message: Message) -> Joined:
    """The answer to ``query.join`` and ``query.mask``. Raises ``RecordError``."""
    record = _record(_records(message.content, CONFIG), CONFIG, ConfigRecord)
    partition = record.get("partition")
    texts = [record.get(key, "") for key in ("status", "digest", "checkpoint", "reason")]
    if isinstance(partition, bool) or not isinstance(partition, int):
        raise RecordError(f"partition: expected a whole number, found {partition!r}")
    if not all(isinstance(text, str) for text in texts):
        raise RecordError("expected texts for status, digest and checkpoint")
    return Joined(partition, *(str(text) for text in texts))


def read_training(
    message: Message, *, client: int, task: str, layout: Layout, digest: str, round: int, most_rows: int
) -> Contribution:
    """A training reply as a contribution.

    ``most_rows``: the rows of the client's shard; a client that claims more would outweigh the others.
    Raises ``EnvelopeError`` (or a subclass) for anything that is not exactly the agreed records.
    """
    content = _records(message.content, ARRAYS, METRICS)
    arrays = _record(content, ARRAYS, ArrayRecord)
    metrics = read_metrics(
        _record(content, METRICS, MetricRecord), required=(EXAMPLES, "train-loss", "steps")
    )
    examples = _examples(metrics, least=1, most=most_rows)
    if metrics["steps"] < 0 or not float(metrics["steps"]).is_integer():
        raise RecordError(f"steps: expected a whole number, found {metrics['steps']!r}")
    change = unpack_update(record_bytes(arrays), layout=layout, digest=digest, round=round)
    return Contribution(client, task, examples, change, metrics)


def read_scores(message: Message, *, most_rows: int) -> dict[str, float]:
    """The metrics of an evaluation reply. Raises ``RecordError``."""
    scalars = _record(_records(message.content, METRICS), METRICS, MetricRecord)
    metrics = read_metrics(scalars, required=(EXAMPLES,))
    _examples(metrics, least=0, most=most_rows)
    return metrics


def _examples(metrics: dict[str, float], least: int, most: int) -> int:
    found = metrics[EXAMPLES]
    if not isinstance(found, int) or not least <= found <= most:
        raise RecordError(f"{EXAMPLES}: expected a whole number from {least} to {most}, found {found!r}")
    return found


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
