"""How vectors travel in a run: changes instead of vectors, error feedback, lost and late clients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flwr.app import Context, Message, RecordDict

from experiments.engines import run_inprocess
from experiments.inprocess import InProcessGrid
from experiments.report import render
from experiments.runs import read_run
from fedmask.config import RunConfig
from fedmask.delta import read_delta
from fedmask.flower import behind_content
from fedmask.ledger import Ledger
from fedmask.workspace import get_workspace
from server.app import RunResult
from server.resume import STATE, interrupted
from tests.apps.fakes import QuickApp, quick_app
from tests.apps.grids import TamperedGrid, read_rows, run_on
from tests.apps.test_rejections import BAD_REPLIES
from tests.apps.test_resume import Cuts, PowerCut, assert_same, cut, spoil

MakeConfig = Callable[..., RunConfig]


def quick(config: RunConfig, **options: Any) -> RunResult:
    """A run whose clients answer at once."""
    return run_inprocess(config, make_app=quick_app, **options)


def trained(result: RunResult) -> list[tuple[int, int, str, int, str]]:
    """Round, client, direction, payload and status of each training message."""
    return [
        (row.round, row.client, row.direction, row.payload_bytes, row.status)
        for row in Ledger.read_jsonl(result.folder / "ledger.jsonl")
        if row.kind == "train"
    ]


@pytest.mark.parametrize("down", ["fp32", "fp32+delta"])
def test_changes_lead_where_the_vector_leads(make_config: MakeConfig, down: str) -> None:
    plain = quick(make_config(name="plain", rounds=3))
    other = quick(make_config(rounds=3, down=down))
    np.testing.assert_allclose(other.state.shared, plain.state.shared, atol=1e-7)
    if down == "fp32":
        np.testing.assert_array_equal(other.state.shared, plain.state.shared)


def test_the_first_change_costs_nothing(make_config: MakeConfig) -> None:
    """Version 0 is the pre-trained model, which every client has."""
    result = quick(make_config(rounds=2, down="int4+delta"))
    down = {(round, client): size for round, client, way, size, _ in trained(result) if way == "down"}
    assert {down[1, client] for client in range(5)} == {0}
    layout = get_workspace(make_config()).layout("mood")
    assert down[2, 0] == 2 + 2 * -(-layout.size // 256) + -(-layout.size // 2)


COARSE: dict[str, Any] = {"up": "int4+ef", "down": "int4+delta"}


def forgetful(clients: set[int], round: int) -> Any:
    """A maker of apps that lose their node's state before ``round``."""

    def make(config: RunConfig) -> Any:
        app = QuickApp(config)

        def answer(message: Message, context: Context) -> Message:
            lost = int(context.node_config["partition-id"]) in clients
            said = message.content.config_records.get("config")
            if lost and said is not None and said.get("round") == round and len(asked) < len(clients):
                asked.append(context.node_id)
                context.state.clear()
            return app(message, context)

        asked: list[int] = []
        return answer

    return make


def test_a_client_that_lost_its_state_is_sent_the_whole_vector(make_config: MakeConfig) -> None:
    config = make_config(rounds=4, up="int4+ef", down="int4+delta")
    result = run_inprocess(config, make_app=forgetful({1}, 3))
    rows = read_rows(result.folder, "rounds")
    assert all(row["replied"] == [0, 1, 2, 3, 4] and not row["rejected"] for row in rows[1:])
    sent = [row for row in trained(result) if row[:2] == (3, 1)]
    size = get_workspace(config).layout("mood").size
    changes = 2 * (2 + 2 * -(-size // 256) + -(-size // 2))
    assert [(way, bytes_) for _, _, way, bytes_, _ in sent] == [
        ("down", changes // 2),
        ("up", 0),  # "I hold version 0"
        ("down", changes),  # less than the whole, and enough from there
        ("up", changes // 2),
    ]
    whole = quick(config.model_copy(update={"name": "whole"}))
    assert result.summary["vector_sha256"] != whole.summary["vector_sha256"]  # its residual is gone
    np.testing.assert_allclose(result.state.shared, whole.state.shared, atol=5e-3)


def test_without_feedback_a_lost_state_changes_nothing(make_config: MakeConfig) -> None:
    config = make_config(rounds=4, up="int4", down="int4+delta")
    result = run_inprocess(config, make_app=forgetful({1, 4}, 4))
    whole = quick(config.model_copy(update={"name": "whole"}))
    assert result.summary["vector_sha256"] == whole.summary["vector_sha256"]


def test_a_client_that_cannot_be_helped_is_rejected_and_the_round_goes_on(make_config: MakeConfig) -> None:
    def confused(config: RunConfig) -> Any:
        app = QuickApp(config)

        def answer(message: Message, context: Context) -> Message:
            if int(context.node_config["partition-id"]) == 2 and message.metadata.message_type == "train":
                return Message(behind_content(7), reply_to=message)
            return app(message, context)

        return answer

    result = run_inprocess(make_config(rounds=2, **COARSE), make_app=confused)
    for row in read_rows(result.folder, "rounds")[1:]:
        assert row["replied"] == [0, 1, 3, 4]
        assert [(one["client"], "expected the records" in one["reason"]) for one in row["rejected"]] == [
            (2, True)
        ]


def test_clients_that_were_not_asked_for_long_catch_up(make_config: MakeConfig) -> None:
    config = make_config(rounds=9, server={"clients_per_round": 2}, **COARSE)
    result = quick(config)
    layout = get_workspace(config).layout("mood")
    one = 2 + 2 * -(-layout.size // 256) + -(-layout.size // 2)
    held: dict[int, int] = {}
    for round, client, way, size, _ in trained(result):
        if way == "down" and client < 3:
            behind = round - 1 - held.get(client, 0)
            assert size == (behind * one if behind * one < 4 * layout.size else 4 * layout.size)
            held[client] = round - 1
    assert max(round for round in held.values()) == 8
    assert result.summary["unscored"] == []


def test_processes_agree_on_what_clients_keep(make_config: MakeConfig) -> None:
    """Received vectors and residuals go from process to process."""
    one = quick(make_config(rounds=3, workers=1, name="one", **COARSE))
    two = quick(make_config(rounds=3, workers=2, name="two", **COARSE))
    for key in ("vector_sha256", "bytes", "clients"):
        assert one.summary[key] == two.summary[key]


@pytest.mark.parametrize("place", ["start", "reply", "end"])
def test_resumed_equals_uninterrupted_with_residuals(make_config: MakeConfig, place: str) -> None:
    """The in-process grid's clients find what they kept; a round that is repeated starts from before it."""
    server = {"clients_per_round": 3}
    whole = quick(make_config(name="whole", rounds=5, server=server, **COARSE)).folder
    config = make_config(rounds=5, server=server, **COARSE)
    folder = cut(config, place, 3)
    assert (folder / "clients" / "objects").is_dir()
    quick(config, existing="resume")
    assert_same(folder, whole)
    assert not (folder / "clients").exists()


@pytest.mark.parametrize("what", ["gone", "damaged"])
def test_resumed_without_the_clients_states_goes_on(make_config: MakeConfig, what: str) -> None:
    whole = quick(make_config(name="whole", rounds=5, **COARSE))
    config = make_config(rounds=5, **COARSE)
    folder = cut(config, "start", 4)
    if what == "gone":
        shutil.rmtree(folder / "clients")
    else:
        for piece in (folder / "clients" / "objects").iterdir():
            spoil(piece, "flip")
    found = quick(config, existing="resume")
    rows = read_rows(folder, "rounds")
    assert all(row["replied"] == [0, 1, 2, 3, 4] for row in rows[1:])
    # Joining says what a client holds, so nobody is asked twice; only the residuals are gone.
    assert sum(row[:2] == (4, 0) for row in trained(found) if row[4] == "ok") == 2
    np.testing.assert_allclose(found.state.shared, whole.state.shared, atol=5e-3)


def test_a_run_that_was_cut_after_its_last_round_leaves_no_states_behind(make_config: MakeConfig) -> None:
    config = make_config(rounds=2, **COARSE)
    folder = cut(config, "end", 2)
    assert (folder / "clients").is_dir()
    quick(config, existing="resume")
    assert not (folder / "clients").exists()


def test_an_older_state_of_the_server_repeats_a_round_to_the_bit(make_config: MakeConfig) -> None:
    """Its newest state is damaged: clients are a round ahead of it, and begin from the residual before."""
    whole = quick(make_config(name="whole", rounds=3, **COARSE))
    config = make_config(rounds=3, **COARSE)
    folder = cut(config, "end", 2)
    spoil(folder / STATE, "flip")
    found = quick(config, existing="resume")
    assert json.loads((folder / "config.json").read_text())["resumed"][0]["after_round"] == 1
    assert found.summary["vector_sha256"] == whole.summary["vector_sha256"]


def test_two_rounds_back_is_said(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """The newest state is damaged and the next round had begun: its residuals are a round too new."""
    whole = quick(make_config(name="whole", rounds=4, **COARSE))
    config = make_config(rounds=4, **COARSE)
    folder = cut(config, "reply", 3)
    spoil(folder / STATE, "flip")
    found = quick(config, existing="resume")
    (went_on,) = json.loads((folder / "config.json").read_text())["resumed"]
    assert went_on["after_round"] == 1
    said = "round 2 is done again although round 3 had begun"
    assert said in went_on["note"] and any(said in line for line in caplog.messages)
    assert said in render(read_run(folder))
    np.testing.assert_allclose(found.state.shared, whole.state.shared, atol=5e-3)


def test_what_a_reply_that_is_not_used_carried_is_taken_back(make_config: MakeConfig) -> None:
    """A client that trains in vain leaves the run, to the bit, that one leaves which does not train."""

    def one_that(answers: bool) -> Any:
        def make(config: RunConfig) -> Any:
            app = QuickApp(config)

            def answer(message: Message, context: Context) -> Message:
                said = message.content.config_records.get("config", {})
                if int(context.node_config["partition-id"]) == 1 and said.get("round") in (2, 3):
                    if not answers:
                        raise RuntimeError("out of coffee")
                    app(message, context)
                    return Message(RecordDict(), reply_to=message)
                return app(message, context)

            return answer

        return make

    silent = run_inprocess(make_config(name="silent", rounds=5, **COARSE), make_app=one_that(False))
    config = make_config(rounds=5, **COARSE)
    with pytest.raises(PowerCut):  # what was not used is remembered over an interruption
        run_inprocess(config, Cuts("end", 3), make_app=one_that(True))
    vain = run_inprocess(config, existing="resume", make_app=one_that(True))
    assert [row["replied"] for row in read_rows(vain.folder, "rounds")[2:4]] == [[0, 2, 3, 4]] * 2
    assert vain.summary["vector_sha256"] == silent.summary["vector_sha256"]
    whole = quick(make_config(name="whole", rounds=5, **COARSE))
    assert vain.summary["vector_sha256"] != whole.summary["vector_sha256"]


@pytest.mark.parametrize("lost", [(), (3,)], ids=["one is chosen", "the old vector stays"])
def test_a_reply_that_the_strategy_leaves_out_is_not_used(
    make_config: MakeConfig, lost: tuple[int, ...]
) -> None:
    """Krum takes one of five replies, and none where it has too few."""
    krum = {"strategy": "krum", "options": {"num_malicious_nodes": 1}, "min_replies": 1}
    config, silent = make_config(rounds=3, server=krum, **COARSE), BAD_REPLIES["error"][0]
    grid = TamperedGrid(
        config, lambda c, r, reply: [silent(reply)] if c == 0 and r in lost else [reply], quick_app
    )
    result = run_on(grid)
    rows = read_rows(result.folder, "rounds")[1:]
    assert [len(row["selected"]) for row in rows] == [0 if row["round"] in lost else 1 for row in rows]
    assert ("old vector stays" in rows[2]["note"]) == bool(lost)
    counted = result.state.counted
    assert counted.last == {client: row["round"] for row in rows for client in row["selected"]}
    assert counted.unused == set(range(5)) - set(rows[2]["selected"])


def test_clients_of_a_round_that_broke_off_go_back_also_if_they_are_not_asked_again(
    make_config: MakeConfig,
) -> None:
    config = make_config(rounds=4, server={"clients_per_round": 3}, **COARSE)
    folder = cut(config, "reply", 3)
    point = interrupted(folder, config)
    before = point.state.counted
    ledger = point.go_on(folder, point.record, Ledger())
    begun = {row.client for row in ledger if row.round == 3 and row.kind == "train"}
    assert len(begun) == 3
    counted = point.state.counted
    for client in range(5):  # the round that is done again costs the same bytes
        assert counted.told(client) == before.told(client)
    after = counted.after(3, [4], [4])
    assert all(after.told(client) == before.last.get(client, 0) for client in begun - {4})
    assert after.told(4) is None
    assert after.after(4, begun, begun).unused.isdisjoint(begun)


def test_what_a_run_is_scored_on_and_exports_is_the_exact_vector(make_config: MakeConfig) -> None:
    result = quick(make_config(rounds=3, down="int2+delta"))
    public, exact = result.state.public["mood"], result.state.exact("mood")
    assert public.version == 3
    assert 0 < np.abs(public.vector - exact).max() < np.abs(exact).max()
    delta = read_delta(result.folder / "delta.safetensors")
    kept = np.concatenate([delta.segments[name] for name in ("mask", "bias", "head/mood")])
    np.testing.assert_array_equal(kept, exact)


def test_the_received_vector_is_kept_once(make_config: MakeConfig) -> None:
    """A client costs its residuals, 2 bytes an entry each; what all received is one piece for all."""
    count = 40
    config = make_config(clients=(count,), rounds=3, density=0.5, **COARSE)
    grid = InProcessGrid(config, make_app=quick_app)  # type: ignore[arg-type]
    run_on(grid)
    size = get_workspace(config).layout("mood").size
    states = [grid.states.get(node) for node in grid.get_node_ids()]
    pieces = {id(piece): len(piece) for state in states if state for piece in state.objects.values()}
    names = {id(name): len(name) for state in states if state for name in state.objects}
    assert len(states) == count and None not in states
    assert 4 * size * count < sum(pieces.values()) + sum(names.values()) < 1.2 * 4 * size * count
