"""Running a study's cells: here, one after the other, or in several processes that each keep a backbone."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from experiments.compare.runner import Task, run_cell
from fedmask.errors import FederationError
from server.record import write_json

_STOPPED = "stopped"
Next = Callable[[], Task | None]


def run_all(next_task: Next, jobs: int) -> Iterator[dict[str, Any]]:
    """Results in the order of their ends. ``next_task()`` gives the next run to begin, or None for now.

    It is asked again after each result, because which runs remain depends on the results so far. A process
    that dies fails its run, which is recorded, and is replaced. Raises ``FederationError`` where the machine
    refuses to go on (see ``run_cell``).
    """
    if jobs <= 1:
        while (task := next_task()) is not None:
            yield run_cell(task)
        return
    pool: list[_Process] = []
    before = _stop_on_request()
    try:
        while True:
            busy = [process for process in pool if process.task is not None]
            while len(busy) < jobs and (task := next_task()) is not None:
                busy.append(_begin(pool, task))
            if not busy:
                return
            ready = wait([process.pipe for process in busy])
            for process in [one for one in busy if one.pipe in ready]:
                yield _result(pool, process)
    finally:
        for process in pool:
            process.end()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _stop_on_request() -> Any:
    """Let SIGTERM end the study as Ctrl-C does, so that no worker is left behind; the handler before.

    None where this is not the main thread, which alone may say what a signal does.
    """
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    return signal.signal(signal.SIGTERM, stop)


class _Process:
    """A worker: started fresh, because a fork would copy PyTorch's threads half-way."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that its death ends the pipe
        self.task: Task | None = None

    def end(self) -> None:
        """Stop it, whatever it is doing: its run goes on the next time."""
        self.pipe.close()
        self.process.terminate()
        self.process.join(5.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _begin(pool: list[_Process], task: Task) -> _Process:
    process = next((one for one in pool if one.task is None), None)
    if process is None:
        process = _Process()
        pool.append(process)
    process.task = task
    with suppress(BrokenPipeError, ConnectionResetError):  # its death shows where its result is awaited
        process.pipe.send(task)
    return process


def _result(pool: list[_Process], process: _Process) -> dict[str, Any]:
    task = process.task
    assert task is not None  # only busy ones are waited for
    try:
        result: dict[str, Any] = process.pipe.recv()
    except (EOFError, OSError):
        process.process.join(5.0)
        code = process.process.exitcode
        pool.remove(process)
        process.end()
        result = {
            "study": task.study,
            "variant": task.cell.variant,
            "lr": task.cell.lr,
            "seed": task.cell.seed,
            "fingerprint": task.fingerprint,
            "settings": dict(task.settings),
            "status": "failed",
            "error": f"the process died (exit code {code})",
        }
        task.target.parent.mkdir(parents=True, exist_ok=True)
        write_json(task.target, result)
    process.task = None
    if result["status"] == _STOPPED:
        raise FederationError(result["error"])
    return result


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it ends the workers itself
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):  # the driver is gone
            return
        try:
            result = run_cell(task)
        except FederationError as error:
            result = {"status": _STOPPED, "error": str(error)}
        with suppress(BrokenPipeError, ConnectionResetError):  # it is in its file, too
            pipe.send(result)
