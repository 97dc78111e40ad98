"""A proxy between SuperNodes and SuperLink that counts what crosses, by Flower's request."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping

Wire = Mapping[tuple[str, str], int]
"""(name of the request, ``up`` or ``down``) -> bytes; (name, ``requests``) -> how many."""

_REQUEST = re.compile(rb"^[A-Z]+ /\S*?([^/\s]+) HTTP/1\.1\r\n")


class CountingProxy:
    """Passes TCP connections on to a port of this machine and counts the bytes in each direction.

    ``up``: from those who connect (SuperNodes) to the port (the SuperLink). HTTP's lines and headers are
    counted, those of TCP and IP are not. One connection carries one request at a time, so whatever crosses
    belongs to the request that began last.
    """

    def __init__(self, to: int) -> None:
        self._to = to
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def counted(self) -> Wire:
        """Bytes so far."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Cut every connection and wait until nothing is left."""
        for end in (self._server, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it
            end.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:  # not there yet: whoever asked asks again
                near.close()
                continue
            self._ends += [near, far]
            asked = [""]
            for way, source, goal in (("up", near, far), ("down", far, near)):
                self._start(self._pass, way, source, goal, asked)

    def _pass(self, way: str, source: socket.socket, goal: socket.socket, asked: list[str]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                begun = _REQUEST.match(data) if way == "up" else None
                if begun:
                    asked[0] = begun[1].decode()
                with self._lock:
                    self._counts[asked[0], way] += len(data)
                    self._counts[asked[0], "requests"] += begun is not None
                goal.sendall(data)
        for end in (source, goal):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
