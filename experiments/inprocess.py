"""A Flower Grid in one process: no SuperLink, no Ray, the same apps and the same messages.

Every message is really serialized and read again, so client and server share no objects and the bytes
counted are the bytes of any other engine. A client at rest is one number; what it keeps between messages
stands in ``experiments.states``.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Iterable, Set
from typing import Any

import torch

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from clients.app import make_client_app
from experiments.states import States
from experiments.wire import pack, unpack_message
from experiments.workers import Done, Job, MakeApp, Workers, answer
from fedmask.config import RunConfig
from fedmask.flower import ensure_identity

_WAIT_SECONDS = 0.5
_WORK_SECONDS = 0.02


class InProcessGrid(Grid):
    """All clients of a run, answered by this process (``workers`` <= 1) or by ``workers`` processes.

    Use as a context manager: the processes start at once, in the background, and end with it. The
    result does not depend on the number of workers, to the last bit. ``make_app(config)`` builds the
    ClientApp; with processes it must be importable by name.
    """

    def __init__(self, config: RunConfig, workers: int = 1, make_app: MakeApp = make_client_app) -> None:
        ensure_identity()
        self.config = config
        self._partitions = {_node_id(partition): partition for partition in range(config.clients)}
        self._make_app = make_app
        self._app: ClientApp | None = None
        self._count = itertools.count(1)
        self._queue: deque[tuple[str, float, Job]] = deque()
        self._ready: dict[str, Message] = {}
        self.states = States()
        self._run: Any = None
        self._workers = Workers(workers, config, make_app) if workers > 1 else None

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def get_node_ids(self) -> Iterable[int]:
        """The ids of all nodes. They look random, as a SuperLink's do, but are the same in every run."""
        return sorted(self._partitions)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Serialize and queue messages; those for unknown nodes are left out."""
        known = []
        for message in messages:
            if message.metadata.dst_node_id in self._partitions:
                # Of one length, so that a message's bytes do not depend on how many went before.
                message.metadata.__dict__["_message_id"] = f"message-{next(self._count):012d}"
                known.append(message)
        for message, parcel in zip(known, pack(known), strict=True):
            node = message.metadata.dst_node_id
            expires = message.metadata.created_at + message.metadata.ttl
            job = Job(parcel, node, self._partitions[node], len(self._partitions), None)
            self._queue.append((parcel.message_id, expires, job))
        return [message.metadata.message_id for message in known]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there. Without processes, this is where queued messages are answered."""
        # Whoever waits for thousands passes a set (or a dict's keys), which must not be copied each time.
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        if not any(name in wanted for name in self._ready):
            self._work()
        found = [name for name in self._ready if name in wanted]
        return [self._ready.pop(name) for name in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and pull until all have answered or ``timeout`` seconds are over."""
        waiting = set(self.push_messages(list(messages)))
        end = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and time.monotonic() < end:
            new = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in new}
            replies += new
        return replies

    def set_run(self, run: Any) -> None:
        """Flower's bookkeeping; nothing here depends on it."""
        self._run = run

    @property
    def run(self) -> Any:
        """What ``set_run`` was given."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Part of Flower's interface; ``Message(...)`` does the same."""
        return Message(
            content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl
        )

    def _work(self) -> None:
        """Answer a message (or as many quick ones as ``_WORK_SECONDS`` allow), or keep the processes busy."""
        if self._workers is None:
            until = time.monotonic() + _WORK_SECONDS
            while (job := self._next()) is not None:
                self._keep(self._answer_here(job))
                if time.monotonic() >= until:
                    break
            return
        while self._workers.free() and (job := self._next()) is not None:
            self._workers.submit(job)
        for done in self._workers.finished(_WAIT_SECONDS):
            self._keep(done)
        while self._workers.free() and (job := self._next()) is not None:
            self._workers.submit(job)

    def _next(self) -> Job | None:
        while self._queue:
            _, expires, job = self._queue.popleft()
            if time.time() < expires:
                return job._replace(state=self.states.get(job.node))
        return None

    def _answer_here(self, job: Job) -> Done:
        if self._app is None:
            self._app = self._make_app(self.config)
        threads = torch.get_num_threads()  # the app sets its own number; the driver keeps its own
        try:
            return answer(self._app, job)
        finally:
            torch.set_num_threads(threads)

    def _keep(self, done: Done) -> None:
        reply = unpack_message(done.reply)
        self._ready[reply.metadata.reply_to_message_id] = reply
        self.states.put(done.job.node, done.state)


def _node_id(partition: int) -> int:
    return int.from_bytes(hashlib.sha256(f"node {partition}".encode()).digest()[:7], "little")
