"""What tasks share: everything but heads, less than that, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr.app import Context, RecordDict

from clients.heads import keep_own_head, with_own_head
from experiments.engines import run_inprocess
from experiments.report import write_report
from fedmask.config import RunConfig
from fedmask.delta import read_delta
from fedmask.errors import ConfigError, DataError
from fedmask.export import export_run
from fedmask.workspace import get_workspace
from tests.apps.grids import read_rows
from tests.apps.test_resume import Cuts, PowerCut

MakeConfig = Callable[..., RunConfig]


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert np.any(wanted)


def sharing(kind: str, **more: Any) -> dict[str, Any]:
    return {"sharing": kind, **more}


def test_apart_each_task_trains_as_if_it_were_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    together = run_inprocess(make_config((2, 1), name="apart", server=sharing("by-task")))
    alone = run_inprocess(make_config((2,), name="alone"))
    close(together.state.heads["mood"], np.concatenate([alone.state.shared, alone.state.heads["mood"]]))
    assert not together.state.shared.size
    assert np.any(together.state.heads["topic"])
    (mood, topic) = export_run(together.folder, tmp_path / "out")
    segments = read_delta(together.folder / "delta.safetensors").segments
    assert {"mask/mood", "mask/topic", "bias/mood", "bias/topic", "head/mood"} <= set(segments)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (mood, topic)]
    assert weights[0] != weights[1]


def test_a_head_s_only_client_may_as_well_keep_it(make_config: MakeConfig, tmp_path: Path) -> None:
    """With one client a task, a head that stays is the head that would have come back."""
    home = run_inprocess(make_config((1, 1), name="home", rounds=3, server=sharing("local-heads")))
    sent = run_inprocess(make_config((1, 1), name="sent", rounds=3))
    close(home.state.shared, sent.state.shared)
    assert all(head.size == 0 for head in home.state.heads.values())

    # Only what is shared travels, and nobody but the clients can score.
    shared, heads = sent.state.shared.size, sum(head.size for head in sent.state.heads.values())
    rows = [read_rows(run.folder, "rounds")[1:] for run in (home, sent)]
    for one, other in zip(*rows, strict=True):
        assert one["bytes"]["up"] == other["bytes"]["up"] - 4 * heads == 2 * 4 * shared
        assert one["bytes"]["down"] == other["bytes"]["down"] - 4 * heads
        assert one["dev"] == {} and set(one["personal"]) == {"mood", "topic"}
    clients = [json.loads((run.folder / "summary.json").read_text())["clients"] for run in (home, sent)]
    assert clients[0].keys() == clients[1].keys() == {"mood", "topic"}
    for task in clients[0]:
        assert clients[0][task]["loss"] == pytest.approx(clients[1][task]["loss"], rel=1e-4)
    with pytest.raises(ConfigError, match="heads stayed with its clients"):
        export_run(home.folder, tmp_path / "out")


@pytest.mark.parametrize("place", ["start", "end"])
def test_heads_that_stay_are_found_again_after_an_interruption(make_config: MakeConfig, place: str) -> None:
    """In the first case by two workers, whose number changes no bit either."""
    whole = run_inprocess(
        make_config(
            (2,), name="whole", rounds=3, workers=1 + (place == "start"), server=sharing("local-heads")
        )
    )
    config = make_config((2,), rounds=3, server=sharing("local-heads"))
    with pytest.raises(PowerCut):
        run_inprocess(config, Cuts(place, 2))
    found = run_inprocess(config, existing="resume")
    for key in ("vector_sha256", "clients"):
        assert found.summary[key] == whole.summary[key]


def test_a_head_is_kept_by_round_and_a_lost_one_begins_again(make_config: MakeConfig) -> None:
    workspace = get_workspace(make_config(server=sharing("local-heads")))
    size = workspace.layout("mood").size
    received = np.zeros(workspace.down_terms(0, 0).layout.size, np.float32)
    context = Context(1, 1, {}, RecordDict(), {})
    start = with_own_head(workspace, context, 0, received, 1)
    assert start.size == size and not start.any()
    change = np.ones(size, np.float32)
    assert keep_own_head(context, 1, start, change, received.size).size == received.size
    head = slice(received.size, None)
    assert (with_own_head(workspace, context, 0, received, 2)[head] == 1).all()
    assert not with_own_head(workspace, context, 0, received, 1).any()  # the round is done again
    lost = Context(1, 1, {}, RecordDict(), {})
    assert not with_own_head(workspace, lost, 0, received, 2).any()
    everything = get_workspace(make_config())
    whole = np.zeros(everything.layout("mood").size, np.float32)
    assert with_own_head(everything, lost, 0, whole, 2) is whole
    assert keep_own_head(lost, 1, whole, whole, whole.size).size == whole.size
    assert not lost.state


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"server": {"sharing": "by-task", "strategy": "fedadam"}}, "use one of fedavg, mean"),
        ({"server": {"sharing": "local-heads"}, "mask_schedule": "rotate"}, "expected one fixed mask"),
        ({"server": {"sharing": "by_task"}}, "'by-task'"),
    ],
)
def test_what_does_not_go_together(make_config: MakeConfig, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config(**changes)


def test_heads_that_stay_have_a_report(make_config: MakeConfig) -> None:
    """The server has no whole model to score: what it cannot know is a dash, the rest stands."""
    result = run_inprocess(make_config((2, 1), server=sharing("local-heads")))
    text = write_report(result.folder).read_text(encoding="utf-8")
    personal = read_rows(result.folder, "rounds")[-1]["personal"]
    for task in ("mood", "topic"):
        assert f"| {task} | accuracy | - | - | - | {personal[task]:.3f} |" in text
    for name in ("quality_bytes.png", "rounds.png"):
        assert (result.folder / "figures" / name).stat().st_size > 2000
    assert "this run (pafi+hiwi), measured" in text


def test_sixteen_domains_are_sixteen_clients(make_config: MakeConfig, tiny: Path, tmp_path: Path) -> None:
    """A column of the file says who holds which rows: each of 16 domains is a client, in sorted order."""
    lines = (tiny / "mood.tsv").read_text(encoding="utf-8").splitlines()
    domains = [f"domain-{number:02}" for number in range(16)]
    rows = [f"{line}\t{domains[(7 * number) % 16]}" for number, line in enumerate(lines[1:])]
    path = tmp_path / "reviews.tsv"
    path.write_text("\n".join([f"{lines[0]}\tdomain", *rows]) + "\n", encoding="utf-8")
    task = {"name": "reviews", "source": str(path), "text": ["text"], "label": "label", "clients": 16}
    small = {"steps": 1, "batch_size": 4, "max_tokens": 8}
    config = make_config(tasks=[task], partition={"kind": "natural", "column": "domain"}, rounds=1,
                         method="pafi", overlap_batches=0, train=small)  # fmt: skip
    result = run_inprocess(config)
    assert read_rows(result.folder, "rounds")[1]["replied"] == list(range(16))
    workspace = get_workspace(config)
    column = workspace.data("reviews").train["domain"][:]
    for client, domain in enumerate(domains):
        kept, held = workspace.split(client)
        found = {column[int(row)] for row in (*kept, *held)}
        assert found == {domain} and len(kept) > len(held) > 0
    with pytest.raises(DataError, match="column 'domain' has 16 values; set clients to 16"):
        run_inprocess(make_config(tasks=[task | {"clients": 8}], name="eight", partition=config.partition))
