"""The whole flow of a run: what is trained, written and counted; engines and workers agree."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr.app import Context, Message, RecordDict

from experiments.engines import default_workers, run_inprocess
from experiments.inprocess import InProcessGrid
from fedmask.channel import up_codec
from fedmask.codecs import encode_update
from fedmask.config import RunConfig
from fedmask.delta import read_delta
from fedmask.errors import ConfigError, FedmaskError
from fedmask.flower import (
    EXAMPLES,
    HELD_OUT,
    LOSSES,
    MAX_METRICS,
    SCORES,
    TRAIN,
    content_payload_bytes,
    ensure_identity,
    message_bytes,
    reply_content,
    update_content,
)
from fedmask.kernels import available_kernels
from fedmask.layout import Layout, Segment
from fedmask.ledger import Ledger
from fedmask.rng import rng_for
from fedmask.workspace import get_workspace
from server.app import make_server_app
from server.joining import join
from server.observer import Silent
from server.rounds import Federation, most_claims
from server.state import RunState
from server.strategy import ServerStrategy
from tests.apps.grids import read_rows, run_on
from tests.support import save_checkpoint

MakeConfig = Callable[..., RunConfig]


class Watcher:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def on_start(self, folder: Path, rounds: int, clients: int) -> None:
        self.said.append(("start", (folder.name, rounds, clients)))

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        self.said.append(("round", (round, clients)))

    def on_reply(self, client: int) -> None:
        self.said.append(("reply", client))

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        self.said.append(("row", row["round"]))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.said.append(("end", summary["rounds"]))


def test_a_run_writes_its_folder(make_config: MakeConfig) -> None:
    config = make_config(rounds=3)
    result = run_inprocess(config)
    names = {path.name for path in result.folder.iterdir()}
    assert names == {"config.json", "rounds.jsonl", "ledger.jsonl", "summary.json", "delta.safetensors"}

    record = json.loads((result.folder / "config.json").read_text())
    kernel = "sampled" if "sampled" in available_kernels() else "dense"  # what "auto" was settled to
    assert record["config"] == {**config.model_dump(mode="json"), "kernel": kernel}
    facts = record["facts"]
    assert [one["task"] for one in facts["partitions"]] == ["mood"] * 3 + ["topic"] * 2
    for one in facts["partitions"]:
        assert sum(one["labels"].values()) == one["train_rows"] > 0
    assert facts["layout"]["mood"][0] == ["mask", facts["k"]]
    assert facts["layout"]["topic"][-1] == ["head/topic", 3 * 32 + 3]

    rows = read_rows(result.folder, "rounds")
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert set(row["dev"]) == {"mood", "topic"}
        assert set(row["dev"]["mood"]) == {"loss", "accuracy"}
    for row in rows[1:]:
        assert row["sampled"] == row["replied"] == row["selected"] == [0, 1, 2, 3, 4]
        assert row["steps"] == 10
        assert set(row["global"]) == set(row["personal"]) == set(row["train_loss"]) == {"mood", "topic"}

    summary = json.loads((result.folder / "summary.json").read_text())
    assert set(summary["test"]) == set(summary["final_dev"]) == set(summary["clients"]) == {"mood", "topic"}
    assert summary["clients"]["mood"]["clients"] == 3
    assert summary["steps"] == 30
    assert summary["final_dev"] == rows[-1]["dev"]

    delta = read_delta(result.folder / "delta.safetensors")
    kept = np.concatenate([delta.segments["mask"], delta.segments["bias"]])
    np.testing.assert_array_equal(kept, result.state.shared)
    np.testing.assert_array_equal(delta.segments["head/topic"], result.state.heads["topic"])


def test_every_message_is_counted(make_config: MakeConfig) -> None:
    config = make_config()
    result = run_inprocess(config)
    ledger = Ledger.read_jsonl(result.folder / "ledger.jsonl")
    assert {key: one.messages for key, one in ledger.totals("kind", "direction").items()} == {
        ("mask", "down"): 5, ("mask", "up"): 5, ("train", "down"): 10, ("train", "up"): 10,
        ("evaluate", "down"): 5, ("evaluate", "up"): 5,
    }  # fmt: skip
    workspace = get_workspace(config)
    for row in ledger:
        if row.kind == "train":
            assert row.payload_bytes == 4 * workspace.layout(workspace.task_of(row.client)).size
            assert row.payload_bytes < row.message_bytes <= row.payload_bytes + 1300
    rows = read_rows(result.folder, "rounds")
    for row in rows:
        for way in ("up", "down"):
            # What the client evaluation costs belongs to no round of training.
            total = sum(
                (one.payload_bytes for one in ledger if one.round == row["round"] and one.direction == way
                 and one.kind != "evaluate"), 0)  # fmt: skip
            assert row["bytes"][way] == total
    assert result.summary["bytes"]["up"] == ledger.total(direction="up").payload_bytes
    assert (
        result.summary["costs"]["shared-mask"]["up_bytes"]
        == ledger.total(kind="train", direction="up").payload_bytes
    )


@pytest.mark.parametrize("size", [1000, 200_000])
def test_an_update_with_nine_metrics_is_hardly_larger_than_its_values(size: int) -> None:
    """As many as a reply may have, with the longest name that any has: at most 1,300 bytes more."""
    ensure_identity()
    layout = Layout((Segment("mask", size), Segment("bias", 9216), Segment("head/sentiment", 1155)))
    values = rng_for(0, 1, 0, "test").standard_normal(layout.size).astype(np.float32)
    envelope, _ = encode_update(values, layout, codec=up_codec("fp32"), digest="ab" * 32, round=1000)
    metrics: dict[str, float] = dict.fromkeys((*SCORES, *LOSSES, HELD_OUT, "steps"), 1 / 3)
    metrics |= {EXAMPLES: 10**6, "one-more-score": 1 / 3}
    assert len(metrics) == MAX_METRICS
    asked = Message(update_content(b"frame", 1000), dst_node_id=2**64 - 1, message_type=TRAIN)
    asked.metadata.__dict__["_message_id"] = "0" * 64
    reply = Message(reply_content(envelope, metrics), reply_to=asked)
    overhead = message_bytes([reply])[0] - content_payload_bytes(reply.content)
    assert content_payload_bytes(reply.content) == 4 * layout.size
    assert 1000 < overhead <= 1300


def test_half_precision_halves_the_payload(make_config: MakeConfig) -> None:
    full = run_inprocess(make_config(), client_evaluation=False).summary["bytes"]
    config = make_config(name="half", up="fp16", down="fp16")
    half = run_inprocess(config, client_evaluation=False).summary["bytes"]
    assert (half["up"] * 2, half["kinds"]["train"]["down"]["payload_bytes"] * 2) == (
        full["up"],
        full["kinds"]["train"]["down"]["payload_bytes"],
    )


def test_client_evaluation_can_be_left_out(make_config: MakeConfig) -> None:
    result = run_inprocess(make_config(rounds=1), client_evaluation=False)
    assert result.summary["clients"] == {}
    assert "evaluate" not in result.summary["bytes"]["kinds"]


def test_clients_without_held_out_rows(make_config: MakeConfig) -> None:
    result = run_inprocess(make_config(rounds=1, partition={"kind": "iid", "held_out": 0.0}))
    assert "evaluate" not in {row["kind"] for row in read_rows(result.folder, "ledger")}  # nothing to ask for
    row = read_rows(result.folder, "rounds")[1]
    assert (row["global"], row["personal"], row["rejected"]) == ({}, {}, [])
    assert result.summary["clients"] == {}


def test_clients_that_hold_out_most_of_their_rows_are_scored_on_them(make_config: MakeConfig) -> None:
    result = run_inprocess(make_config(rounds=1, partition={"kind": "iid", "held_out": 0.8}))
    assert result.summary["unscored"] == []
    assert {task: found["clients"] for task, found in result.summary["clients"].items()} == {
        "mood": 3,
        "topic": 2,
    }


def test_sampling_is_by_partition_and_seed(make_config: MakeConfig) -> None:
    config = make_config(rounds=4, server={"clients_per_round": 2})
    rows = read_rows(run_inprocess(config, client_evaluation=False).folder, "rounds")
    sampled = [tuple(row["sampled"]) for row in rows[1:]]
    assert all(len(one) == 2 and one == tuple(sorted(one)) for one in sampled)
    assert len(set(sampled)) > 1
    again = read_rows(run_inprocess(config, existing="overwrite", client_evaluation=False).folder, "rounds")
    assert [tuple(row["sampled"]) for row in again[1:]] == sampled


def test_heads_of_tasks_that_nobody_trained_stay(make_config: MakeConfig) -> None:
    config = make_config(clients=(1, 1), rounds=1, server={"clients_per_round": 1})
    result = run_inprocess(config, client_evaluation=False)
    (client,) = read_rows(result.folder, "rounds")[1]["sampled"]
    heads = list(result.state.heads.values())
    assert float(np.abs(heads[client]).max()) > 0
    assert float(np.abs(heads[1 - client]).max()) == 0


def test_the_observer_is_told_in_order(make_config: MakeConfig) -> None:
    watcher = Watcher()
    run_inprocess(make_config(clients=(2, 1), rounds=1), watcher)
    kinds = [kind for kind, _ in watcher.said]
    assert kinds == [
        "start", "round", "reply", "reply", "reply", "row",
        "round", "reply", "reply", "reply", "row", "reply", "reply", "reply", "end",
    ]  # fmt: skip
    assert watcher.said[0] == ("start", ("tiny", 1, 3))
    assert watcher.said[6] == ("round", (1, (0, 1, 2)))
    assert sorted(client for kind, client in watcher.said[7:10]) == [0, 1, 2]


def test_a_round_is_a_function_of_its_state(make_config: MakeConfig) -> None:
    """Going on from a state (vector, heads, strategy's moments) gives what the uninterrupted run gives."""
    config = make_config(rounds=3, server={"strategy": "fedadam", "options": {"eta": 0.01}})
    whole = run_inprocess(config, client_evaluation=False)
    workspace = get_workspace(config)

    def federation(ledger: Ledger) -> Federation:
        grid = InProcessGrid(config)
        strategy = ServerStrategy("fedadam", {"eta": 0.01})
        roster = join(grid, workspace, ledger, node_timeout=5.0, arrived=lambda _client: None)
        return Federation(workspace, grid, roster, strategy, ledger, Silent(), most_claims(workspace))

    first = federation(Ledger())
    state = RunState.start(workspace)
    for _ in range(2):
        state, _ = first.train_round(state)
    second = federation(Ledger())
    second.strategy.load_state(first.strategy.state())
    state, _ = second.train_round(state)
    np.testing.assert_array_equal(state.shared, whole.state.shared)
    for task, head in state.heads.items():
        np.testing.assert_array_equal(head, whole.state.heads[task])


# Folders ------------------------------------------------------------------------------------------


def test_an_existing_run_is_not_touched_unless_asked(make_config: MakeConfig) -> None:
    config = make_config((1,), rounds=1, eval_rows=2)
    first = run_inprocess(config, client_evaluation=False).folder
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    with pytest.raises(ConfigError, match=r"expected a new folder, found an older run; .*--overwrite"):
        run_inprocess(config)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    second = run_on(InProcessGrid(config), existing="number").folder
    third = run_on(InProcessGrid(config), existing="number").folder
    assert (second.name, third.name) == ("tiny-2", "tiny-3")
    (first / "left.over").write_text("x")
    assert run_inprocess(config, existing="overwrite", client_evaluation=False).folder == first
    assert not (first / "left.over").exists()


def test_a_folder_that_is_no_run_is_never_removed(make_config: MakeConfig, tmp_path: Path) -> None:
    thesis = tmp_path / "runs" / "tiny" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("precious")
    with pytest.raises(ConfigError, match="found something else"):
        run_inprocess(make_config(), existing="overwrite")
    assert thesis.read_text() == "precious"


def test_a_model_s_folder_is_no_run(make_config: MakeConfig, tiny: Path, tmp_path: Path) -> None:
    """It has a config.json, too."""
    model = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny / "model", model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for existing in ("overwrite", "refuse", "resume"):
        with pytest.raises(ConfigError, match=r"found something else|found none"):
            run_inprocess(make_config(), existing=existing)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


class NobodyThere(InProcessGrid):
    """A grid whose nodes never come."""

    def get_node_ids(self) -> list[int]:
        return []


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "rows that cannot be dealt": ({"clients": (300, 2)}, "rows"),
    "a model without linear layers": ({"eligible": "linear"}, "no tensor"),
    "nobody joins": ({}, "expected 5 nodes"),
    "a score that cannot be computed": ({}, "no memory"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_run_leaves_nothing_new_and_nothing_less(
    case: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, said = REFUSALS[case]
    if case.startswith("a model"):
        changes = changes | {"model": str(save_checkpoint(tmp_path / "flat", num_hidden_layers=0))}
    if case.startswith("a score"):
        monkeypatch.setattr("server.app.central_scores", _no_memory)
    runs = tmp_path / "runs"

    def refused(existing: str) -> None:
        with pytest.raises((FedmaskError, MemoryError), match=said):
            run_on(NobodyThere(make_config(**changes)), existing=existing, node_timeout=0.1)

    refused("refuse")
    assert not runs.exists()
    older = runs / "tiny"
    older.mkdir(parents=True)
    (older / "config.json").write_text(json.dumps({"config": {}, "facts": {}, "versions": {}}))
    for existing in ("overwrite", "number"):
        refused(existing)
        assert [path.name for path in runs.rglob("*")] == ["tiny", "config.json"]


def _no_memory(*_args: Any) -> Any:
    raise MemoryError("no memory")


def test_a_folder_that_came_meanwhile_is_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(rounds=1)
    thesis = tmp_path / "runs" / "tiny" / "thesis.tex"

    class Meddler(Silent):
        def on_reply(self, client: int) -> None:
            thesis.parent.mkdir(parents=True, exist_ok=True)
            thesis.write_text("precious")

    for existing in ("refuse", "overwrite"):
        with pytest.raises(ConfigError, match="found something else"):
            run_inprocess(config, Meddler(), existing=existing)  # type: ignore[arg-type]
        assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["tiny", "thesis.tex"]
        thesis.unlink()
        thesis.parent.rmdir()


def test_a_failing_comparison_does_not_lose_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config((1, 1), rounds=1, overlap_batches=1)
    plain = run_inprocess(config.model_copy(update={"name": "plain"})).summary
    monkeypatch.setattr("server.app.measured_unions", _no_memory)
    result = run_inprocess(config)
    (note,) = result.summary["notes"]
    assert "MemoryError: no memory" in note
    assert json.loads((result.folder / "summary.json").read_text()) == result.summary
    assert (result.folder / "delta.safetensors").is_file()
    for key in ("vector_sha256", "test", "clients", "bytes"):
        assert result.summary[key] == plain[key]
    assert result.summary["costs"].keys() == plain["costs"].keys()
    assert result.summary["overlap"] == {}
    # Masks for comparison alone get the few figures that are quick to find, not those of ``fedmask overlap``.
    few = {"rule", "batches", "k", "clients", "union", "mean_jaccard"}
    assert plain["overlap"].keys() == few and plain["overlap"]["k"] < plain["overlap"]["union"]


@pytest.mark.parametrize("method", ["head", "full"])
def test_methods_without_a_mask_need_no_linear_layers(
    make_config: MakeConfig, tmp_path: Path, method: str
) -> None:
    model = save_checkpoint(tmp_path / "flat", num_hidden_layers=0)
    summary = run_inprocess(make_config(model=str(model), method=method, rounds=1)).summary
    assert (set(summary["costs"]), summary["notes"]) == ({"this-run", "full"}, [])


def test_bad_settings_leave_an_older_run_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = run_inprocess(make_config(rounds=1), client_evaluation=False).folder
    with pytest.raises(ConfigError):
        run_inprocess(make_config(model=str(tmp_path / "none")), existing="overwrite")
    with pytest.raises(ConfigError):
        run_inprocess(make_config(server={"strategy": "krum"}, clients=(1, 1)), existing="overwrite")
    assert (folder / "summary.json").is_file()


# Apps and engines -----------------------------------------------------------------------------------


def test_the_run_config_carries_everything(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """As under ``flwr run``: both apps are module-level and know the run from one JSON string."""
    from clients.app import app as client_app
    from server.app import app as server_app

    config = make_config(rounds=1)
    text = config.model_dump_json()

    def unconfigured(_config: RunConfig) -> Any:
        def app(message: Any, context: Context) -> Any:
            context.run_config = {"config": text}
            return client_app(message, context)

        return app

    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"config": text})
    with caplog.at_level(logging.INFO, logger="flwr"):
        server_app(grid=InProcessGrid(config, make_app=unconfigured), context=context)
    folder = Path(config.runs_dir) / "tiny"
    assert f"fedmask: the run's folder is {folder} on " in caplog.text
    assert "fedmask: round 1 of 1, 5 of 5 replies; mood loss" in caplog.text
    summary = json.loads((folder / "summary.json").read_text())
    shutil.rmtree(folder)
    assert run_inprocess(config).summary["vector_sha256"] == summary["vector_sha256"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("{", "JSON"),
        (3, "found int"),
        ('{"a": 1, "tasks": [{"name": "t", "clients": 1}]}', "unknown key 'a'"),
    ],
)
def test_a_run_config_that_says_nothing_useful(text: Any, said: str) -> None:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"config": text})
    with pytest.raises(ConfigError, match=said):
        make_server_app()(grid=None, context=context)  # type: ignore[arg-type]


def test_workers_by_default(make_config: MakeConfig) -> None:
    assert default_workers(make_config(workers=3)) == 3
    assert default_workers(make_config(workers=None, clients=(1,))) == 1
    assert 1 <= default_workers(make_config(workers=None)) <= 5


def test_processes_agree_bit_for_bit(make_config: MakeConfig) -> None:
    one = run_inprocess(make_config(workers=1))
    two = run_inprocess(make_config(workers=2), existing="overwrite")
    assert one.summary["vector_sha256"] == two.summary["vector_sha256"]
    assert one.summary["bytes"] == two.summary["bytes"]
    assert one.summary["clients"] == two.summary["clients"]


_ON_RAY = """
import sys
from experiments.engines import run_ray
from fedmask.config import from_json

if __name__ == "__main__":
    # Not a cluster of another test that happens to run meanwhile: Ray would join it by itself.
    run_ray(from_json(sys.stdin.read()), backend={"init_args": {"address": "local"}})
"""


@pytest.mark.timeout(450)
def test_ray_agrees_bit_for_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    """In a process of its own: Ray leaves open files and threads behind, which are warnings here."""
    clients = (2, 1)
    one = run_inprocess(make_config(clients, rounds=1))
    config = make_config(clients, rounds=1, workers=1, name="ray")  # one actor; two nodes: test_ray_cluster
    done = subprocess.run(
        [sys.executable, "-c", _ON_RAY],
        input=config.model_dump_json(),
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "DEPRECATED" not in done.stderr
    folder = Path(config.runs_dir) / "ray"
    summary = json.loads((folder / "summary.json").read_text())
    assert one.summary["vector_sha256"] == summary["vector_sha256"]
    assert one.summary["bytes"]["up"] == summary["bytes"]["up"]
    assert json.loads((folder / "config.json").read_text())["engine"] == "ray"
