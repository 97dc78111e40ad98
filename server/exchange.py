"""Sending messages and collecting the answers, and the one place where bytes are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmask.flower import content_payload_bytes, held_bytes, message_bytes
from fedmask.ledger import Direction, Kind, Ledger, LedgerRow

Status = Literal["ok", "rejected", "failed"]

SURPLUS = "not needed: the round had its replies"
SMALL = 1 << 20
"""No sound reply without values has more bytes."""
Late = dict[str, tuple["Request", int]]
"""Messages of earlier rounds that nobody waits for any more, by their ids, with their rounds."""

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
    down: tuple[int, int] | None  # payload bytes, whole message bytes; None: nothing was sent
    up: tuple[int, int] = (0, 0)
    reply: Message | None = None
    reason: str = ""
    status: Status = "failed"
    message_id: str = ""  # of a message that is still out: its answer may come in a later round

    def fail(self, status: Status, reason: str, most: int = 300) -> None:
        """Mark the answer as one that does not count, and why: in one line, of ``most`` characters."""
        self.status, self.reason, self.reply = status, " ".join(reason.split())[:most], None


Note = Callable[[Direction, Iterable[Answer]], None]


def most_bytes(values: int) -> int:
    """What no sound reply with ``values`` values or indices exceeds: no codec takes 8 bytes for one."""
    return SMALL + 8 * values


def no_note(way: Direction, answers: Iterable[Answer]) -> None:
    """What nobody wants to know."""


def exchange(
    grid: Grid,
    requests: Iterable[Request],
    message_type: str,
    timeout: float,
    arrived: Callable[[Answer], None] | None = None,
    *,
    most: int = SMALL,
    enough: Callable[[], bool] = lambda: False,
    late: Late | None = None,
    note: Note = no_note,
    end: float | None = None,
) -> list[Answer]:
    """Send all requests and wait for the answers, in the order of the requests.

    A request that is not answered within ``timeout`` seconds, or is answered with an error, comes
    back as failed; nothing here raises for what a client does. ``arrived`` is called once a request. A
    second reply to one message is a rejected answer of its own, after all others; so is a reply to one of
    the ``late`` messages, which is taken out of them. No more is waited for once ``enough()``. ``note`` is
    told of all messages before they are sent, and of each reply as it comes, after ``arrived``. A reply of
    more than ``most`` bytes is rejected before anything copies it. ``end``: when (``time.monotonic()``) the
    wait ends that began before these requests; None: ``timeout`` seconds from now.
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
    note("down", answers)
    sent = {str(name) for name in grid.push_messages(messages) if name is not None}
    waiting: dict[str, Answer] = {}
    for message, answer in zip(messages, answers, strict=True):
        name = message.metadata.message_id
        if name in sent:
            waiting[name] = answer
        else:
            answer.down = None
            answer.fail("failed", "the message could not be sent: its node is gone")
            if arrived:
                arrived(answer)
    del messages
    late = {} if late is None else late
    end = time.monotonic() + timeout if end is None else end
    doubles = _collect(grid, waiting, end, arrived, most, enough, late, note)
    reason = SURPLUS if enough() else f"no answer within {timeout:g} s"
    for name, answer in waiting.items():
        answer.fail("failed", reason)
        answer.message_id = name
        if arrived:
            arrived(answer)
    return answers + doubles


def _collect(
    grid: Grid,
    waiting: dict[str, Answer],
    deadline: float,
    arrived: Callable[[Answer], None] | None,
    most: int,
    enough: Callable[[], bool],
    late: Late,
    note: Note,
) -> list[Answer]:
    """Fill in the waiting answers until none is left, there are enough, or the deadline has passed.

    Returns second and late replies.
    """
    answered: dict[str, Answer] = {}
    doubles: list[Answer] = []
    pause = _SHORTEST_PAUSE
    while waiting and time.monotonic() < deadline and not enough():
        looked = time.monotonic()
        replies = list(grid.pull_messages(waiting.keys() | late.keys() if late else waiting.keys()))
        for reply in replies:
            name = reply.metadata.reply_to_message_id
            size, too_large = _weighed(reply, most)
            if name in answered:
                first = answered[name]
                doubles.append(Answer(first.request, first.client, None, size))
                doubles[-1].fail("rejected", "a second reply to one message")
                note("up", doubles[-1:])
                continue
            if name in late:
                request, round = late.pop(name)
                if not reply.has_error():  # an error is what a SuperLink says of a message that is gone
                    doubles.append(Answer(request, request.client, None, size))
                    doubles[-1].fail("rejected", f"a late reply: it answers round {round}")
                    note("up", doubles[-1:])
                continue
            if name not in waiting:  # it answers nothing that was asked here
                continue
            answer = answered[name] = waiting.pop(name)
            answer.up = size
            if reply.has_error():
                answer.fail("failed", reply.error.reason or f"error {reply.error.code}")
            elif too_large:
                answer.fail("rejected", f"expected a reply of at most {most} bytes, found {size[1]}")
            else:
                answer.reply, answer.status = reply, "ok"
            if arrived:
                arrived(answer)
            note("up", [answer])
        pause = _SHORTEST_PAUSE if replies else min(2 * pause, _LONGEST_PAUSE)
        if waiting and not replies:
            # A grid that waits by itself (or a slow link) has used up the pause already.
            now = time.monotonic()
            time.sleep(max(0.0, min(looked + pause, deadline) - now))
    return doubles


def _weighed(reply: Message, most: int) -> tuple[tuple[int, int], bool]:
    """Payload and whole bytes of a reply, and whether these are too many.

    Of one that is too large all counts as no payload, and as it lies in memory: to measure it is to copy it.
    """
    if not reply.has_content():
        return (0, message_bytes([reply])[0]), False
    held = held_bytes(reply.content)
    if held > most:
        return (0, held), True
    return (content_payload_bytes(reply.content), message_bytes([reply])[0]), False


def enter(ledger: Ledger, round: int, kind: Kind, answers: Iterable[Answer]) -> None:
    """Write an answer's ledger rows: what went down, if it did, and what came up (0 bytes for nothing)."""
    for answer in answers:
        if answer.down is not None:
            ledger.add(row_of(round, kind, "down", answer))
        ledger.add(row_of(round, kind, "up", answer))


def row_of(round: int, kind: Kind, way: Direction, answer: Answer) -> LedgerRow:
    """One of an answer's two ledger rows."""
    if way == "down":
        return LedgerRow(round, answer.client, way, kind, *(answer.down or (0, 0)), "ok")
    return LedgerRow(round, answer.client, way, kind, *answer.up, answer.status)
