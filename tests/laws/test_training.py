"""A client's local work: frozen entries keep their bits, and the result is a function of its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmask.config import TrainConfig
from fedmask.errors import CheckpointError
from fedmask.layout import sent
from fedmask.methods import METHODS, TASK_SPECIFIC
from fedmask.space import backbone_of, backbone_parameters
from fedmask.tasks import Tokenized, batches
from fedmask.trainables import CarriedMatrices, DenseTensors, MaskedEntries
from fedmask.training import Stream, evaluate, local_update, train, tuned
from fedmask.tuner import attach, tuning_of
from fedmask.workspace import Workspace
from tests.support import (
    bits,
    make_model,
    random_state_untouched,
    run_config,
    save_run_files,
    state_bits,
    tokens,
)

# (method, options of the run) in every way that something can be trained and sent
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "weight adapters on the mask": {
        "method": "pafi+hiwi",
        "density": 0.05,
        "adapter": {"target": "weight", "bottleneck": 4},
    },
    "everything eligible": {"method": "pafi+hiwi", "eligible": "all", "per_tensor": True, "density": 0.05},
    "own head": {"method": "pafi", "head": "hf"},
    "plain descent": {
        "method": "pafi",
        "train": {"batch_size": 8, "max_tokens": 16, "lr": 0.1, "optimizer": "sgd", "weight_decay": 0.1,
                  "clip_norm": 0.5, "dropout": 0.3},
    },
}  # fmt: skip
EACH_WAY = pytest.mark.parametrize("way", list(WAYS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_files(tmp_path_factory.mktemp("run"))


def made(folder: Path, way: str) -> Workspace:
    """A fresh workspace, with its mask where that has to be found before anything trains."""
    workspace = Workspace(run_config(folder, **WAYS[way]))
    if way in TASK_SPECIFIC:
        rule = workspace.rule
        assert rule is not None
        workspace.use_mask(workspace.scores(rule.name, 0).mask(rule).indices)
    return workspace


@pytest.fixture(scope="module")
def workspaces(folder: Path) -> dict[str, Workspace]:
    return {way: made(folder, way) for way in WAYS}


def some_vector(workspace: Workspace, task: str, scale: float = 0.01) -> np.ndarray:
    size = workspace.layout(task).size
    return (np.random.default_rng(size).standard_normal(size) * scale).astype(np.float32)


@EACH_WAY
def test_frozen_entries_keep_their_bits(workspaces: dict[str, Workspace], way: str) -> None:
    """Inside, of the backbone's own tensors only masked entries differ; afterwards none does."""
    workspace = workspaces[way]
    shard = workspace.shard(0)
    model = workspace.model(shard.task)
    before = state_bits(workspace.backbone.model)
    stream = Stream(1, 1, 0)
    with tuned(model, some_vector(workspace, shard.task), stream) as tuning:
        train(model, shard.train, workspace.config.train, workspace.backbone.pad_id, stream)
        inside = workspace.backbone.model.state_dict()
        carried = [part.names for part in tuning.trainables if isinstance(part, CarriedMatrices)]
        whole = {name for names in carried for name in names}  # what the server has added to weights
        places = workspace.mask.per_tensor() if workspace.mask else {}
        pristine = _read(before, inside)
        moved = 0
        for name, tensor in inside.items():
            different = np.flatnonzero((tensor != pristine[name]).view(-1).numpy())
            assert name in whole or np.isin(different, places.get(name, [])).all(), name
            moved += different.size
        assert (moved > 0) is (workspace.mask is not None or bool(whole))
    assert state_bits(workspace.backbone.model) == before
    workspace.local_update(0, 1, some_vector(workspace, shard.task))
    assert state_bits(workspace.backbone.model) == before
    workspace.evaluate(shard.task, some_vector(workspace, shard.task), shard.held_out)
    assert state_bits(workspace.backbone.model) == before


def _read(before: dict[str, bytes], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.frombuffer(bytearray(before[name]), dtype=tensor.dtype).view(tensor.shape)
        for name, tensor in like.items()
    }


def test_an_error_in_the_middle_leaves_the_backbone_as_it_was(workspaces: dict[str, Workspace]) -> None:
    workspace = workspaces["pafi+hiwi"]
    before = state_bits(workspace.backbone.model)
    vector = some_vector(workspace, "mood")
    with (
        pytest.raises(RuntimeError, match="stop"),
        tuned(workspace.model("mood"), vector, Stream(1, 1, 0)),
    ):
        assert state_bits(workspace.backbone.model) != before
        raise RuntimeError("stop")
    assert state_bits(workspace.backbone.model) == before
    for wrong in (vector[:-1], np.append(vector, np.float32(0))):
        with pytest.raises(CheckpointError, match="vector: expected"):
            workspace.local_update(0, 1, wrong)
    assert state_bits(workspace.backbone.model) == before


@EACH_WAY
def test_a_local_update_is_a_function_of_vector_shard_and_stream(
    workspaces: dict[str, Workspace], folder: Path, way: str
) -> None:
    workspace = workspaces[way]
    vector = some_vector(workspace, "mood")
    vector.setflags(write=False)  # as it comes out of an envelope
    given = vector.copy()
    with random_state_untouched():
        first = workspace.local_update(0, 1, vector)
    assert np.array_equal(vector, given)
    assert first.change.dtype == np.float32 and first.change.shape == vector.shape
    trained = sent(workspace.layout("mood")).size
    assert np.isfinite(first.change).all() and np.count_nonzero(first.change) > 0.5 * trained
    assert first.examples == len(workspace.shard(0).train)
    assert set(first.metrics) == {
        "global-score", "global-loss", "personal-score", "personal-loss", "train-loss", "steps", "held-out",
    }  # fmt: skip
    # Other clients, tasks, rounds and evaluations in between, and another process's fresh workspace.
    torch.manual_seed(12345)
    np.random.seed(7)
    other = workspace.local_update(2, 1, some_vector(workspace, "price"))
    assert other.change.shape == (workspace.layout("price").size,)
    later = workspace.local_update(0, 2, vector)
    neighbour = workspace.local_update(1, 1, vector)
    workspace.evaluate("mood", vector, workspace.central("mood", "dev", 5))
    again = workspace.local_update(0, 1, vector)
    assert bits_of(again.change) == bits_of(first.change) and again.metrics == first.metrics
    fresh = made(folder, way).local_update(0, 1, vector)
    assert bits_of(fresh.change) == bits_of(first.change) and fresh.metrics == first.metrics
    assert bits_of(later.change) != bits_of(first.change) != bits_of(neighbour.change)


def bits_of(array: np.ndarray) -> bytes:
    return array.tobytes()


def test_nothing_else_is_read_or_changed_while_the_workspace_is_built(folder: Path) -> None:
    """Loading a model whose checkpoint lacks parts draws numbers: not from anybody's global state."""
    for head in ("hf", "mean"):
        with random_state_untouched():
            workspace = Workspace(run_config(folder, head=head))
            workspace.layout("mood")
            workspace.shard(0)


@EACH_WAY
def test_scores_are_those_of_the_received_and_of_the_trained_model(
    workspaces: dict[str, Workspace], way: str
) -> None:
    workspace = workspaces[way]
    vector = some_vector(workspace, "mood")
    update = workspace.local_update(0, 1, vector)
    held_out = workspace.shard(0).held_out
    assert update.metrics["held-out"] == len(held_out) > 0
    before = workspace.evaluate("mood", vector, held_out)
    after = workspace.evaluate("mood", vector + update.change, held_out)
    assert update.metrics["global-loss"] == pytest.approx(before["loss"], abs=1e-6)
    assert update.metrics["personal-loss"] == pytest.approx(after["loss"], abs=1e-5)
    assert update.metrics["global-score"] == before["accuracy"]


def test_regression_and_classification_learn(workspaces: dict[str, Workspace]) -> None:
    workspace = workspaces["full"]
    for client, task in ((0, "mood"), (2, "price")):
        vector = np.zeros(workspace.layout(task).size, np.float32)
        rows = workspace.shard(client).train
        before = workspace.evaluate(task, vector, rows)["loss"]
        for round in range(3):
            vector = vector + workspace.local_update(client, round, vector).change
        assert workspace.evaluate(task, vector, rows)["loss"] < 0.9 * before


# Local training by itself ---------------------------------------------------------------------------

PLAN = TrainConfig(batch_size=4, lr=0.01, dropout=0.0)


class Classifier(nn.Module):
    """A backbone with a linear layer on the first token."""

    def __init__(self, architecture: str = "bert", outputs: int = 3) -> None:
        super().__init__()
        self.backbone = make_model(architecture)
        self.head = nn.Linear(32, outputs)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-0.1, 0.1, 32 * outputs).view(outputs, 32))
            self.head.bias.zero_()

    @property
    def base_model(self) -> nn.Module:
        return self.backbone

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.backbone(**inputs).last_hidden_state[:, 0])
        return out


def attached(*, mask: bool = True, outputs: int = 3, **rule: Any) -> Classifier:
    from fedmask import magnitude_mask

    model = Classifier(outputs=outputs)
    parts: list[Any] = [MaskedEntries(model, magnitude_mask(model, 0.05, **rule))] if mask else []
    attach(model, [*parts, DenseTensors("head/x", model, ["head.weight", "head.bias"])])
    return model


def update(model: nn.Module, plan: TrainConfig, data: Tokenized, held_out: int = 0, **stream: int) -> Any:
    size = tuning_of(model).layout.size
    rows = np.arange(len(data))
    return local_update(
        model,
        np.zeros(size, np.float32),
        data.select(rows[held_out:]),
        data.select(rows[:held_out]),
        metric="spearman" if data.labels.dtype == np.float32 else "accuracy",
        plan=plan,
        pad_id=0,
        stream=Stream(**{"seed": 1, "round": 1, "client": 0, **stream}),
    )


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 3),
        ({"epochs": 2.0}, 6),
        ({"epochs": 0.5}, 2),  # round(1.5) steps
        ({"epochs": 0.01}, 1),
        ({"epochs": 1.7}, 5),
        ({"steps": 2}, 2),
        ({"steps": 99}, 3),
        ({"epochs": 3.0, "steps": 7}, 7),
        ({"batch_size": 1}, 12),
        ({"batch_size": 5}, 3),
        ({"batch_size": 500}, 1),
    ],
)
def test_number_of_steps(changes: dict[str, Any], steps: int) -> None:
    found = update(attached(), PLAN.model_copy(update=changes), tokens(12))
    assert found.metrics["steps"] == steps and found.examples == 12


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmask import training

    seen: list[np.ndarray] = []
    inner = training.collate

    def spy(data: Tokenized, rows: np.ndarray, pad_id: int) -> Any:
        seen.append(rows)
        return inner(data, rows, pad_id)

    monkeypatch.setattr(training, "collate", spy)
    update(attached(), PLAN.model_copy(update={"epochs": 2.0}), tokens(11))
    epochs = [np.concatenate(seen[:3]), np.concatenate(seen[3:])]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    first = list(seen)
    seen.clear()
    update(attached(), PLAN.model_copy(update={"epochs": 2.0}), tokens(11), client=1)
    assert [rows.tolist() for rows in seen] != [rows.tolist() for rows in first]


def test_one_row() -> None:
    found = update(attached(), PLAN, tokens(1))
    assert found.examples == 1 and found.metrics["steps"] == 1 and np.isfinite(found.change).all()
    assert set(found.metrics) == {"train-loss", "steps", "held-out"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_against_a_plain_loop_over_the_whole_model(optimizer: str, clip: float | None) -> None:
    """Dense training of a copy in which all gradients but the masked ones are thrown away before clipping."""
    from fedmask import magnitude_mask
    from fedmask.rng import rng_for
    from fedmask.tasks import collate

    plan = PLAN.model_copy(
        update={"optimizer": optimizer, "clip_norm": clip, "head_lr": 0.03, "epochs": 2.0, "lr": 0.02}
    )
    data = tokens(12)
    found = update(attached(), plan, data)

    model = Classifier()
    mask = magnitude_mask(model, 0.05)
    places = mask.per_tensor()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = ["backbone." + name for name in mask.space.names]
    groups = [
        {"params": [model.get_parameter(n) for n in names], "lr": 0.02},
        {"params": list(model.head.parameters()), "lr": 0.03},
    ]
    chosen: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    options = {"momentum": plan.momentum} if optimizer == "sgd" else {}
    optimizer_ = chosen(groups, lr=0.02, weight_decay=0.0, **options)
    order = rng_for(1, 1, 0, "batches")
    for _ in range(2):
        for rows in batches(data, 4, order):
            inputs = collate(data, rows, 0)
            labels = inputs.pop("labels")
            model.zero_grad()
            nn.functional.cross_entropy(model(**inputs), labels).backward()
            trained = [*model.head.parameters()]
            for name in mask.space.names:
                parameter = model.get_parameter("backbone." + name)
                keep = torch.zeros(parameter.numel())
                keep[torch.from_numpy(places.get(name, np.array([], np.int64)))] = 1
                parameter.grad *= keep.view(parameter.shape)  # type: ignore[operator]
                trained.append(parameter)
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            optimizer_.step()
    changes = [
        (model.get_parameter("backbone." + name) - start["backbone." + name])
        .detach()
        .view(-1)[torch.from_numpy(at)]
        for name, at in places.items()
    ]
    changes += [(p - start["head." + name]).detach().view(-1) for name, p in model.head.named_parameters()]
    wanted = torch.cat(changes).numpy()
    scale = np.abs(wanted).max()
    # Where Adam's gradient is nearly zero its step is the gradient's sign: a few entries may differ.
    off = np.abs(found.change - wanted) > 1e-3 * scale + 1e-6
    assert off.mean() < (0.02 if optimizer == "adamw" else 1e-9)


def test_weight_decay_pulls_the_change_and_not_the_weight_to_zero() -> None:
    """With a decay that overwhelms learning, what is left of a change is nothing: the checkpoint."""
    model = attached()
    plan = PLAN.model_copy(
        update={"optimizer": "sgd", "momentum": 0.0, "lr": 1e-3, "weight_decay": 999.0, "steps": 1}
    )
    vector = np.full(tuning_of(model).layout.size, 0.5, np.float32)
    found = local_update(
        model, vector, tokens(8), tokens(0), metric="accuracy", plan=plan, pad_id=0, stream=Stream(1, 1, 0)
    )
    assert np.abs(vector + found.change).max() < 0.01


def test_entries_that_the_rows_do_not_touch_do_not_move() -> None:
    """Embedding rows of tokens that are not in the shard: no gradient, no change, whatever the optimizer."""
    data = tokens(6)
    for optimizer in ("adamw", "sgd"):
        model = attached(eligible="linear+embeddings", per_tensor=True)
        plan = PLAN.model_copy(update={"optimizer": optimizer, "epochs": 3.0})
        change = update(model, plan, data).change
        mask = tuning_of(model).trainables[0].mask  # type: ignore[union-attr]
        assert mask.space.names[0] == "embeddings.word_embeddings.weight"
        words = mask.indices[mask.indices < mask.space.offsets[1]] // 32
        used = np.isin(words, data.tokens)
        moved = change[: len(words)] != 0
        assert used.any() and not used.all()
        assert moved[used].mean() > 0.9 and not moved[~used].any()


def test_learning_rates_by_segment() -> None:
    plan = PLAN.model_copy(update={"optimizer": "sgd", "momentum": 0.0, "clip_norm": None, "steps": 1})
    base = update(attached(), plan, tokens(8)).change
    faster = update(attached(), plan.model_copy(update={"head_lr": 0.02}), tokens(8)).change
    k = base.size - 99
    assert np.array_equal(faster[:k], base[:k])
    np.testing.assert_allclose(faster[k:], 2 * base[k:], rtol=1e-6)


def test_a_head_alone_and_regression() -> None:
    data = tokens(10, regression=True)
    found = update(attached(mask=False, outputs=1), PLAN, data, held_out=4)
    assert found.change.shape == (33,) and np.count_nonzero(found.change) == 33
    assert found.examples == 6 and found.metrics["held-out"] == 4
    assert -1 <= found.metrics["global-score"] <= 1


def test_dropout_comes_from_the_stream(folder: Path) -> None:
    config = run_config(folder, method="head")
    workspace = Workspace(config)
    vector = np.zeros(workspace.layout("mood").size, np.float32)
    with_dropout = workspace.local_update(0, 1, vector).change
    options = config.train.model_copy(update={"dropout": 0.0})
    without = Workspace(config.model_copy(update={"train": options})).local_update(0, 1, vector).change
    assert not np.allclose(with_dropout, without)
    torch.manual_seed(99)
    assert bits_of(workspace.local_update(0, 1, vector).change) == bits_of(with_dropout)


def test_evaluation_means_over_rows_and_leaves_no_trace() -> None:
    """Whatever the batches, the loss is the mean over rows; and evaluating does not stop training."""
    model = attached()
    data = tokens(70)
    with tuned(model, np.zeros(tuning_of(model).layout.size, np.float32), Stream(1, 1, 0)):
        found = evaluate(model, data, "accuracy", 0)
        losses, hits = [], []
        for row in range(len(data)):
            one = data.select(np.array([row]))
            scores = evaluate(model, one, "accuracy", 0)
            losses.append(scores["loss"])
            hits.append(scores["accuracy"])
        assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-6)
        assert found["accuracy"] == pytest.approx(np.mean(hits))
        assert all(p.grad is None for p in model.parameters())
        loss, steps = train(model, data, PLAN, 0, Stream(1, 1, 0))
        assert steps == 18 and np.isfinite(loss) and not model.training


def test_a_shared_backbone_serves_two_tasks_in_turn(workspaces: dict[str, Workspace]) -> None:
    workspace = workspaces["everything eligible"]
    mood, price = workspace.model("mood"), workspace.model("price")
    ours, theirs = backbone_parameters(mood), backbone_parameters(price)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert backbone_of(mood) is not backbone_of(price)
    one, two = some_vector(workspace, "mood"), some_vector(workspace, "price", 0.05)
    alone = workspace.evaluate("price", two, workspace.central("price", "dev"))
    # Even where nobody puts the tensors back, the next one to begin finds them at its own values.
    for model, vector in ((price, two), (mood, one), (price, two)):
        tuning_of(model).begin(torch.tensor(vector), Stream(1, -1, -1).shared())
    inputs = workspace.central("price", "dev")
    assert evaluate(price, inputs, "spearman", workspace.backbone.pad_id) == alone
    tuning_of(price).restore()
    tuning_of(mood).restore()
    with tuned(mood, one, Stream(1, 1, 0)):
        assert bits(ours["embeddings.word_embeddings.weight"]) == bits(
            theirs["embeddings.word_embeddings.weight"]
        )
    assert workspace.evaluate("price", two, workspace.central("price", "dev")) == alone
