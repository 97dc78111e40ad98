"""A run over a real SuperLink and two real SuperNodes on this machine, and a run that fails there."""

from __future__ import annotations

import json
import socket
import uuid
from pathlib import Path

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
from fedmask.config import from_dict
from fedmask.errors import ConfigError, FederationError
from fedmask.flower import ensure_identity, reply_content
from fedmask.ledger import Ledger
from tests.apps.grids import run_on
from tests.end_to_end.link import Site, free_port, remote_config
from tests.end_to_end.proxy import Wire


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = remote_config(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(
        f'[superlink.gone]\naddress = "127.0.0.1:{free_port()}"\ninsecure = true\n'
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


@pytest.mark.timeout(600)
def test_a_superlink_gives_the_same_bits_and_bytes_and_tells_the_truth(
    superlink: Site, tmp_path: Path
) -> None:
    log: list[str] = []
    config = remote_config(tmp_path)
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
    # What clients keep between messages (received vectors, residuals, own masks) lives in Flower's context.
    # (One mask for all, with the same codecs: containers/test_server_kills.py.)
    settings = config.model_dump(mode="json") | {
        "up": "int4+ef", "down": "int4+delta", "rounds": 2, "precision": "fp32", "overlap_batches": 0,
        "method": "fish", "placement": "client", "scores": {"samples": 24, "batches": 1, "steps": 2},
    }  # fmt: skip
    remote = run_superlink(from_dict(settings | {"name": "own"}))
    with InProcessGrid(from_dict(settings | {"name": "own-here"})) as grid:
        here = run_on(grid, engine="superlink", client_evaluation=True)
    assert remote.summary is not None
    assert remote.summary["vector_sha256"] == here.summary["vector_sha256"]
    assert remote.summary["bytes"] == here.summary["bytes"]
    # flwr run itself ends with exit code 0 for this one.
    broken = config.model_copy(update={"name": "broken", "model": str(superlink.home / "nothing")})
    with pytest.raises(FederationError, match=r"run \d+ ended as finished:failed: ConfigError: .*nothing"):
        run_superlink(broken)
