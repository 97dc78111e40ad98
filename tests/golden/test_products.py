"""FedEx-LoRA on one weight matrix, by hand, and against dense means of the products."""

from __future__ import annotations

import numpy as np
import pytest

from fedmask.config import RunConfig, TaskConfig
from fedmask.errors import ConfigError
from fedmask.products import Products
from fedmask.rng import rng_for
from server.exact import ExactTally
from server.strategy import Contribution, ServerStrategy
from server.streaming import StreamingMean

TASK = TaskConfig(name="bbc", clients=3)
CONFIG = RunConfig(tasks=(TASK,), method="fedex-lora")
RANK, SCALE = 3, 0.7


def test_two_clients_by_hand() -> None:
    # One layer of 1 output and 2 inputs, rank 1, alpha / r = 2. Both start from A = (1, 1), B = (0).
    # Client 0 (1 row) comes back with A = (2, 0), B = (3); client 1 (3 rows) with A = (0, 2), B = (-1).
    # Means: A = 1/4 (2, 0) + 3/4 (0, 2) = (0.5, 1.5); B = 3/4 - 3/4 = 0, so their product is 0.
    # The mean product is 1/4 * 3 (2, 0) + 3/4 * (-1) (0, 2) = (1.5, -1.5); times 2: (3, -3).
    # As one factor: left 2 * 1/4 * (3 - 0) = 1.5, right (2, 0) - (0, 2) = (2, -2).
    products = Products(((1, 2),), (False,), rank=1, scale=2.0, clients=2)
    start = np.zeros(5, np.float32)  # the residual of 2 values, A's change, B's
    changes = [np.array([1, -1, 3], np.float32), np.array([-1, 1, -1], np.float32)]
    tally = ExactTally(StreamingMean().start(1, start[2:], {"bbc": np.zeros(0, np.float32)}, 4), products,
                       CONFIG, start)  # fmt: skip
    for client, (rows, change) in enumerate(zip((1, 3), changes, strict=True)):
        tally.add(Contribution(client, "bbc", rows, change))
    found = tally.result()
    assert found.shared == pytest.approx([3, -3, -0.5, 0.5, 0])
    assert found.factors is None  # three values, and the residual has two
    assert products.stacked(changes, (0.25, 0.75), np.array([-0.5, 0.5, 0.0])).tolist() == [1.5, 2, -2]
    # The next round adds to the residual; a client that is missing gives zeros.
    again = ExactTally(StreamingMean().start(2, found.shared[2:], {"bbc": np.zeros(0, np.float32)}, 4),
                       products, CONFIG, found.shared)  # fmt: skip
    again.add(Contribution(1, "bbc", 3, changes[1]))
    after = again.result()
    assert after.shared == pytest.approx([3, -3, -1.5, 1.5, -1])


@pytest.mark.parametrize("strategy", ["mean", "fedavg"])
@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_the_effective_weights_are_the_dense_mean(strategy: str, weighting: str) -> None:
    """W + scale mean(B) mean(A) + residual = W + scale mean(B_i A_i), each layer, also stored transposed."""
    sides, turned = ((5, 4), (6, 7)), (False, True)
    products = Products(sides, turned, RANK, SCALE, clients=4)
    sizes = [RANK * (outputs + inputs) for outputs, inputs in sides]
    rng = rng_for(1, -1, -1, "test")
    drawn = rng.standard_normal(sum(sizes)).astype(np.float32)  # where A and B started in the run
    shared = np.concatenate([np.zeros(products.residual_size), rng.standard_normal(sum(sizes))])
    shared = shared.astype(np.float32)
    heads = {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}
    config = CONFIG.model_copy(
        update={"server": CONFIG.server.model_copy(update={"task_weighting": weighting})}
    )
    made = StreamingMean(None, weighting) if strategy == "mean" else ServerStrategy(strategy, None, weighting)  # type: ignore[arg-type]
    tally = ExactTally(made.start(1, shared[products.residual_size :], heads, 100), products, config, shared)
    replies = [
        Contribution(client, task, rows, rng.standard_normal(sum(sizes) + heads[task].size, np.float32))
        for client, task, rows in ((0, "a", 5), (1, "a", 20), (2, "b", 10), (3, "b", 1))
    ]
    for reply in (replies[2], replies[0], replies[3], replies[1]):  # the order of arrival does not matter
        tally.add(reply)
    found = tally.result()
    totals = {"a": 25, "b": 11}
    weights = [one.examples / (2 * totals[one.task] if weighting == "equal" else 36) for one in replies]
    before = shared[products.residual_size :]
    start = place = 0
    for sizes_of, turn in zip(sides, turned, strict=True):
        wanted = sum(
            weight * product(before + drawn + one.change[: before.size], start, sizes_of)
            for weight, one in zip(weights, replies, strict=True)
        )
        outputs, inputs = sizes_of
        residual = found.shared[place : place + outputs * inputs]
        residual = residual.reshape(inputs, outputs).T if turn else residual.reshape(outputs, inputs)
        mean = product(found.shared[products.residual_size :] + drawn, start, sizes_of)
        np.testing.assert_allclose(SCALE * mean + residual, SCALE * wanted, rtol=1e-4, atol=1e-5)
        assert np.abs(residual).max() > 0.1  # what averaging the factors alone would miss
        start, place = start + RANK * (outputs + inputs), place + outputs * inputs


def product(factors: np.ndarray, start: int, sides: tuple[int, int]) -> np.ndarray:
    """B A of the layer whose factors begin at ``start``: A ``[r, inputs]``, then B ``[outputs, r]``."""
    outputs, inputs = sides
    down, up = np.split(
        factors[start : start + RANK * (inputs + outputs)].astype(np.float64), [RANK * inputs]
    )
    found: np.ndarray = up.reshape(outputs, RANK) @ down.reshape(RANK, inputs)
    return found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"server": {"strategy": "fedadam"}}, "use one of fedavg, mean, or method 'lora'"),
        ({"server": {"sharing": "by-task"}}, "one residual for all; use 'all'"),
        ({"down": "int8+delta"}, r"use one of fp32, fp16, bf16 \(and '\+delta'\), found 'int8\+delta'"),
    ],
)
def test_what_would_not_be_exact_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig(tasks=(TASK,), method="fedex-lora", **changes)  # type: ignore[arg-type]
