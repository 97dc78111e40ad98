"""A model that looks through a view is the plain model with the carried change in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmask.errors import CheckpointError
from fedmask.layout import Layout, Segment
from fedmask.masks import Mask, Rule, derive_mask
from fedmask.space import backbone_parameters
from fedmask.trainables import CarriedEntries, MaskedEntries
from fedmask.training import Stream, local_update, tuned
from fedmask.tuner import attach, tuning_of
from fedmask.unions import SparseChange, put, take, union
from fedmask.views import View, beside_size, down_layout, turn, up_layout, view_of
from fedmask.workspace import Workspace
from tests.support import batch, draw, make_model, outputs, run_config, save_run_files, state_bits, tokens


def change_over(*masks: Mask, seed: int = 0) -> SparseChange:
    indices = union(*(mask.indices for mask in masks))
    return SparseChange(
        indices, (np.random.default_rng(seed).standard_normal(indices.size) * 0.1).astype("f4")
    )


def masks_of(model: Any, count: int = 3, density: float = 0.03) -> list[Mask]:
    return [derive_mask(model, Rule("random", density, seed=seed)) for seed in range(count)]


def moved(model: Any, change: SparseChange, mask: Mask) -> Any:
    """The plain model with the change in its weights."""
    parameters = backbone_parameters(model)
    parts = zip(mask.space.names, mask.space.split(change.indices), strict=True)
    start = 0
    with torch.no_grad():
        for name, part in parts:
            values = torch.from_numpy(change.values[start : start + part.size])
            parameters[name].view(-1)[torch.from_numpy(part)] += values
            start += part.size
    return model


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_view_is_the_dense_model(architecture: str) -> None:
    model, plain = make_model(architecture), make_model(architecture)
    mine, *others = masks_of(model)
    change = change_over(mine, *others)
    before = state_bits(model)
    carried = CarriedEntries(model, mine.space)
    attach(model, [carried, MaskedEntries(model, mine)])
    view = view_of(change, mine)
    assert not np.intersect1d(view.carried, mine.indices).size
    assert view.carried.size + mine.k == change.size
    carried.place(view.carried)
    vector = view.read(change, np.empty(0, np.float32))
    with tuned(model, vector, Stream(0, 1, 0)) as tuning:
        assert torch.equal(outputs(model), outputs(moved(plain, change, mine)))
        np.testing.assert_array_equal(tuning.vector().numpy(), vector)
        outputs(model).sum().backward()
        (trained,) = [t for t in tuning.trainables if t.values.numel()]
        assert trained.values.grad is not None
        assert trained.values.numel() == mine.k
    assert {k: v for k, v in state_bits(model).items() if not k.startswith("fedmask.")} == before


def test_training_through_a_view_is_training_the_moved_model() -> None:
    """Nothing but the trained entries moves, and they move as they would in a model that starts there."""
    from fedmask.config import TrainConfig
    from fedmask.models import MeanHead

    plan = TrainConfig(batch_size=4, steps=3, max_tokens=16, lr=0.01, dropout=0.0)

    def start(model: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MeanHead(model, 3, 0.0).eval()

    def trained(model: Any, vector: np.ndarray) -> np.ndarray:
        return local_update(
            model, vector, tokens(), tokens(0), metric="accuracy", plan=plan, pad_id=0, stream=Stream(0, 1, 0)
        ).change

    base = make_model("bert")
    mine, *others = masks_of(base)
    elsewhere = change_over(*others)
    elsewhere = put(
        elsewhere, mine.indices, np.zeros(mine.k, np.float32)
    )  # so that mine starts at the reference
    seen = start(make_model("bert"))
    carried = CarriedEntries(seen, mine.space)
    attach(seen, [carried, MaskedEntries(seen, mine)])
    view = view_of(elsewhere, mine)
    carried.place(view.carried)
    through = trained(seen, view.read(elsewhere, np.empty(0, np.float32)))

    plain = start(moved(make_model("bert"), elsewhere, mine))
    attach(plain, [MaskedEntries(plain, mine)])
    np.testing.assert_array_equal(view.sent(through), trained(plain, np.zeros(mine.k, np.float32)))
    assert not through[: view.carried.size].any()
    assert np.abs(view.sent(through)).max() > 0


def test_carrying_nothing_is_not_carrying() -> None:
    model, plain = make_model("bert"), make_model("bert")
    mask = masks_of(model, 1)[0]
    values = np.linspace(-0.1, 0.1, mask.k, dtype=np.float32)
    for one, parts in ((model, [CarriedEntries(model, mask.space)]), (plain, [])):
        attach(one, [*parts, MaskedEntries(one, mask)])
    with tuned(model, values, Stream(0, 1, 0)), tuned(plain, values, Stream(0, 1, 0)):
        assert torch.equal(outputs(model, batch()), outputs(plain, batch()))


def test_turning_to_another_mask() -> None:
    model = make_model("bert")
    first, second, _ = masks_of(model)
    before = state_bits(model)
    carried = CarriedEntries(model, first.space)
    attach(model, [carried, MaskedEntries(model, first)])
    change = change_over(first, second)
    for mask in (first, second, first):
        turn(model, mask)
        view = view_of(change, mask)
        carried.place(view.carried)
        assert tuning_of(model).layout == Layout(
            (Segment("carried", view.carried.size), Segment("mask", mask.k))
        )
        fresh = moved(make_model("bert"), change, mask)
        with tuned(model, view.read(change, np.empty(0, np.float32)), Stream(0, 1, 0)):
            assert torch.equal(outputs(model), outputs(fresh))
    assert {k: v for k, v in state_bits(model).items() if not k.startswith("fedmask.")} == before


def test_beginning_anew_and_moving_on_leave_nothing_behind() -> None:
    model = make_model("bert")
    first, second, _ = masks_of(model)
    before = state_bits(model)
    carried = CarriedEntries(model, first.space)
    carried.place(first.indices)
    carried.begin(torch.ones(first.k), draw())
    carried.begin(torch.ones(first.k), draw())
    carried.place(second.indices)
    assert state_bits(model) == before
    with pytest.raises(CheckpointError, match="expected indices below"):
        carried.place(np.array([first.space.size]))


def test_layouts_of_messages() -> None:
    layout = Layout((Segment("carried", 7), Segment("mask", 3), Segment("bias", 4), Segment("head/a", 2)))
    assert down_layout(layout, 9).segments == (Segment("union", 9), Segment("bias", 4), Segment("head/a", 2))
    assert up_layout(layout, 3).segments == (Segment("mask", 3), Segment("bias", 4), Segment("head/a", 2))
    assert beside_size(layout) == 4


def test_a_workspace_serves_clients_with_masks_of_their_own(tmp_path: Path) -> None:
    workspace = Workspace(run_config(save_run_files(tmp_path / "run")))
    model = workspace.backbone.model
    before = state_bits(model)
    first, second, third = masks_of(model)
    change = change_over(first, second, third)
    sent = Layout((Segment("mask", first.k), Segment("bias", 192), Segment("head/mood", 66)))
    beside = np.zeros(beside_size(sent) + 66, np.float32)
    results = []
    for mask in (first, second, first):
        view = view_of(change, mask)
        assert up_layout(workspace.layout("mood", view), mask.k) == sent
        results.append(workspace.local_update(0, 1, view.read(change, beside), view).change)
        assert not results[-1][: view.carried.size].any()
    assert workspace.model("mood", view_of(change, first)) is workspace.model("mood", view_of(change, second))
    np.testing.assert_array_equal(results[0], results[2])
    only = View(workspace.no_mask, change.indices)  # what a server scores
    data = workspace.central("mood", "dev", 8)
    scored = workspace.evaluate("mood", only.read(change, beside), data, only)
    view = view_of(change, third)
    assert workspace.evaluate("mood", view.read(change, beside), data, view) == scored
    np.testing.assert_array_equal(take(change, only.carried), change.values)
    assert state_bits(model) == before
