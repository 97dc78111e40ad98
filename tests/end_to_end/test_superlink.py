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
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    Reconnect,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree

from experiments.engines import RemoteRun, run_superlink
from experiments.inprocess import InProcessGrid
from experiments.runs import read_run
from fedmask.config import RunConfig, from_dict
from fedmask.errors import ConfigError, FederationError
from fedmask.flower import ensure_identity, reply_content
from fedmask.ledger import Ledger
from tests.apps.grids import run_on
from tests.end_to_end.proxy import CountingProxy, Wire
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


@dataclass(frozen=True)
class Site:
    """FLWR_HOME of a SuperLink, and the proxy through which its SuperNodes reach it."""

    home: Path
    proxy: CountingProxy


@pytest.fixture
def superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A SuperLink with two SuperNodes; nothing of them is left afterwards."""
    home = tmp_path / "flower"
    home.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(home))
    port = _free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    here = ["--insecure", "--host", "127.0.0.1", "--port"]
    started = [_start(home, "link", ["flower-superlink", *here, str(port)])]
    proxy = CountingProxy(port)
    try:
        for node in range(2):
            place = ["--node-config", f"partition-id={node} num-partitions=2"]
            arguments = [
                "flower-supernode",
                *here,
                str(_free_port()),
                "--superlink",
                f"127.0.0.1:{proxy.port}",
                *place,
            ]
            started.append(_start(home, f"node-{node}", arguments))
        _wait_for(f"http://127.0.0.1:{port}/health")
        yield Site(home, proxy)
    except BaseException:
        for log in sorted(home.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")
        raise
    finally:
        for process in reversed(started):
            _stop(process)
        proxy.close()
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


def check_bytes(remote: RemoteRun, here: Ledger, wire: Wire) -> None:
    """The ledger is that of the same run in process; SuperLink's counter and the wire follow from it."""
    there = Ledger.read_jsonl(remote.folder / "ledger.jsonl")
    assert sorted(map(repr, there)) == sorted(map(repr, here))  # payload and message bytes, each to the byte
    assert wire["push-object", "requests"] == sum(
        OBJECTS[row.kind, "up"] for row in there if row.direction == "up"
    )
    assert read_run(remote.folder).wire == {"run_id": remote.run_id, **remote.traffic}
    print(
        "\n     payload  messages  explained  SuperLink  objects by HTTP  whole wire  of it the app's bundle"
    )
    for way, counted, request in (("up", "inbound", "push-object"), ("down", "outbound", "pull-object")):
        ours = there.total(direction=way)
        # Flower's own requests name each message, its head and its objects once more.
        explained = ours.message_bytes + sum(_named_again(row.kind, row.direction, way) for row in there)
        assert remote.traffic[counted] == pytest.approx(explained, rel=0.01)
        # On the wire each object has a request of its own, with HTTP's lines and headers.
        objects = sum(OBJECTS[row.kind, way] for row in there if row.direction == way)
        assert wire[request, "requests"] >= objects  # one asked for too early is asked for again
        crossed = wire[request, way]
        assert ours.message_bytes < crossed < ours.message_bytes + MOST_HTTP * objects
        whole = sum(count for (_, found), count in wire.items() if found == way)
        assert remote.traffic[counted] < whole
        print(
            f"{way:<4}{ours.payload_bytes:>8,}{ours.message_bytes:>10,}{explained:>11,}{remote.traffic[counted]:>11,}"
            f"{crossed:>17,}{whole:>12,}{wire['get-fab', way]:>25,}"
        )


# Message, its records, and with an update one array of one chunk: never more.
OBJECTS = {("mask", "down"): 3, ("mask", "up"): 3, ("train", "down"): 6, ("train", "up"): 6,
           ("evaluate", "down"): 6, ("evaluate", "up"): 3}  # fmt: skip
MOST_HTTP = 1500  # bytes of lines, headers and ids around one object


def _named_again(kind: str, direction: str, way: str) -> int:
    """Bytes that SuperLink's counter has in ``way`` beside a message's own objects, by Flower's formats."""
    ensure_identity()
    content = {
        "mask": RecordDict({"config": ConfigRecord({})}),
        "train": reply_content(b"x", {}),
        "evaluate": reply_content(b"x" if direction == "down" else None, {}),
    }[kind]
    message = Message(
        content, dst_node_id=2**64 - 1, message_type="query.join" if kind == "mask" else kind, ttl=1.0
    )
    if direction == "up":
        message.metadata.__dict__["_message_id"] = "0" * 64
        message = Message(content, reply_to=message)
    for number in ("run_id", "src_task_id" if direction == "down" else "dst_task_id"):
        message.metadata.__dict__[f"_{number}"] = 2**64 - 1
    message.metadata.__dict__["_message_id"] = message.object_id
    tree = get_object_tree(message)
    message.content = RecordDict()  # it travels as objects
    head = {"messages_list": [message_to_proto(message)], "message_object_trees": [tree]}
    node = Node(node_id=2**64 - 1)
    if direction == "down":
        asked, said = PullMessagesRequest(node=node), PullMessagesResponse(**head)
    else:
        names = [one.object_id for one in iterate_object_tree(tree)]
        asked = PushMessagesRequest(node=node, clientapp_runtime_list=[1.0], **head)
        said = PushMessagesResponse(
            reconnect=Reconnect(reconnect=5), results={names[0]: 0}, objects_to_push=names,
            session_id=str(uuid.uuid4()),
        )  # fmt: skip
    return (asked if way == "up" else said).ByteSize()


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
def test_a_superlink_gives_the_same_bits_and_bytes_and_tells_the_truth(
    superlink: Site, config: RunConfig
) -> None:
    log: list[str] = []
    remote = run_superlink(config, "here", show=log.append)
    wire = superlink.proxy.counted()
    assert remote.folder == Path(config.runs_dir) / "remote"
    assert remote.host == socket.gethostname()
    assert (remote.folder / "report.md").is_file()
    assert any("round 1 of 1, 2 of 2 replies" in line for line in log)
    record = json.loads((remote.folder / "config.json").read_text())
    assert record["precision"]["asked"] == "auto"
    # By the same server, which offers a SuperLink's nodes a seat, to a grid in this process.
    with InProcessGrid(from_dict(record["config"] | {"name": "here"})) as grid:
        here = run_on(grid, engine="superlink", client_evaluation=True)
    assert remote.summary is not None
    assert remote.summary["vector_sha256"] == here.summary["vector_sha256"]
    check_bytes(remote, Ledger.read_jsonl(here.folder / "ledger.jsonl"), wire)
    # What clients keep between messages (received vector, residuals) lives in Flower's context alone there.
    ways = {"up": "int4+ef", "down": "int4+delta", "rounds": 2}
    coarse = run_superlink(config.model_copy(update={"name": "coarse", "precision": "fp32", **ways}))
    with InProcessGrid(from_dict(record["config"] | {"name": "fine", "precision": "fp32", **ways})) as grid:
        here = run_on(grid, engine="superlink", client_evaluation=True)
    assert coarse.summary is not None
    assert coarse.summary["vector_sha256"] == here.summary["vector_sha256"]
    # flwr run itself ends with exit code 0 for this one.
    broken = config.model_copy(update={"name": "broken", "model": str(superlink.home / "nothing")})
    with pytest.raises(FederationError, match=r"run \d+ ended as finished:failed: ConfigError: .*nothing"):
        run_superlink(broken)
