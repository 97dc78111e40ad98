"""Masks from labelled rows: scores against slow references, and one mask from many clients' messages."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmask.config import ScoreConfig, TrainConfig
from fedmask.errors import CheckpointError, ConfigError, DataError, FedmaskError
from fedmask.masks import (
    Evidence,
    Rule,
    Scores,
    agree_by_scores,
    agree_by_votes,
    magnitude_mask,
    mask_size,
    pack_top_scores,
    pack_votes,
    random_matched,
    score_entries,
)
from fedmask.masks.votes import unpack_top_scores, unpack_votes
from fedmask.rng import rng_for
from fedmask.space import ParameterSpace, backbone_parameters, parameter_space
from fedmask.tasks import batches
from fedmask.training import batch_loss
from tests.support import ARCHITECTURES, make_model, random_state_untouched, state_bits, tokens

PLAN = TrainConfig(batch_size=4)


class Labelled(nn.Module):
    """Logits alone, as the models of the task layer give them."""

    def __init__(self, architecture: str = "bert", seed: int = 0) -> None:
        super().__init__()
        self.model = make_model(architecture, classes=3, seed=seed)

    @property
    def base_model(self) -> nn.Module:
        found: nn.Module = self.model.base_model
        return found

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs).logits
        return logits


def evidence(rows: int = 12, client: int = 0) -> Evidence:
    return Evidence(tokens(rows, seed=client + 1), 0, PLAN, seed=7, client=client)


def top(scores: np.ndarray, space: ParameterSpace, density: float) -> np.ndarray:
    """The k largest by a stable sort, padding rows left out."""
    allowed = np.ones(space.size, bool)
    for start, stop in space.excluded:
        allowed[start:stop] = False
    places = np.flatnonzero(allowed)
    order = np.argsort(-scores[places], kind="stable")
    return np.sort(places[order[: mask_size(density, space.eligible_size)]])


def flat(scores: Scores) -> np.ndarray:
    return np.concatenate([tensor.reshape(-1).numpy() for tensor in scores.tensors])


# Rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eligible", ["linear", "all"])
def test_gradient_scores_are_the_mean_over_the_first_batches(eligible: Any) -> None:
    model, given = Labelled(), evidence()
    space = parameter_space(model, eligible)
    before = state_bits(model)
    with random_state_untouched():
        scores = score_entries("gradient", model, space, given, ScoreConfig(batches=2))
    assert state_bits(model) == before and all(p.grad is None for p in model.parameters())
    total = np.zeros(space.size)
    order = rng_for(7, -1, 0, "mask")
    for rows in batches(given.data, 4, order)[:2]:
        model.zero_grad()
        batch_loss(model, given.data, rows, 0).backward()
        named = backbone_parameters(model)
        total += np.concatenate([named[name].grad.reshape(-1).numpy() for name in space.names]) / 2
    np.testing.assert_allclose(flat(scores), np.abs(total), rtol=1e-4, atol=1e-8)
    mask = scores.mask(Rule("gradient", 0.01, eligible))
    assert np.array_equal(mask.indices, top(flat(scores), space, 0.01))
    np.testing.assert_array_equal(scores.at(mask.indices), flat(scores)[mask.indices])


def test_sift_takes_a_share_of_each_tensor() -> None:
    model = Labelled()
    space = parameter_space(model)
    scores = score_entries("gradient", model, space, evidence(), ScoreConfig())
    mask = scores.mask(Rule("gradient", 0.01, per_tensor=True))
    for name, found in mask.per_tensor().items():
        values = scores.read(name).reshape(-1).numpy()
        assert abs(found.size - 0.01 * values.size) < 1
        assert values[found].min() >= np.delete(values, found).max()


def test_a_rule_without_rows_and_an_unknown_rule() -> None:
    model = Labelled()
    space = parameter_space(model)
    with pytest.raises(DataError, match="expected labelled rows, found none"):
        score_entries("gradient", model, space, evidence(0), ScoreConfig())
    with pytest.raises(ConfigError, match=r"unknown task-specific mask rule 'gradients'; .*'gradient'"):
        score_entries("gradients", model, space, evidence(), ScoreConfig())


def test_scores_that_are_not_finite_are_refused() -> None:
    model = Labelled()
    with torch.no_grad():
        model.model.classifier.weight[0, 0] = torch.nan
    scores = score_entries("gradient", model, parameter_space(model), evidence(), ScoreConfig())
    with pytest.raises(CheckpointError, match=r"layer\.0.*expected finite values"):
        scores.mask(Rule("gradient", 0.01))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("eligible", ["linear", "all"])
def test_random_matched_has_the_smallest_ones_counts(architecture: str, eligible: Any) -> None:
    model = make_model(architecture)
    rule = Rule("random-matched", 0.02, eligible, seed=3)
    mask, pafi = random_matched(model, rule), magnitude_mask(model, 0.02, eligible)
    assert {n: p.size for n, p in mask.per_tensor().items()} == {
        n: p.size for n, p in pafi.per_tensor().items()
    }
    assert np.all(np.diff(mask.indices) > 0)
    for start, stop in mask.space.excluded:
        assert not np.any((mask.indices >= start) & (mask.indices < stop))
    assert mask == random_matched(model, rule) and mask != random_matched(
        model, Rule(rule.name, 0.02, eligible)
    )
    assert np.intersect1d(mask.indices, pafi.indices).size < 0.2 * mask.k


# One mask from many ----------------------------------------------------------------------------


def made_up(space: ParameterSpace, client: int, ties: bool) -> Scores:
    """Scores that span many orders of magnitude, or few values."""
    rng = rng_for(1, -1, client, "test/scores")
    shapes = list(zip(space.shapes, [max(1, int(np.prod(s))) for s in space.shapes], strict=True))
    draw = (lambda n: rng.integers(0, 4, n)) if ties else (lambda n: rng.lognormal(-20, 2, n))
    return Scores(space, [torch.tensor(draw(n), dtype=torch.float32).reshape(s) for s, n in shapes])


@pytest.fixture(scope="module")
def space() -> ParameterSpace:
    return parameter_space(make_model("roberta"), "all")


@pytest.mark.parametrize("per_tensor", [False, True])
def test_votes_agree_on_the_most_named(space: ParameterSpace, per_tensor: bool) -> None:
    rule = Rule("fish", 0.02, "all", per_tensor, seed=5)
    masks = [made_up(space, client, False).mask(rule) for client in range(6)]
    messages = {client: pack_votes(mask) for client, mask in enumerate(masks)}
    for mask, message in zip(masks, messages.values(), strict=True):
        assert np.array_equal(unpack_votes(message, space, rule), mask.indices)
        assert len(message) < 1.4 * mask.k + 200  # about 8 bits an entry at 2 %, where int32 takes 32
    agreed = agree_by_votes(messages, space, rule)
    votes = np.zeros(space.size, int)
    for mask in masks:
        votes[mask.indices] += 1
    parts = zip(space.offsets[:-1], space.offsets[1:], strict=True) if per_tensor else [(0, space.size)]
    for start, stop in parts:
        inside = agreed.indices[(agreed.indices >= start) & (agreed.indices < stop)]
        if 0 < inside.size < stop - start:
            rest = np.delete(votes[start:stop], inside - start)
            assert votes[inside].min() >= rest.max()
    assert agreed.k == masks[0].k
    backwards = dict(reversed(messages.items()))
    assert agree_by_votes(backwards, space, rule) == agreed  # whoever answers first


def test_equal_votes_are_not_settled_in_favour_of_the_first_layers(space: ParameterSpace) -> None:
    """Two clients that share nothing: half of each, not the half that comes first."""
    rule = Rule("fish", 0.02, "all")
    k = mask_size(0.02, space.eligible_size)
    places = np.flatnonzero(~np.isin(np.arange(space.size), [i for r in space.excluded for i in range(*r)]))
    first = pack_votes(_mask(places[:k], space, rule))
    last = pack_votes(_mask(places[-k:], space, rule))
    agreed = agree_by_votes({0: first, 1: last}, space, rule)
    share = np.mean(agreed.indices < places[k])
    assert 0.4 < share < 0.6
    other = agree_by_votes({0: first, 1: last}, space, Rule("fish", 0.02, "all", seed=1))
    assert other != agreed


def _mask(indices: np.ndarray, space: ParameterSpace, rule: Rule) -> Any:
    from fedmask.masks import mask_from_indices

    return mask_from_indices(indices, space, rule)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_scores_agree_on_the_largest_sums(space: ParameterSpace, per_tensor: bool, ties: bool) -> None:
    rule = Rule("fish", 0.02, "all", per_tensor)
    given = {client: made_up(space, client, ties) for client in range(5)}
    messages = {client: pack_top_scores(scores, rule) for client, scores in given.items()}
    total = np.zeros(space.size)
    for client, scores in given.items():
        own = scores.mask(rule).indices
        indices, values = unpack_top_scores(messages[client], space, rule)
        assert np.array_equal(indices, own)
        np.testing.assert_allclose(values, scores.at(own), rtol=2**-11)
        total[indices] += values
    agreed = agree_by_scores(messages, space, rule)
    if not per_tensor:
        assert np.array_equal(agreed.indices, top(total, space, 0.02))
    assert agree_by_scores(dict(reversed(messages.items())), space, rule) == agreed
    assert agree_by_scores({3: messages[3]}, space, rule) == given[3].mask(rule)  # alone: its own choice


def test_a_client_whose_scores_are_all_zero_still_names_k_entries(space: ParameterSpace) -> None:
    """LT-SFT's trap: with fewer than k changes a threshold of zero would unfreeze everything."""
    rule = Rule("lt-sft", 0.02, "all")
    nothing = Scores(space, [torch.zeros(shape) for shape in space.shapes])
    message = pack_top_scores(nothing, rule)
    indices, values = unpack_top_scores(message, space, rule)
    assert indices.size == mask_size(0.02, space.eligible_size) and not values.any()
    assert agree_by_scores({0: message}, space, rule).k == indices.size


def test_bad_bytes_are_refused(space: ParameterSpace) -> None:
    rule = Rule("fish", 0.02, "all")
    scores = made_up(space, 0, False)
    good, votes = pack_top_scores(scores, rule), pack_votes(scores.mask(rule))
    other = pack_votes(scores.mask(Rule("fish", 0.01, "all")))
    nan = bytearray(good)
    nan[-2:] = np.float16(np.nan).tobytes()
    for data in (b"", good[:-1], good + b"\0", bytes(nan), votes):
        with pytest.raises(FedmaskError):
            unpack_top_scores(data, space, rule)
    for data in (b"", votes[:-1], other):
        with pytest.raises(FedmaskError):
            unpack_votes(data, space, rule)
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(good)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        try:
            indices, values = unpack_top_scores(bytes(broken), space, rule)
        except FedmaskError as error:
            assert re.search(r"expected|found|fit", str(error))
        else:  # a changed score, or another sound set of indices
            assert np.all(np.diff(indices) > 0) and np.all(np.isfinite(values))
