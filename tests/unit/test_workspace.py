"""What one process needs to serve any client of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmask.errors import CheckpointError, ConfigError
from fedmask.layout import Segment
from fedmask.masks import Rule, magnitude_mask
from fedmask.methods import METHODS, TASK_SPECIFIC
from fedmask.space import checkpoint_digest
from fedmask.workspace import Workspace, get_workspace
from tests.support import make_model, run_config, save_run_files, state_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_files(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def workspace(folder: Path) -> Workspace:
    return Workspace(run_config(folder))


BIASES = 2 * (64 + 32)
K = round(0.02 * 16384)


@pytest.mark.parametrize(
    ("method", "shared"),
    [
        ("pafi+hiwi", [("mask", K), ("bias", BIASES)]),
        ("pafi", [("mask", K)]),
        ("hiwi", [("bias", BIASES)]),
        ("ffn-bias", [("bias", BIASES)]),
        ("random", [("mask", K)]),
        ("random-matched", [("mask", K)]),
        ("largest", [("mask", K)]),
        ("s2ft", [("mask", K)]),
        ("gradient", [("mask", K)]),
        ("fish", [("mask", K)]),
        ("lt-sft", [("mask", K)]),
        ("diff-pruning", [("mask", K)]),
        ("full", [("backbone", 20640)]),
        # The embeddings' normalisation; per layer four projections, two normalisations, 64 + 32.
        ("bitfit", [("bias", 32 + 2 * (4 * 32 + 2 * 32 + 64 + 32))]),
        ("lora", [("lora", 2 * 2 * 8 * (32 + 32))]),
        ("fedex-lora", [("residual", 2 * 2 * 32 * 32), ("lora", 2 * 2 * 8 * (32 + 32))]),
        ("ffa-lora", [("lora", 2 * 2 * 8 * 32)]),
        ("flasc", [("lora", 2 * 2 * 8 * (32 + 32))]),
        ("adapter", [("adapter", 2 * (2 * 4 * 32 + 4 + 32))]),
        ("head", []),
    ],
)
def test_the_vector_of_each_method(folder: Path, method: str, shared: list[tuple[str, int]]) -> None:
    workspace = Workspace(run_config(folder, method=method))
    if method in TASK_SPECIFIC:
        assert workspace.mask is None  # until it is agreed on
        workspace.use_mask(np.arange(K))
    wanted = tuple(Segment(*segment) for segment in shared)
    assert workspace.layout("mood").segments == (*wanted, Segment("head/mood", 66))
    assert workspace.layout("price").segments == (*wanted, Segment("head/price", 33))
    assert workspace.backbone_size == 20640
    rule = METHODS[method].mask
    assert (workspace.mask is None) is (rule is None) is (workspace.recipe() is None)
    assert workspace.digest == (workspace.mask.digest if workspace.mask else workspace.checkpoint_digest)
    assert workspace.checkpoint_digest == checkpoint_digest(make_model("bert"))


def test_every_method_has_a_case_above() -> None:
    cases = test_the_vector_of_each_method.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {case[0] for case in cases} == set(METHODS)


def test_the_own_head_is_a_segment_with_the_pooler(folder: Path) -> None:
    layout = Workspace(run_config(folder, head="hf", method="pafi")).layout("mood")
    assert layout.segments == (Segment("mask", K), Segment("head/mood", 32 * 32 + 32 + 2 * 32 + 2))


def test_the_mask_is_the_plain_function_s(workspace: Workspace) -> None:
    assert workspace.mask == magnitude_mask(make_model("bert"), 0.02)
    recipe = workspace.recipe()
    assert recipe is not None and recipe.mask == workspace.digest
    assert recipe.checkpoint == workspace.checkpoint_digest


def test_texts_longer_than_the_model_can_read_are_refused_at_once(folder: Path, tmp_path: Path) -> None:
    roberta = save_run_files(tmp_path / "roberta", "roberta")
    for where, limit in ((folder, 40), (roberta, 39)):  # RoBERTa's positions start after the padding token's
        Workspace(run_config(where, train={"max_tokens": limit})).backbone.model(
            torch.full((1, limit), 5), torch.ones(1, limit)
        )
        with pytest.raises(ConfigError, match=rf"reads at most {limit} tokens, found {limit + 1}; lower it"):
            Workspace(run_config(where, train={"max_tokens": limit + 1})).layout("mood")


def test_random_masks_follow_the_run_s_seed(folder: Path) -> None:
    one, two = (Workspace(run_config(folder, method="random", seed=seed)) for seed in (1, 2))
    assert one.rule == Rule("random", 0.02, seed=1) and one.digest != two.digest
    assert Workspace(run_config(folder, seed=2)).digest == Workspace(run_config(folder, seed=1)).digest


def test_a_mask_that_came_by_wire_replaces_the_derived_one(folder: Path) -> None:
    workspace = Workspace(run_config(folder))
    pristine = state_bits(workspace.backbone.model)
    derived = workspace.mask
    assert derived is not None
    model = workspace.model("mood")
    workspace.use_mask(derived.indices.copy())  # the same: nothing to do
    assert workspace.model("mood") is model and workspace.mask is derived
    given = np.arange(5, 400, 9, dtype=np.int64)
    workspace.use_mask(given)
    assert workspace.mask is not derived and np.array_equal(workspace.mask.indices, given)  # type: ignore[union-attr]
    assert workspace.layout("mood").segments[0] == Segment("mask", given.size)
    update = workspace.local_update(0, 1, np.zeros(workspace.layout("mood").size, np.float32))
    assert np.count_nonzero(update.change[: given.size]) > 0.9 * given.size
    assert state_bits(workspace.backbone.model) == pristine
    for wrong in (given[::-1], given.astype(np.int32), np.array([10**9])):
        with pytest.raises(CheckpointError, match="expected sorted unique int64"):
            workspace.use_mask(wrong)
    assert np.array_equal(workspace.mask.indices, given)  # type: ignore[union-attr]
    workspace.use_mask(derived.indices)
    assert workspace.mask == derived and workspace.layout("mood").segments[0].size == K
    with pytest.raises(ConfigError, match="has no mask to replace"):
        Workspace(run_config(folder, method="hiwi")).use_mask(given)


def test_clients_rows_are_dealt_once_and_held_out_rows_are_their_own(workspace: Workspace) -> None:
    assert workspace.tasks == ("mood", "price")
    assert [workspace.task_of(client) for client in range(3)] == ["mood", "mood", "price"]
    everything = np.sort(np.concatenate([workspace.rows(0), workspace.rows(1)]))
    assert np.array_equal(everything, np.arange(len(workspace.data("mood").train)))
    for client in range(3):
        shard = workspace.shard(client)
        assert shard is workspace.shard(client)
        assert len(shard.train) + len(shard.held_out) == len(workspace.rows(client))
        assert len(shard.held_out) == max(1, round(0.1 * len(workspace.rows(client))))
        kept, held = workspace.split(client)
        assert not set(kept) & set(held)


def test_nothing_is_held_out_where_that_is_asked(folder: Path) -> None:
    for partition in ({"kind": "iid", "held_out": 0.0}, {"kind": "iid", "held_out_max": 0}):
        workspace = Workspace(run_config(folder, partition=partition))
        update = workspace.local_update(0, 1, np.zeros(workspace.layout("mood").size, np.float32))
        assert update.examples == len(workspace.rows(0))
        assert "global-score" not in update.metrics and update.metrics["held-out"] == 0


def test_central_rows_are_the_same_choice_each_time(folder: Path, workspace: Workspace) -> None:
    dev = workspace.data("mood").dev
    everything = workspace.central("mood", "dev")
    assert len(everything) == len(dev) > 4
    some = workspace.central("mood", "dev", 4)
    assert len(some) == 4 and some is workspace.central("mood", "dev", 4)
    again = Workspace(run_config(folder)).central("mood", "dev", 4)
    assert np.array_equal(again.tokens, some.tokens) and np.array_equal(again.labels, some.labels)
    assert len(workspace.central("mood", "dev", 10_000)) == len(dev)
    assert len(workspace.central("price", "test")) == len(workspace.data("price").test)


def test_scores_have_the_task_s_metric(workspace: Workspace) -> None:
    for task, metric in (("mood", "accuracy"), ("price", "spearman")):
        zeros = np.zeros(workspace.layout(task).size, np.float32)
        found = workspace.evaluate(task, zeros, workspace.central(task, "test"))
        assert set(found) == {"loss", metric} and all(np.isfinite(list(found.values())))


def test_one_workspace_a_process_and_config(folder: Path) -> None:
    one = get_workspace(run_config(folder))
    assert get_workspace(run_config(folder)) is one
    assert get_workspace(run_config(folder, seed=5)) is not one


def test_a_mask_of_one_s_own_leaves_the_run_s_alone(workspace: Workspace) -> None:
    """What a client would choose by its gradients, to be compared with the shared mask."""
    before: Any = state_bits(workspace.backbone.model)
    rule = Rule("gradient", 0.02)
    mine, theirs = (workspace.scores("gradient", client).mask(rule) for client in (0, 1))
    assert mine.k == theirs.k == K and mine != theirs and mine != workspace.mask
    assert mine == workspace.scores("gradient", 0).mask(rule)
    assert state_bits(workspace.backbone.model) == before
