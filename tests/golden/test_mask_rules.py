"""The task-specific rules on the model of four weights of ``test_six_parameters``, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmask.config import ScoreConfig
from fedmask.errors import ConfigError
from fedmask.masks import Evidence, Rule, Scores, agree_by_scores, agree_by_votes, pack_top_scores, pack_votes
from fedmask.masks import score_entries as score
from fedmask.rng import rng_for
from fedmask.space import ParameterSpace, parameter_space
from tests.golden.test_six_parameters import ONE, PLAN, Six

# Of test_six_parameters: d loss / d y of each row alone is 2 (y - t) = 0.8 and 2.0, v = (1.0, 0.5).
# Row (1, 2): d / d W = 0.8 (v0 x, v1 x) = ((0.8, 1.6), (0.4, 0.8))
# Row (2, 1): d / d W = 2.0 (v0 x, v1 x) = ((4.0, 2.0), (2.0, 1.0))
FISHER = [0.64 + 16.0, 2.56 + 4.0, 0.16 + 4.0, 0.64 + 1.0]
MEAN = [2.4, 1.8, 1.2, 0.9]


def scores(rule: str, **settings: float) -> list[float]:
    model = Six()
    found = score(
        rule, model, parameter_space(model), Evidence(ONE, 0, PLAN, seed=1), ScoreConfig(**settings)
    )
    return [float(x) for x in found.tensors[0].reshape(-1)]


def test_fisher_and_gradient() -> None:
    assert scores("fish") == pytest.approx(FISHER)
    assert scores("gradient") == pytest.approx(MEAN)


def test_lottery_is_the_change_of_a_dense_step() -> None:
    # One step of plain descent at rate 0.05: |change| = 0.05 |mean gradient|
    assert scores("lt-sft", steps=1, lr=0.05) == pytest.approx([0.12, 0.09, 0.06, 0.045])


def test_diff_pruning_after_a_first_step_is_a_step_of_adam_behind_open_gates() -> None:
    # w = 0 to begin with, so that no gate's gradient comes from the loss, and with no price none moves:
    # alpha = 5, and at u = 1/2 a gate is 3 sigmoid(5) - 1.5 = 1.48, cut to 1. Adam's first step is its rate.
    assert scores("diff-pruning", steps=1, lr=0.05, penalty=0.0) == pytest.approx([0.05] * 4, rel=1e-4)


def test_agreement_of_two_clients() -> None:
    model = Six()
    space: ParameterSpace = parameter_space(model)
    rule = Rule("fish", 0.5, seed=2)

    def client(*numbers: float) -> Scores:
        import torch

        return Scores(space, [torch.tensor(numbers).view(2, 2)])

    # Their own two: entries 0, 1 and 1, 3. Sums over what was named: 9, 8 + 1, 0, 7.
    one, two = client(9.0, 8.0, 1.0, 0.5), client(0.1, 1.0, 0.2, 7.0)
    messages = {0: pack_top_scores(one, rule), 1: pack_top_scores(two, rule)}
    assert agree_by_scores(messages, space, rule).indices.tolist() == [0, 1]
    three = client(0.1, 1.0, 0.2, 10.0)
    messages[2] = pack_top_scores(three, rule)
    assert agree_by_scores(messages, space, rule).indices.tolist() == [1, 3]  # 9, 10, 0, 17
    votes = {i: pack_votes(c.mask(rule)) for i, c in enumerate((one, two, three))}
    assert agree_by_votes(votes, space, rule).indices.tolist() == [1, 3]  # 1, 3, 0, 2 votes
    del votes[2]  # 1, 2, 0, 1 votes: entry 1, and entry 0 or 3 as the seed says
    drawn = {tuple(agree_by_votes(votes, space, Rule("fish", 0.5, seed=s)).indices) for s in range(20)}
    assert drawn == {(0, 1), (1, 3)}


def test_the_smallest_weights_in_ten_lines_of_numpy() -> None:
    """PaFi's index set, from the tensors of a transformers model by name."""
    from fedmask import magnitude_mask
    from tests.support import make_model

    model = make_model("bert")
    state = {n: p.detach().numpy() for n, p in model.named_parameters()}
    linear = [w.ravel() for n, w in state.items() if ".layer." in n and n.endswith("weight") and w.ndim == 2]
    weights = np.abs(np.concatenate(linear))
    k = round(0.005 * weights.size)
    wanted = np.sort(np.argsort(weights, kind="stable")[:k])
    assert np.array_equal(magnitude_mask(model, 0.005).indices, wanted)


def test_random_entries_in_ten_lines_of_numpy() -> None:
    """k of the entries that may be chosen, by one draw: all of two kinds of tensors but the padding row."""
    from fedmask.masks import derive_mask
    from tests.support import make_model

    state = {n: p.detach().numpy() for n, p in make_model("bert").named_parameters()}
    tables = [n for n in state if n.endswith("embeddings.weight")]
    linear = [n for n in state if ".layer." in n and n.endswith("weight") and state[n].ndim == 2]
    assert len(tables) == 3 and tables[0] == next(iter(state))  # the words' table comes first
    for eligible, names, padding in (("linear", linear, 0), ("linear+embeddings", tables + linear, 32)):
        numbers = np.arange(padding, sum(state[n].size for n in names))
        stream = rng_for(5, -1, -1, "mask")
        wanted = numbers[stream.choice(numbers.size, round(0.03 * numbers.size), False, shuffle=False)]
        found = derive_mask(make_model("bert"), Rule("random", 0.03, eligible, seed=5))  # type: ignore[arg-type]
        assert np.array_equal(found.indices, np.sort(wanted))


def test_random_entries_with_pafi_s_counts_in_ten_lines_of_numpy() -> None:
    """As many of each tensor as are among the k smallest of all, by a draw each from one stream."""
    from fedmask.masks import derive_mask
    from tests.support import make_model

    state = {n: p.detach().numpy() for n, p in make_model("bert").named_parameters()}
    linear = [w.ravel() for n, w in state.items() if ".layer." in n and n.endswith("weight") and w.ndim == 2]
    linear[3] = linear[3] / 4  # a tensor of small weights holds more of them
    weights = np.abs(np.concatenate(linear))
    smallest = np.argsort(weights, kind="stable")[: round(0.02 * weights.size)]
    stream, wanted, start = rng_for(5, -1, -1, "mask"), [], 0
    for tensor in linear:
        count = int(((smallest >= start) & (smallest < start + tensor.size)).sum())
        wanted += sorted(start + stream.choice(tensor.size, count, False, shuffle=False))
        start += tensor.size
    model = make_model("bert")
    with torch.no_grad():
        model.encoder.layer[0].attention.output.dense.weight /= 4
    found = derive_mask(model, Rule("random-matched", 0.02, seed=5))
    counts = [part.size for part in found.per_tensor().values()]
    assert counts[3] == max(counts) > 2 * counts[2]
    assert found.indices.tolist() == wanted


def test_whole_channels_in_ten_lines_of_numpy() -> None:
    """112 entries a block: 3 inputs of the last feed-forward matrix [32, 64] and the half of a fourth."""
    from fedmask.masks import derive_mask
    from tests.support import make_model

    model = make_model("bert")
    shapes = {n: p.shape for n, p in model.named_parameters() if ".layer." in n and n.endswith("weight")}
    shapes = {n: shape for n, shape in shapes.items() if len(shape) == 2}
    stream, chosen = rng_for(5, -1, -1, "mask"), []
    for name, shape in shapes.items():
        part = np.zeros(shape, bool)
        if name.endswith(".output.dense.weight") and "attention" not in name:
            inputs = stream.permutation(64)
            part[:, inputs[:3]] = True
            part[:16, inputs[3]] = True
        chosen.append(part.ravel())
    wanted = np.flatnonzero(np.concatenate(chosen))
    found = derive_mask(model, Rule("random-channels", 224 / sum(map(np.size, chosen)), seed=5))
    assert np.array_equal(found.indices, wanted) and wanted.size == 224


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("bert", ".output.dense.weight"), ("gpt2", "mlp.c_proj.weight"), ("llama", "down_proj.weight")],
)
def test_channels_are_whole_columns_of_the_last_feed_forward_matrix(architecture: str, name: str) -> None:
    """Counted in the matrices themselves: 64 (GPT-2: 128) channels of 32 outputs a block, two blocks."""
    from fedmask.masks import derive_mask
    from fedmask.space import backbone_parameters
    from tests.support import make_model

    model = make_model(architecture)
    wanted = [n for n in backbone_parameters(model) if n.endswith(name) and ".attention." not in n]
    size = parameter_space(model).eligible_size
    found, hidden = {}, 128 if architecture == "gpt2" else 64
    for seed in (1, 2):
        # 3 channels and a half in each of the two blocks
        mask = derive_mask(model, Rule("random-channels", 224 / size, seed=seed))
        found[seed] = mask.per_tensor()
        assert mask.k == 224 and list(found[seed]) == wanted
        for indices in found[seed].values():
            matrix = np.zeros(hidden * 32)
            matrix[indices] = 1
            columns = matrix.reshape(-1, 32).T if architecture == "gpt2" else matrix.reshape(32, -1)
            assert sorted(columns.sum(axis=0)[columns.sum(axis=0) > 0]) == [16, 32, 32, 32]
            (part,) = np.flatnonzero(columns.sum(axis=0) == 16)
            assert columns[:16, part].all()
    assert any(not np.array_equal(found[1][n], found[2][n]) for n in wanted)
    most = 2 * hidden * 32
    whole = derive_mask(model, Rule("random-channels", most / size))
    assert sum(part.size for part in whole.per_tensor().values()) == most
    with pytest.raises(ConfigError, match=f"hold .{most:,}.; give at most {most / size:.4f}"):
        derive_mask(model, Rule("random-channels", 0.5))
