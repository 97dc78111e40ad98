"""Say that the process of an app is on its way, then become it: ``early.py PROGRAM OPTIONS``.

A SuperLink or SuperNode gives a process that it starts for a task 30 seconds to say that it is there; then it
starts another one beside it. On a busy machine it takes longer than that to import Flower, each further
process makes it slower, and no message is ever answered. This file needs the standard library alone: it says
so at once, and again until Flower's own heartbeats do. The folder ``bin`` beside it, before the real programs
on the PATH, has it started in their place.
"""

import contextlib
import http.client
import os
import ssl
import sys
import time
from collections.abc import Callable, Sequence

_PATH = "/v1/runtime/send-task-heartbeat"
_HEADERS = {"content-type": "application/protobuf", "accept": "application/protobuf"}
_PAUSE, _TIMES = 15.0, 4  # each one counts for a minute: two minutes for importing Flower


def option(name: str, options: Sequence[str]) -> str:
    """The word after ``name``, empty if there is none."""
    found = options.index(name) + 1 if name in options else len(options)
    return options[found] if found < len(options) else ""


def beat(options: Sequence[str], seconds: float = 10.0) -> None:
    """One heartbeat for the task that a Flower program with ``options`` is for; failures are left to it."""
    address, authority = option("--runtime-api-address", options), option("--root-certificates", options)
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        if "--insecure" in options:
            connection = http.client.HTTPConnection(address, timeout=seconds)
        else:
            trusted = ssl.create_default_context(cafile=authority or None)
            connection = http.client.HTTPSConnection(address, timeout=seconds, context=trusted)
        with contextlib.closing(connection):
            token = option("--token", options)
            connection.request("POST", _PATH, body=b"", headers={**_HEADERS, "flwr-task-token": token})
            connection.getresponse().read()


def beat_while(alive: Callable[[], bool], said: Callable[[], None], pause: float = _PAUSE) -> None:
    """Call ``said`` every ``pause`` seconds while ``alive``, but a few times only: Flower's own take over."""
    for _ in range(_TIMES):
        end = time.monotonic() + pause
        while time.monotonic() < end:
            if not alive():
                return
            time.sleep(min(1.0, pause))
        said()


def real_program(called: str, path: str) -> str:
    """The program that ``called`` stands in for: the next one of its name on the PATH."""
    here, name = os.path.split(os.path.realpath(called))
    for folder in path.split(os.pathsep):
        program = os.path.join(folder, name)
        if os.path.realpath(folder) != here and os.access(program, os.X_OK):
            return program
    raise SystemExit(f"{name}: not on the PATH; install flwr")


def main(called: str, options: Sequence[str]) -> None:
    """Beat, leave a child that goes on with it while this process lives, and become the real program."""
    program = real_program(called, os.environ.get("PATH", ""))
    if option("--token", options):
        beat(options)
        parent = os.getpid()
        if os.fork() == 0:
            beat_while(lambda: os.getppid() == parent, lambda: beat(options))
            os._exit(0)
    os.execv(program, [program, *options])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
