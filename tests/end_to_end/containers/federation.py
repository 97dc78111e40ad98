"""A compose project to run and to break, and the same run in process to compare it with."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedmask.config import from_dict
from server.app import RunResult
from server.journal import JOURNAL
from tests.apps.grids import TamperedGrid, only, run_on
from tests.support import WORDS, save_checkpoint, save_task

ROOT = Path(__file__).parents[3]
PROJECT = "fedmask-test"
CLIENTS = 4
# Two clients share a file that the server reads too; two have files of their own, with other columns.
TINY = """
model = "/data/model"
density = 0.02
kernel = "dense"
partition = {kind = "iid", held_out = 0.0}
train = {steps = 2, batch_size = 8, max_tokens = 16}
overlap_batches = 0

[[tasks]]
name = "mood"
source = "/data/mood.tsv"
text = ["text"]
label = "label"
clients = 2

[[tasks]]
name = "own"
own_data = true
text = ["text"]
label = "label"
labels = ["up", "down"]
dev = "/data/dev.csv"
clients = 2
"""
# Names the client's app as the first to go, then takes memory until it has gone.
_EXHAUST = """
import sys
from pathlib import Path

name = b"flwr-" + b"clientapp"  # not in one piece, or this program would find itself
found = [path for path in Path("/proc").glob("[0-9]*") if name in (path / "cmdline").read_bytes()]
for path in found:
    (path / "oom_score_adj").write_text("1000")

def lives(path):
    return path.exists() and (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"

held = []
while any(map(lives, found)):
    if len(held) > 400:
        sys.exit("nothing was killed")
    held.append(b"x" * 2**22)
sys.exit(0 if found else "no app")
"""
OWN = {"FEDMASK_TEXT": "words", "FEDMASK_LABEL": "verdict"}
OWN_FILE = "client-{client}.jsonl"


def write_data(place: Path) -> None:
    """In a new folder: ``TINY`` as tiny.toml and all that it names, and room for runs."""
    folder = place / "data"
    for new in (place / "runs", folder):
        new.mkdir()
    place.chmod(0o755)
    folder.chmod(0o755)
    save_checkpoint(folder / "model")
    save_task(folder / "mood.tsv", ("no", "yes"), rows=240, seed=1)
    said = {0: "up", 1: "down"}
    for client in range(CLIENTS):
        rows = [{"words": f"{WORDS[row % 2]} {WORDS[5 + (row * client) % 40]}", "verdict": said[row % 2]}
                for row in range(60)]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / OWN_FILE.format(client=client)).write_text(lines)
    dev = "".join(f"{WORDS[row % 2]} {WORDS[50 - row % 30]},{said[row % 2]}\n" for row in range(80))
    (folder / "dev.csv").write_text("text,label\n" + dev)
    (folder / "tiny.toml").write_text(TINY)
    for path in folder.rglob("*"):  # for the containers' user, too
        path.chmod(0o755 if path.is_dir() else 0o644)


class Follower:
    """A run that a container submitted, with the lines of its log."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self._new.put(line.rstrip())
        self._new.put(None)

    def wait_for(self, text: str, seconds: float = 300.0) -> None:
        """Read on until a line holds ``text``. AssertionError if the run ends or time is over before."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {text!r} within {seconds} s: {self.lines[-20:]}") from None
            assert line is not None, f"the run ended without {text!r}: {self.lines[-20:]}"
            self.lines.append(line)
            if text in line:
                return

    def end(self, seconds: float = 300.0) -> int:
        """The exit code, once the run has ended."""
        end = time.monotonic() + seconds
        while (line := self._new.get(timeout=max(0.1, end - time.monotonic()))) is not None:
            self.lines.append(line)
        return self.process.wait(max(0.1, end - time.monotonic()))


class Containers:
    """``docker compose`` over the project's own files, with four clients and what ``write_data`` wrote."""

    def __init__(self, engine: Mapping[str, str], folder: Path) -> None:
        self.runs, self.data = folder / "runs", folder / "data"
        self._command = [*engine["COMPOSE"].split(), "-p", PROJECT]
        self._env = {**engine, "RUNS": str(self.runs), "DATA": str(self.data), "TAG": "test",
                     "CLIENTS": str(CLIENTS), "FEDMASK_DATA": f"/data/{OWN_FILE}", **OWN}  # fmt: skip
        if "PIP_FIND_LINKS" in engine and engine["PIP_FIND_LINKS"].startswith("/"):
            self._env["PIP_FIND_LINKS"] = ""  # a folder of this machine, which a build does not see

    def compose(self, *words: str, check: bool = True, minutes: float = 2) -> str:
        """Run a compose command; its output."""
        return self._run([*self._command, *words], check, minutes)

    def docker(self, *words: str, check: bool = True) -> str:
        """Run a docker command; its output."""
        return self._run(["docker", *words], check, 1)

    def _run(self, words: list[str], check: bool, minutes: float) -> str:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * minutes,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout[-3000:]}"
        return done.stdout

    def start_run(self, *options: str) -> Follower:
        """``docker compose run --rm run OPTIONS``, as a user types it."""
        process = subprocess.Popen(
            [*self._command, "run", "--rm", "-T", "run", *options],
            cwd=ROOT,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Follower(process)

    def ids(self, service: str) -> list[str]:
        """The ids of a service's containers."""
        return self.compose("ps", "-q", service).split()

    def client_of(self, seat: int, run: str) -> str:
        """The container of the client that holds a partition in the run ``run``."""
        for name in self.ids("client"):
            file = f"/state/seats/{name[:12]}.json"
            said = self.docker("exec", name, "cat", file)
            if json.loads(said).get(run) == seat:
                return name
        raise AssertionError(f"no client holds partition {seat}")

    def cut(self, container: str) -> None:
        """Take a container off the network, still running: one that is just restarted, when it is there."""
        words = ["network", "disconnect", f"{PROJECT}_default", container]
        until(lambda: "Error" not in self.docker(*words, check=False), 60, "off the network", pause=0.3)

    def heal(self, container: str, service: str) -> None:
        """The inverse of ``cut``."""
        words = ["network", "connect", "--alias", service, f"{PROJECT}_default", container]
        until(lambda: "Error" not in self.docker(*words, check=False), 60, "on the network", pause=0.3)

    def crash(self, container: str) -> None:
        """Kill all that runs in a container; its restart policy starts it again."""
        self.docker("exec", container, "sh", "-c", "kill -9 -1", check=False)

    def hold(self, container: str) -> None:
        """Stop all that runs in a container, without an end: ``docker pause`` fails on busy machines."""
        self.docker("exec", container, "sh", "-c", "kill -STOP -1", check=False)

    def go_on(self, container: str) -> None:
        """The inverse of ``hold``."""
        self.docker("exec", container, "sh", "-c", "kill -CONT -1", check=False)

    def apps(self, container: str) -> dict[int, int]:
        """Pid and kilobytes of each client's app in a container."""
        lines = self.docker("top", container, "-o", "pid,rss,args", check=False).splitlines()
        found = [line.split()[:2] for line in lines if "flwr-clientapp" in line]
        return {int(pid): int(size) for pid, size in found}

    def exhaust_memory(self, container: str, gone: Iterable[int]) -> None:
        """Let the kernel kill a client's next app at its container's limit of memory, while it works.

        ``gone``: apps that have had their message. All stands still until it is done, so that no machine is
        too fast for it or too slow.
        """

        def app_has_loaded() -> bool:
            return any(size > 200_000 for app, size in self.apps(container).items() if app not in gone)

        until(app_has_loaded, 60, "the client's app at work", pause=0.1)
        self.hold(container)
        files = "/sys/fs/cgroup/memory.current /sys/fs/cgroup/memory/memory.usage_in_bytes"
        used = int(self.docker("exec", container, "sh", "-c", f"cat {files} 2>/dev/null || true"))
        size = f"{used + 2**26}b"
        self.docker("update", "--memory", size, "--memory-swap", size, container)
        while app_has_loaded():  # the kernel may take the program that takes the memory as well
            self.docker("exec", container, "python", "-IS", "-c", _EXHAUST, check=False)
        self.docker("update", "--memory", "1536m", "--memory-swap", "1536m", container)
        self.go_on(container)

    def out_of_memory(self, container: str, since: float) -> int:
        """How many of a container's processes the kernel killed at its limit of memory since a time."""
        window = ["--since", str(int(since)), "--until", str(int(time.time()) + 1)]
        chosen = ["--filter", "event=oom", "--filter", f"container={container}"]
        return len(self.docker("events", *window, *chosen).splitlines())

    def wait_for_message(self, container: str, kind: str, count: int, seconds: float = 60.0) -> None:
        """Until a client has received so many messages of a kind."""
        text = f"Receiving: {kind} message"
        until(lambda: self.docker("logs", container).count(text) >= count, seconds, f"{count} {text}")

    def is_healthy(self, container: str) -> bool:
        """What the container's health check says."""
        return self.docker("inspect", "-f", "{{.State.Health.Status}}", container).strip() == "healthy"

    def wait_for_traffic(self, run: str, round: int, client: int, way: str, seconds: float = 60.0) -> None:
        """Until the server has sent a client its training in an open round, or heard it: ``down``, ``up``."""
        journal = self.runs / run / JOURNAL

        def noted() -> bool:
            rows = journal.read_text().splitlines()[1:] if journal.is_file() else []
            whole = [json.loads(row) for row in rows if row.endswith("]")]
            return any(row[:4] == [round, client, way, "train"] for row in whole)

        until(noted, seconds, f"round {round}, client {client}, {way}", pause=0.1)

    def own_data(self) -> dict[str, str]:
        """The environment by which clients find their own files, for this machine."""
        return {**OWN, "FEDMASK_DATA": str(self.data / OWN_FILE)}

    def record(self, run: str) -> dict[str, Any]:
        """The run's ``config.json``."""
        found: dict[str, Any] = json.loads((self.runs / run / "config.json").read_text())
        return found

    def summary(self, run: str) -> dict[str, Any]:
        """The run's ``summary.json``."""
        found: dict[str, Any] = json.loads((self.runs / run / "summary.json").read_text())
        return found

    def rows(self, run: str, name: str) -> list[dict[str, Any]]:
        """The objects of one of the run's JSONL files."""
        lines = (self.runs / run / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def again_in_process(self, run: str, folder: Path) -> RunResult:
        """The same run in this process, over the replies that counted in the containers and no others."""
        counted = {row["round"]: set(row["replied"]) for row in self.rows(run, "rounds")}
        config = self.record(run)["config"]
        said = json.dumps({**config, "name": run, "runs_dir": str(folder), "workers": 1})
        settings = json.loads(said.replace('"/data/', f'"{self.data}/'))

        return run_on(TamperedGrid(from_dict(settings), only(counted)))


def until(condition: Callable[[], bool], seconds: float, what: str, pause: float = 1.0) -> None:
    """Wait for ``condition``; AssertionError after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(pause)
