"""Masks from labelled rows: scores against slow references, and one mask from many clients' messages."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmask.config import ScoreConfig, TrainConfig, from_dict
from fedmask.errors import CheckpointError, ConfigError, DataError, FedmaskError
from fedmask.layout import Segment
from fedmask.masks import (
    Evidence,
    Rule,
    Scores,
    agree_by_scores,
    agree_by_votes,
    density_of,
    fish_entries,
    lt_sft_eligible,
    magnitude_mask,
    mask_size,
    pack_top_scores,
    pack_votes,
    random_matched,
    score_entries,
)
from fedmask.masks.budgets import LT_SFT_ENTRIES
from fedmask.masks.fisher import _layers, _parts, _runs_once
from fedmask.masks.votes import unpack_top_scores, unpack_votes
from fedmask.rng import rng_for, seed_for
from fedmask.space import ParameterSpace, backbone_parameters, parameter_space
from fedmask.tasks import batches, collate
from fedmask.training import batch_loss
from tests.support import ARCHITECTURES, fill, make_model, random_state_untouched, state_bits, tokens

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


def by_hand(model: nn.Module, space: ParameterSpace, given: Evidence, rows: list[int]) -> np.ndarray:
    """FISH as published: one row at a time, all of the model's gradients, squares summed."""
    total = np.zeros(space.size)
    named = backbone_parameters(model)
    for row in rows:
        model.zero_grad()
        batch_loss(model, given.data, np.array([row]), 0).backward()
        total += np.concatenate([_gradient(named[n]).reshape(-1).double().numpy() ** 2 for n in space.names])
    model.zero_grad()
    return total


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "t5"])
def test_fisher_scores_are_those_of_one_row_at_a_time(architecture: str) -> None:
    model, given = Labelled(architecture), evidence(rows=9)
    space = parameter_space(model)
    layers = _layers(model, space)
    assert layers is not None
    fast = _runs_once(layers, lambda rows: batch_loss(model, given.data, rows, 0))
    assert fast is (architecture != "opt")  # which folds rows and tokens into one dimension
    before = state_bits(model)
    with random_state_untouched():
        scores = score_entries("fish", model, space, given, ScoreConfig())
    assert state_bits(model) == before and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    wanted = by_hand(model, space, given, list(range(9)))
    np.testing.assert_allclose(flat(scores), wanted, rtol=2e-3, atol=1e-6 * wanted.max())
    mask, reference = scores.mask(Rule("fish", 0.01)).indices, top(wanted, space, 0.01)
    assert np.isin(mask, reference).mean() > 0.99  # rounding may swap the last


def test_fisher_of_all_parameters_and_of_a_sample() -> None:
    model, given = Labelled("roberta"), evidence(rows=9)
    space = parameter_space(model, "all")
    scores = score_entries("fish", model, space, given, ScoreConfig(samples=4))
    drawn = sorted(rng_for(7, -1, 0, "fisher").permutation(9)[:4].tolist())
    np.testing.assert_allclose(flat(scores), by_hand(model, space, given, drawn), rtol=1e-4, atol=1e-9)
    everyone = evidence(rows=9, client=1)
    other = score_entries("fish", model, space, everyone, ScoreConfig(samples=4))
    assert not np.allclose(flat(other), flat(scores))


class Twice(nn.Module):
    """A block that runs twice (as ALBERT's): a row's gradient is a sum of two parts, squared once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(67, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)
        fill(self, 4)

    @property
    def base_model(self) -> nn.Module:
        return nn.ModuleDict({"blocks": self.blocks})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for _ in range(2):
            x = x + torch.tanh(self.blocks[0](x))
        weight = attention_mask[..., None]
        out: torch.Tensor = self.head((x * weight).sum(1) / weight.sum(1))
        return out


def test_fisher_of_layers_that_run_twice() -> None:
    model, given = Twice(), evidence(rows=5)
    space = parameter_space(model)
    scores = score_entries("fish", model, space, given, ScoreConfig())
    np.testing.assert_allclose(flat(scores), by_hand(model, space, given, list(range(5))), rtol=1e-4)


def test_fisher_in_batches_of_few_tokens_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = Labelled(), evidence(rows=9)
    space = parameter_space(model)
    whole = flat(score_entries("fish", model, space, given, ScoreConfig()))
    monkeypatch.setattr("fedmask.masks.fisher._TOKENS", 17)
    parts = list(_parts(given.data))
    assert sorted(np.concatenate(parts)) == list(range(9)) and len(parts) > 4
    np.testing.assert_allclose(
        flat(score_entries("fish", model, space, given, ScoreConfig())),
        whole,
        rtol=1e-3,
        atol=1e-6 * whole.max(),
    )


STEPS = ScoreConfig(steps=5, lr=3e-3, gate_lr=0.5, penalty=1e-3)


@pytest.mark.parametrize("eligible", ["linear", "all"])
def test_lottery_scores_are_the_changes_of_full_fine_tuning(eligible: Any) -> None:
    model, given = Labelled(), evidence(rows=10)
    space = parameter_space(model, eligible)
    before = state_bits(model)
    with random_state_untouched():
        scores = score_entries("lt-sft", model, space, given, STEPS)
    assert state_bits(model) == before and "fedmask" not in model._modules  # rewound
    dense = copy.deepcopy(model)
    trained = [p for n, p in dense.named_parameters() if "pooler" not in n or "model.bert.pooler" in n]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    order = rng_for(7, -1, 0, "batches")
    rows = batches(given.data, 4, order) + batches(given.data, 4, order)
    for part in rows[:5]:
        optimizer.zero_grad()
        batch_loss(dense, given.data, part, 0).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    new, old = backbone_parameters(dense), backbone_parameters(model)
    moved = torch.cat([(new[n] - old[n]).detach().abs().reshape(-1) for n in space.names])
    np.testing.assert_allclose(flat(scores), moved, rtol=0.02, atol=2e-5)
    mask = scores.mask(Rule("lt-sft", 0.02, eligible)).indices
    assert np.isin(mask, top(moved.numpy(), space, 0.02)).mean() > 0.97


def test_diff_pruning_scores_are_those_of_a_plain_loop() -> None:
    """The paper's formulas, tensor by tensor, with the same numbers drawn."""
    model, given = Labelled(), evidence(rows=10)
    space = parameter_space(model)
    before = state_bits(model)
    with random_state_untouched():
        scores = score_entries("diff-pruning", model, space, given, STEPS)
    assert state_bits(model) == before and "fedmask" not in model._modules
    frozen = copy.deepcopy(model)
    base = {n: p.detach().clone() for n, p in frozen.named_parameters()}
    prefix = "model.bert."
    names = [prefix + n for n in space.names]
    w = {n: torch.zeros_like(base[n], requires_grad=True) for n in names}
    alpha = {n: torch.full_like(base[n], 5.0).requires_grad_() for n in names}
    whole = torch.full((len(names),), 5.0, requires_grad=True)
    head = {n: base[n].clone().requires_grad_() for n in base if not n.startswith(prefix) or "pooler" in n}
    changes = [*w.values(), *head.values()]
    optimizer = torch.optim.AdamW(
        [{"params": changes, "lr": 3e-3}, {"params": [*alpha.values(), whole], "lr": 0.5}], weight_decay=0.0
    )

    def gate(a: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        u = u.clamp(1e-6, 1 - 1e-6)
        return torch.clamp(torch.sigmoid(torch.log(u) - torch.log(1 - u) + a) * 3 - 1.5, 0, 1)

    order = rng_for(7, -1, 0, "batches")
    rows = batches(given.data, 4, order) + batches(given.data, 4, order)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(7, -1, 0, "gates"))
        for part in rows[:5]:
            optimizer.zero_grad()
            z = gate(whole, torch.rand(len(names)))
            now = {n: w[n] * z[i] * gate(alpha[n], torch.rand(alpha[n].numel()).view_as(w[n]))
                   for i, n in enumerate(names)}  # fmt: skip
            weights = base | head | {n: base[n] + now[n] for n in names}
            inputs = collate(given.data, part, 0)
            labels = inputs.pop("labels")
            loss = nn.functional.cross_entropy(
                torch.func.functional_call(frozen, weights, (), inputs), labels
            )
            opened = sum(
                (torch.sigmoid(alpha[n]) * torch.sigmoid(whole[i])).sum() for i, n in enumerate(names)
            )
            (loss + 1e-3 * opened).backward()
            nn.utils.clip_grad_norm_(changes, 1.0)
            optimizer.step()
    half = torch.tensor(0.5)
    final = [w[n] * gate(alpha[n], half) * gate(whole, half)[i] for i, n in enumerate(names)]
    wanted = torch.cat([t.detach().abs().reshape(-1) for t in final]).numpy()
    assert 0 < np.count_nonzero(wanted > 1e-6) < wanted.size, "gates have begun to close"
    np.testing.assert_allclose(flat(scores), wanted, rtol=0.02, atol=2e-5)


def test_gates_that_cost_more_close() -> None:
    """A dear gate closes and takes its entry's score to exactly zero; a free one stays open."""
    model, given = Labelled(), evidence(rows=10)
    space = parameter_space(model)
    closed = []
    for penalty in (0.0, 1.0):
        settings = ScoreConfig(steps=6, lr=1e-3, gate_lr=2.5, penalty=penalty)
        closed.append(np.mean(flat(score_entries("diff-pruning", model, space, given, settings)) == 0))
    assert closed[0] < 0.2 and closed[1] > 0.9


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


# How others count --------------------------------------------------------------------------------


def roberta(size: str) -> nn.Module:
    from transformers import AutoModelForSequenceClassification, RobertaConfig

    wide = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
                           **(wide if size == "large" else {}))  # fmt: skip
    with torch.device("meta"):
        found: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return found


def test_fish_charges_the_head_to_its_budget() -> None:
    """Both counts are our own arithmetic by the rule of FISH's code (varunnair18/FISH): it prints neither."""
    large, base = roberta("large"), roberta("base")
    assert fish_entries(large) == 725_158
    assert fish_entries(base) == 31_105
    with pytest.raises(ConfigError, match=r"fish: ratio 0.001 of 124647170 .* head alone has 592130; give a"):
        fish_entries(base, 0.001)


def test_lt_sft_runs_on_the_published_models_have_the_published_sizes(tmp_path: Path) -> None:
    """Printed as ``--ft_params_num`` in cambridgeltl/composable-sft: train_nli.sh on XLM-R, train_mlm.sh on
    mBERT (its MODELS.md says "~7.6M"). Their scripts freeze LayerNorm, and choose among all else.
    """
    from transformers import AutoModel, BertConfig, XLMRobertaConfig

    from fedmask.shapes import read_shapes

    printed = {"xlm-roberta-base": 14_155_776, "bert-base-multilingual-cased": 7_667_712}
    assert printed == LT_SFT_ENTRIES
    layers = 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3840)  # beside their two LayerNorms
    norms = (2 * 12 + 1) * 2 * 768
    xlmr = XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1)
    for config, tables in ((xlmr, 250002 + 514 + 1), (BertConfig(vocab_size=119547), 119547 + 512 + 2)):
        name = "xlm-roberta-base" if config is xlmr else "bert-base-multilingual-cased"
        with torch.device("meta"):
            size = lt_sft_eligible(AutoModel.from_config(config))
        assert size == tables * 768 + layers
        # A run over all tensors ranks LayerNorms too, but no padding rows (XLM-R's positions have one).
        config.save_pretrained(str(tmp_path / name))
        ranked = size + norms - 768 * (2 if config is xlmr else 1)
        run = from_dict(
            {
                "model": str(tmp_path / name),
                "method": "lt-sft",
                "eligible": "all",
                "density": density_of(printed[name], ranked),
                "tasks": [{"name": "bbc", "clients": 1}],
            }
        )
        shapes = read_shapes(run)
        assert shapes.space is not None and shapes.space.eligible_size == ranked
        assert shapes.shared == (Segment("mask", printed[name]),)
    with pytest.raises(ConfigError, match="mask of 9 entries: expected 1 to 8"):
        density_of(9, 8)
