"""Answering messages: in this process, or in worker processes that each hold one workspace."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from tqdm import tqdm

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from experiments.wire import Parcel, pack, unpack_message, unpack_state
from fedmask.config import RunConfig, from_json
from fedmask.errors import FedmaskError
from fedmask.shared import SharedBackbone, load_shared
from fedmask.workspace import get_workspace

MakeApp = Callable[[RunConfig], ClientApp]
APP_RAISED = 2  # Flower's code for an exception inside the ClientApp


class Job(NamedTuple):
    """One message for one node, with the state that the node kept (None: empty)."""

    message: Parcel
    node: int
    partition: int
    partitions: int
    state: Parcel | None


class Done(NamedTuple):
    """What came of a job: the reply, and the state that the node keeps now."""

    job: Job
    reply: Parcel
    state: Parcel | None


def answer(app: ClientApp, job: Job) -> Done:
    """Run the app on one message. An exception becomes an error reply with its type and text."""
    message = unpack_message(job.message)
    context = Context(
        run_id=message.metadata.run_id,
        node_id=job.node,
        node_config={"partition-id": job.partition, "num-partitions": job.partitions},
        state=unpack_state(job.state),
        run_config={},
    )
    try:
        reply = app(message, context)
    except Exception as error:  # whatever a client does, the round goes on
        return Done(job, _error(message, f"{type(error).__name__}: {error}"), job.state)
    state = pack([context.state])[0] if len(context.state) else None
    return Done(job, _packed(reply), state)


def failure(job: Job, reason: str) -> Done:
    """An error reply in the name of a client that cannot answer any more."""
    return Done(job, _error(unpack_message(job.message), reason), job.state)


def _error(message: Message, reason: str) -> Parcel:
    return _packed(Message(Error(code=APP_RAISED, reason=" ".join(reason.split())[:500]), reply_to=message))


def _packed(reply: Message) -> Parcel:
    reply.metadata.__dict__["_message_id"] = f"reply-{reply.metadata.reply_to_message_id}"
    return pack([reply])[0]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | None = None


class Workers:
    """``count`` processes, each with one ClientApp and one workspace, started fresh (never forked).

    They share the memory of the backbone that this process has loaded; each has its own copy of the pages
    that it writes to. A process that dies takes one job with it, which gets an error reply, and is replaced.
    Start methods that fork would copy PyTorch's threads half-way; so the main module of a script must be
    importable without side effects (``if __name__ == "__main__":``).
    """

    def __init__(self, count: int, config: RunConfig, make_app: MakeApp) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._arguments = (config.model_dump_json(), make_app)
        self._workers: list[_Worker] = []
        self._shared: SharedBackbone | None = None
        try:
            for _ in range(count):
                self._workers.append(self._start())
            self._shared = _share_backbone(config)  # while the processes import what they need
            for worker in self._workers:
                self._send_backbone(worker)
        except BaseException:
            self.close()
            raise

    def free(self) -> int:
        """How many jobs could be taken now."""
        return sum(worker.job is None for worker in self._workers)

    def submit(self, job: Job) -> None:
        """Give a job to a free worker."""
        worker = next(worker for worker in self._workers if worker.job is None)
        worker.job = job
        # A worker that died while idle shows in `finished`, which gives the job its error reply.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.pipe.send(job)

    def finished(self, timeout: float) -> list[Done]:
        """Jobs that ended, waiting at most ``timeout`` seconds for the first."""
        busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        return [
            self._receive(busy[pipe]) for pipe in wait(list(busy), timeout) if isinstance(pipe, Connection)
        ]

    def _receive(self, worker: _Worker) -> Done:
        job = worker.job
        assert job is not None  # only busy workers are waited for
        try:
            reply, state = worker.pipe.recv()
            worker.job = None
            return Done(job, reply, state)
        except (EOFError, OSError):
            worker.process.join(5.0)
            code = worker.process.exitcode
            fresh = self._workers[self._workers.index(worker)] = self._start()
            self._send_backbone(fresh)
            _stop(worker)
            return failure(job, f"the worker process died (exit code {code})")

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, *self._arguments), name="fedmask-worker", daemon=True
        )
        process.start()
        theirs.close()  # so that its death ends the pipe
        return _Worker(process, ours)

    def _send_backbone(self, worker: _Worker) -> None:
        # As with jobs: that a worker has died shows when its answer is waited for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.pipe.send(self._shared is not None)
            if self._shared is not None:
                reduction.send_handle(worker.pipe, self._shared.descriptor, worker.process.pid)

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            _stop(worker)
        self._workers = []


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.terminate()
    worker.process.join(5.0)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    worker.process.close()


def _share_backbone(config: RunConfig) -> SharedBackbone | None:
    """The backbone for all processes, this one included; None where each must load its own."""
    if not hasattr(reduction, "send_handle") or not hasattr(socket, "AF_UNIX"):
        return None
    try:
        workspace = get_workspace(config)
        shared = SharedBackbone(workspace.backbone)
    # Settings that are wrong are reported by the server; models of unusual make cannot be pickled.
    except (FedmaskError, pickle.PicklingError, AttributeError, TypeError):
        return None
    workspace.use_backbone(load_shared(shared.descriptor))
    return shared


def _receive_backbone(pipe: Connection, config: RunConfig) -> None:
    """Take over what the driver shares; without it the workspace loads the backbone itself."""
    import transformers  # noqa: F401  (slow; meanwhile the driver loads the backbone)

    if not pipe.recv():
        return
    descriptor = reduction.recv_handle(pipe)
    try:
        get_workspace(config).use_backbone(load_shared(descriptor))
    finally:
        os.close(descriptor)


def _serve(pipe: Connection, config_json: str, make_app: MakeApp) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it ends the workers itself
    # Progress bars of other libraries share a lock between processes, which one that is ended would leak.
    tqdm.set_lock(threading.RLock())
    config = from_json(config_json)
    app = make_app(config)
    # The mask is derived while the driver still prepares; what is wrong is said by the first answer.
    with contextlib.suppress(Exception):
        _receive_backbone(pipe, config)
        _ = get_workspace(config).digest
    for job in _jobs(pipe):
        done = answer(app, job)
        pipe.send((done.reply, done.state))


def _jobs(pipe: Connection) -> Iterator[Job]:
    while True:
        try:
            yield pipe.recv()
        except (EOFError, OSError):  # the driver is gone
            return
