"""Heads that stay with their clients (``server.sharing = "local-heads"``), in Flower's ``context.state``.

A head is kept as its change from the start that is drawn from the seed. Where the state is lost the client
begins again at that start: the backbone's vector is the server's, so nothing else is lost with it.
"""

from __future__ import annotations

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, Context

from fedmask.flower import bytes_record, record_bytes
from fedmask.workspace import Workspace

HEAD, HEAD_ROUND = "own-head", "own-head-round"
_BEFORE, _AFTER = "before", "after"


def with_own_head(
    workspace: Workspace, context: Context, client: int, received: np.ndarray, round: int
) -> np.ndarray:
    """``received`` (float32 ``[n]``) and behind it the head that the client begins ``round`` with.

    As it is where heads travel. A round that is done again begins with the head that it began with.
    """
    missing = workspace.layout(workspace.task_of(client)).size - received.size
    if not missing:
        return received
    record, noted = context.state.get(HEAD), context.state.get(HEAD_ROUND)
    head = np.zeros(missing, np.float32)
    if isinstance(record, ArrayRecord) and isinstance(noted, ConfigRecord):
        name = _AFTER if int(noted[HEAD_ROUND]) < round else _BEFORE  # type: ignore[arg-type]
        kept = np.frombuffer(record_bytes(ArrayRecord({name: record[name]}), name), "<f4")
        head = kept if kept.size == missing else head
    return np.concatenate([received, head])


def keep_own_head(
    context: Context, round: int, start: np.ndarray, change: np.ndarray, travels: int
) -> np.ndarray:
    """Keep the head of ``start`` + ``change`` (float32 ``[n]``); what of it travels, ``[travels]``."""
    if travels < change.size:
        parts = {_BEFORE: start[travels:], _AFTER: start[travels:] + change[travels:]}
        context.state[HEAD] = ArrayRecord(
            {name: bytes_record(part.tobytes(), name)[name] for name, part in parts.items()}
        )
        context.state[HEAD_ROUND] = ConfigRecord({HEAD_ROUND: round})
    return change[:travels]
