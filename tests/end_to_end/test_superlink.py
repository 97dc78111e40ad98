"""A run over a real SuperLink and two real SuperNodes on this machine, and a run that fails there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from experiments.engines import run_inprocess, run_superlink
from fedmask.config import RunConfig, from_dict
from fedmask.errors import ConfigError, FederationError
from tests.support import save_two_tasks

SCRIPTS = Path(sysconfig.get_path("scripts"))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _start(home: Path, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with (home / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [str(SCRIPTS / arguments[0]), *arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=home,
            env=env,
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: it leads a session of its own."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(15)


def _members(home: Path) -> list[int]:
    """Processes that carry this test's FLWR_HOME, besides this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={home}".encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
    return found


@pytest.fixture
def superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """FLWR_HOME of a SuperLink with two SuperNodes; nothing of them is left afterwards."""
    home = tmp_path / "flower"
    home.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(home))
    port = _free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    here = ["--insecure", "--host", "127.0.0.1", "--port"]
    started = [_start(home, "link", ["flower-superlink", *here, str(port)])]
    try:
        for node in range(2):
            place = ["--node-config", f"partition-id={node} num-partitions=2"]
            arguments = [
                "flower-supernode",
                *here,
                str(_free_port()),
                "--superlink",
                f"127.0.0.1:{port}",
                *place,
            ]
            started.append(_start(home, f"node-{node}", arguments))
        _wait_for(f"http://127.0.0.1:{port}/health")
        yield home
    except BaseException:
        for log in sorted(home.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")
        raise
    finally:
        for process in reversed(started):
            _stop(process)
        deadline = time.monotonic() + 20
        while _members(home) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert _members(home) == []


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(address).status_code == 200:
                return
        assert time.monotonic() < deadline, f"{address} does not answer"
        time.sleep(0.2)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    save_two_tasks(tmp_path)
    return from_dict(
        {
            "name": "remote",
            "model": str(tmp_path / "model"),
            "density": 0.02,
            "rounds": 1,
            "precision": "auto",  # each message is a new process there, and must know the choice
            "workers": 1,
            "tasks": [
                {
                    "name": name,
                    "source": str(tmp_path / f"{name}.tsv"),
                    "text": ["text"],
                    "label": "label",
                    "clients": 1,
                }
                for name in ("mood", "topic")
            ],
            "partition": {"kind": "iid"},
            "train": {"steps": 2, "batch_size": 8, "max_tokens": 16},
            "runs_dir": str(tmp_path / "runs"),
        }
    )


def test_what_flwr_puts_in_a_box_becomes_one_plain_line(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(
        f'[superlink.gone]\naddress = "127.0.0.1:{_free_port()}"\ninsecure = true\n'
    )
    log: list[str] = []
    with pytest.raises(
        ConfigError, match=r"--connection: .*'nowhere' not found .*\[superlink\.NAME\]"
    ) as mistake:
        run_superlink(config, "nowhere", show=log.append)
    with pytest.raises(
        FederationError, match=r"the SuperLink took no run: \w.*unavailable.*\w\.$"
    ) as failure:
        run_superlink(config, "gone", show=log.append)
    for said in (str(mistake.value), str(failure.value), *log):
        assert not set("\n│╭╰─") & set(said)


@pytest.mark.timeout(280)
def test_a_superlink_gives_the_same_bits_and_tells_the_truth(superlink: Path, config: RunConfig) -> None:
    log: list[str] = []
    remote = run_superlink(config, "here", show=log.append)
    assert remote.folder == Path(config.runs_dir) / "remote"
    assert remote.host == socket.gethostname()
    assert (remote.folder / "report.md").is_file()
    assert any("round 1 of 1, 2 of 2 replies" in line for line in log)
    record = json.loads((remote.folder / "config.json").read_text())
    assert record["precision"]["asked"] == "auto"
    here = run_inprocess(from_dict(record["config"] | {"name": "here"}))
    assert remote.summary is not None
    assert remote.summary["vector_sha256"] == here.summary["vector_sha256"]
    for way in ("up", "down"):
        assert remote.summary["bytes"][way] == here.summary["bytes"][way]
    # flwr run itself ends with exit code 0 for this one.
    broken = config.model_copy(update={"name": "broken", "model": str(superlink / "nothing")})
    with pytest.raises(FederationError, match=r"run \d+ ended as finished:failed: ConfigError: .*nothing"):
        run_superlink(broken)
