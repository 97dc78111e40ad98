"""Sending messages and collecting the answers, and the one place where bytes are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmask.flower import content_payload_bytes, message_bytes
from fedmask.ledger import Ledger, LedgerRow

Kind = Literal["mask", "train", "evaluate"]
Status = Literal["ok", "rejected", "failed"]

# Flower's own send_and_receive sleeps 3 seconds between looks; a round of small updates is faster.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5


@dataclass(frozen=True)
class Request:
    """One message to send. ``client`` is the partition, -1 while nobody knows it yet."""

    node: int
    client: int
    content: RecordDict


@dataclass
class Answer:
    """What came of a request: a reply with content, or ``reply`` None and the reason.

    ``client`` and ``status`` are for the caller to fill in when only the content tells them.
    """

    request: Request
    client: int
    down: tuple[int, int]  # payload bytes, whole message bytes
    up: tuple[int, int] = (0, 0)
    reply: Message | None = None
    reason: str = ""
    status: Status = "failed"

    def fail(self, status: Status, reason: str) -> None:
        """Mark the answer as one that does not count, and why."""
        self.status, self.reason, self.reply = status, " ".join(reason.split())[:300], None


def exchange(
    grid: Grid,
    requests: Iterable[Request],
    message_type: str,
    timeout: float,
    arrived: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Send all requests and wait for the answers, in the order of the requests.

    A request that is not answered within ``timeout`` seconds, or is answered with an error, comes
    back as failed; nothing here raises for what a client does. ``arrived`` is called once an answer.
    A second reply to one message is ignored.
    """
    asked = list(requests)
    messages = [
        Message(request.content, dst_node_id=request.node, message_type=message_type, ttl=timeout + 60.0)
        for request in asked
    ]
    # Clients of one task share their content, so it is read once a task and not once a client.
    contents = {id(request.content): request.content for request in asked}
    payloads = {key: content_payload_bytes(content) for key, content in contents.items()}
    answers = [
        Answer(request, request.client, (payloads[id(request.content)], size))
        for request, size in zip(asked, message_bytes(messages), strict=True)
    ]
    sent = {str(name) for name in grid.push_messages(messages) if name is not None}
    waiting: dict[str, Answer] = {}
    for message, answer in zip(messages, answers, strict=True):
        name = message.metadata.message_id
        if name in sent:
            waiting[name] = answer
        else:
            answer.down = (0, 0)
            answer.fail("failed", "the message could not be sent: its node is gone")
            if arrived:
                arrived(answer)
    del messages
    _collect(grid, waiting, time.monotonic() + timeout, arrived)
    for answer in waiting.values():
        answer.fail("failed", f"no answer within {timeout:g} s")
        if arrived:
            arrived(answer)
    return answers


def _collect(
    grid: Grid, waiting: dict[str, Answer], deadline: float, arrived: Callable[[Answer], None] | None
) -> None:
    pause = _SHORTEST_PAUSE
    while waiting and time.monotonic() < deadline:
        looked = time.monotonic()
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            answer = waiting.pop(reply.metadata.reply_to_message_id, None)
            if answer is None:  # the second reply to one message
                continue
            payload = content_payload_bytes(reply.content) if reply.has_content() else 0
            answer.up = (payload, message_bytes([reply])[0])
            if reply.has_error():
                answer.fail("failed", reply.error.reason or f"error {reply.error.code}")
            else:
                answer.reply, answer.status = reply, "ok"
            if arrived:
                arrived(answer)
        pause = _SHORTEST_PAUSE if replies else min(2 * pause, _LONGEST_PAUSE)
        if waiting and not replies:
            # A grid that waits by itself (or a slow link) has used up the pause already.
            now = time.monotonic()
            time.sleep(max(0.0, min(looked + pause, deadline) - now))


def enter(ledger: Ledger, round: int, kind: Kind, answers: Iterable[Answer]) -> None:
    """Write two ledger rows an answer: what went down and what came up (0 bytes when nothing did)."""
    for answer in answers:
        unsent: Status = "ok" if answer.down[1] else "failed"
        ledger.add(LedgerRow(round, answer.client, "down", kind, *answer.down, unsent))
        ledger.add(LedgerRow(round, answer.client, "up", kind, *answer.up, answer.status))
