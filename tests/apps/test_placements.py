"""Masks that come from labelled rows: who finds them, what travels, and what the run is then."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from experiments.engines import run_inprocess
from fedmask.config import RunConfig
from fedmask.delta import read_delta
from fedmask.errors import ConfigError
from fedmask.ledger import Ledger
from fedmask.masks import agree_by_scores, agree_by_votes, pack_top_scores, pack_votes
from fedmask.methods import TASK_SPECIFIC
from fedmask.workspace import Workspace
from tests.apps.grids import read_rows
from tests.apps.test_resume import broken_and_resumed

MakeConfig = Callable[..., RunConfig]
SCORES = {"samples": 24, "batches": 1, "steps": 2}


@pytest.mark.parametrize("kind", ["scores", "votes"])
def test_agreed_masks_are_what_the_clients_said(make_config: MakeConfig, kind: str) -> None:
    config = make_config(method="gradient", agree_by=kind, scores=SCORES)
    result = run_inprocess(config)
    workspace = Workspace(config)
    rule = workspace.rule
    assert rule is not None
    pack: Any = pack_votes if kind == "votes" else pack_top_scores
    found = {client: workspace.scores("gradient", client) for client in range(config.clients)}
    said = {c: pack(one.mask(rule) if kind == "votes" else one, *([] if kind == "votes" else [rule]))
            for c, one in found.items()}  # fmt: skip
    agree: Any = agree_by_votes if kind == "votes" else agree_by_scores
    wanted = agree(said, workspace.space, rule)
    facts = json.loads((result.folder / "config.json").read_text())
    assert facts["facts"]["mask_digest"] == wanted.digest
    search = result.summary["mask_search"]
    assert (search["placement"], search["clients"], search["refused"]) == ("agreed", 5, [])
    assert search["seconds"] > 0

    ledger = Ledger.read_jsonl(result.folder / "ledger.jsonl")
    sent = {row.client: row.payload_bytes for row in ledger
            if row.kind == "mask" and row.direction == "up" and row.payload_bytes}  # fmt: skip
    assert sent == {client: len(data) for client, data in said.items()}
    packed = (result.folder / "mask.bin").read_bytes()
    down = [row.payload_bytes for row in ledger if row.kind == "mask" and row.direction == "down"]
    assert sorted(down) == [0] * 10 + [len(packed)] * 5
    delta = read_delta(result.folder / "delta.safetensors")
    np.testing.assert_array_equal(delta.indices, wanted.indices)
    np.testing.assert_array_equal(delta.segments["mask"], result.state.shared)


# Each method in each placement, each with a family of codecs: plain, quantized, sign, top-k.
FAMILIES = (
    {"up": "fp16", "down": "fp16"},
    {"up": "int4+ef", "down": "int8+delta"},
    {"up": "sign+ef", "down": "int4+delta"},
    {"up": "topk:0.25+ef", "down": "fp32+delta"},
)
CASES = [
    (method, placement, FAMILIES[(i + j) % 4])
    for i, method in enumerate(sorted(TASK_SPECIFIC))
    for j, placement in enumerate(("client", "agreed", "server"))
]


@pytest.mark.parametrize(("method", "placement", "codecs"), CASES)
def test_two_rounds_of_each_method_in_each_placement(
    make_config: MakeConfig, method: str, placement: Any, codecs: dict[str, str]
) -> None:
    topic = make_config().tasks[1]
    public = {"name": "topic", "source": topic.source, "text": "text", "label": "label", "rows": 30}
    config = make_config(
        clients=(2,),
        method=method,
        placement=placement,
        public=public if placement == "server" else None,
        scores=SCORES,
        **codecs,
    )
    result = run_inprocess(config)
    rows = read_rows(result.folder, "rounds")
    assert [row["rejected"] for row in rows] == [[], [], []]
    assert result.summary["unscored"] == []
    assert result.summary["mask_search"]["placement"] == placement
    assert np.abs(result.state.shared).max() > 0

    # What the mask costs. By the server: its packed indices down to each client, nothing up. Agreed: also
    # each client's own choice with scores up. A client's own: nothing of its own, it comes with the update.
    asked = [row for row in Ledger.read_jsonl(result.folder / "ledger.jsonl") if row.kind == "mask"]
    paid = {
        way: sorted(row.payload_bytes for row in asked if row.direction == way and row.payload_bytes)
        for way in ("down", "up")
    }
    if placement == "client":
        assert paid == {"down": [], "up": []}
        return
    assert paid["down"] == [(result.folder / "mask.bin").stat().st_size] * 2
    workspace = Workspace(config)
    rule = workspace.rule
    assert rule is not None
    sent = [pack_top_scores(workspace.scores(method, client), rule) for client in (0, 1)]
    assert paid["up"] == ([] if placement == "server" else sorted(map(len, sent)))


def test_a_server_finds_the_mask_on_rows_of_its_own(make_config: MakeConfig) -> None:
    plain = make_config(clients=(2,))
    topic = make_config().tasks[1]
    public = {"name": "topic", "source": topic.source, "text": "text", "label": "label", "rows": 30}
    config = make_config(clients=(2,), method="gradient", placement="server", public=public, scores=SCORES)
    result = run_inprocess(config, client_evaluation=False)
    assert result.summary["mask_search"]["placement"] == "server"
    workspace = Workspace(config)
    rule = workspace.rule
    assert rule is not None
    wanted = workspace.public_scores().mask(rule)
    assert wanted.k == Workspace(plain).layout("mood").segments[0].size
    assert read_delta(result.folder / "delta.safetensors").indices.tolist() == wanted.indices.tolist()  # type: ignore[union-attr]


def test_a_run_that_goes_on_keeps_its_mask(make_config: MakeConfig) -> None:
    """It is read from the folder, not searched again, and the end is that of an uninterrupted run."""
    config = make_config(method="gradient", rounds=3, scores=SCORES)
    whole = run_inprocess(config)
    resumed = broken_and_resumed(config, round=1)
    assert resumed.summary["vector_sha256"] == whole.summary["vector_sha256"]
    assert resumed.summary["mask_search"]["clients"] == 5
    rows = Ledger.read_jsonl(resumed.folder / "ledger.jsonl")
    again = [row.payload_bytes for row in rows if row.round == -1 and row.direction == "down"]
    assert sorted(again)[-5:] == [(resumed.folder / "mask.bin").stat().st_size] * 5


def test_what_cannot_be_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="placement 'server': missing the table 'public'"):
        make_config(method="gradient", placement="server")
    mood = make_config().tasks[0]
    public = {"name": "mood", "source": mood.source, "text": "text", "label": "label"}
    with pytest.raises(ConfigError, match="public: 'mood' is a task whose rows the clients hold"):
        make_config(method="gradient", placement="server", public=public)
