"""A process that Flower starts for a task says at once that it is there, whatever importing Flower takes."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from clients import early

Said = list[tuple[str, dict[str, str], bytes]]
BIN = Path(early.__file__).parent / "bin"


@pytest.fixture
def runtime() -> Iterator[tuple[str, Said]]:
    """Address of a server that takes everything, and what it was told."""
    said: Said = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            said.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", said
        server.shutdown()
        thread.join()


def test_it_says_what_flower_would_say(runtime: tuple[str, Said]) -> None:
    address, said = runtime
    flower = RuntimeHttpClient.from_server_address(address, True, None, [RuntimeTokenHttpInterceptor("abc")])
    flower.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    flower.close()
    early.beat(["--runtime-api-address", address, "--token", "abc", "--insecure"])
    (path, theirs, body), ours = said
    assert (ours[0], ours[2]) == (path, body)
    for name in ("content-type", "accept", "flwr-task-token"):
        assert ours[1][name] == theirs[name]


@pytest.mark.parametrize("name", ["flwr-clientapp", "flwr-serverapp"])
def test_the_program_in_its_place_starts_the_real_one(
    runtime: tuple[str, Said], tmp_path: Path, name: str
) -> None:
    address, said = runtime
    (tmp_path / name).write_text('#!/bin/sh\necho "real $*"\nexit 7\n')
    (tmp_path / name).chmod(0o755)
    options = ["--runtime-api-address", address, "--token", "abc", "--insecure", "--parent-pid", "1"]
    path = os.pathsep.join([str(BIN), str(tmp_path), os.environ["PATH"]])
    done = subprocess.run([name, *options], env={"PATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, f"real {' '.join(options)}\n")
    assert [one[1]["flwr-task-token"] for one in said] == ["abc"]


def test_a_link_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    early.beat(["--runtime-api-address", "127.0.0.1:9", "--token", "abc", "--insecure"])
    early.beat(["--runtime-api-address", "127.0.0.1:9", "--token", "abc"], seconds=1.0)
    with pytest.raises(SystemExit, match="flwr-clientapp: not on the PATH"):
        early.real_program(str(BIN / "flwr-clientapp"), f"{BIN}:{tmp_path}")


def test_it_goes_on_while_the_process_lives_but_not_for_ever() -> None:
    said: list[int] = []
    # So long that the process is never stopped for all of a pause, and looks at ``alive`` in each.
    early.beat_while(lambda: len(said) < 3, lambda: said.append(1), pause=0.2)
    assert len(said) == 3
    early.beat_while(lambda: True, lambda: said.append(1), pause=0.001)
    assert 3 < len(said) < 50
