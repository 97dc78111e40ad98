"""Flower's program for a task with a clock in it: ``clocked.py NOTES PROGRAM OPTIONS``.

``experiments.benchmarks.linked`` has it started in place of ``flwr-clientapp`` and ``flwr-serverapp``. It
does what they do, and adds lines of JSON to the file NOTES: when a message was sent and its reply was there
(server app), when each part of a message's way through its process ended (client app), and the process's peak
memory. Times are seconds since 1970, so that those of several processes of one machine can be compared.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

PROGRAMS = {
    "flwr-clientapp": "flwr.supernode.cli.flwr_clientapp",
    "flwr-serverapp": "flwr.superlink.cli.flwr_serverapp",
}


def began() -> float:
    """When this process was created: all that it imported until now counts. Linux only, to 10 ms."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def then(function: Callable[..., Any], after: Callable[[Any], None]) -> Callable[..., Any]:
    """``function``, whose result is shown to ``after`` as soon as it is there."""

    def both(*given: Any, **named: Any) -> Any:
        result = function(*given, **named)
        after(result)
        return result

    return both


def clock_client(note: Callable[..., None]) -> None:
    """Note the parts of a message's way through a client app's process, once its reply is pushed."""
    from flwr.clientapp import ClientApp

    own: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    marks: dict[str, Any] = {"began": began(), "entered": time.time()}

    def pulled(found: tuple[Any, ...]) -> None:
        meta = found[0].metadata
        marks.update(pulled=time.time(), message=meta.message_id, kind=meta.message_type)

    call = ClientApp.__call__

    def work(self: ClientApp, *given: Any, **named: Any) -> Any:
        marks["loaded"] = time.time()
        try:
            return call(self, *given, **named)
        finally:
            marks["worked"] = time.time()

    own.pull_task_input = then(own.pull_task_input, pulled)
    own.push_message = then(own.push_message, lambda _: note(**marks, pushed=time.time()))
    ClientApp.__call__ = work  # type: ignore[method-assign]


def clock_server(note: Callable[..., None]) -> None:
    """Note when a server app sends a message, and when its reply is there."""
    from flwr.superlink.grid.http_grid import HttpGrid

    push, pull = HttpGrid.push_messages, HttpGrid.pull_messages

    def push_messages(self: HttpGrid, messages: Iterable[Any]) -> Iterable[str]:
        now = time.time()
        names = list(push(self, messages))
        note(sent=names, at=now)
        return names

    def pull_messages(self: HttpGrid, message_ids: Iterable[str]) -> Iterable[Any]:
        found = list(pull(self, message_ids))
        for reply in found:
            note(got=reply.metadata.reply_to_message_id, at=time.time())
        return found

    HttpGrid.push_messages = push_messages  # type: ignore[method-assign]
    HttpGrid.pull_messages = pull_messages  # type: ignore[method-assign]


def main(notes: str, program: str, options: list[str]) -> None:
    """Set the clock, and do as Flower's program."""

    def note(**line: Any) -> None:
        with open(notes, "a", encoding="utf-8") as file:  # one short write a line: processes do not mix
            file.write(json.dumps({"program": program, **line}) + "\n")

    atexit.register(lambda: note(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    command = getattr(importlib.import_module(PROGRAMS[program]), program.replace("-", "_"))
    (clock_client if program == "flwr-clientapp" else clock_server)(note)
    sys.argv = [program, *options]
    command()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
