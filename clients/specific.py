"""A client's own part in a task-specific mask: scores of its rows, as the server asks for them."""

from __future__ import annotations

import time

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ConfigRecord, RecordDict

from fedmask.errors import unknown
from fedmask.flower import ARRAYS, CONFIG, MASK, SECONDS, RecordError, bytes_record
from fedmask.masks import Mask, pack_top_scores, pack_votes
from fedmask.workspace import Workspace

_KINDS = ("scores", "votes")


def own_scores(workspace: Workspace, partition: int, kind: str) -> RecordDict:
    """The answer to ``query.scores``: this client's best entries, with their scores or without."""
    if kind not in _KINDS or workspace.rule is None:
        raise RecordError(unknown("kind of scores", kind, _KINDS))
    began, rule = time.monotonic(), workspace.rule
    scores = workspace.scores(rule.name, partition)
    data = pack_votes(scores.mask(rule)) if kind == "votes" else pack_top_scores(scores, rule)
    return RecordDict(
        {
            ARRAYS: bytes_record(data, MASK),
            CONFIG: ConfigRecord({SECONDS: time.monotonic() - began}),
        }
    )


def own_mask(workspace: Workspace, partition: int) -> tuple[Mask, float]:
    """The mask that this client finds on its own rows, and the seconds that it took."""
    if workspace.rule is None:
        raise RecordError(f"method {workspace.config.method!r} has no mask to find")
    began, rule = time.monotonic(), workspace.rule
    return workspace.scores(rule.name, partition).mask(rule), time.monotonic() - began
