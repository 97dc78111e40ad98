"""Dropout: the right share, the mean kept, the seed decides, and the gradient meets the same elements."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fedmask.dropout import Dropout, dropout

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def own_random_state() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_and_scale(dtype: torch.dtype, probability: float) -> None:
    out = dropout(torch.ones(501, 401, dtype=dtype), probability)
    dropped = float((out == 0).float().mean())
    assert dropped == pytest.approx(probability, abs=0.005)  # ten deviations
    (scale,) = out[out != 0].unique()
    assert float(scale) == pytest.approx(1 / (1 - probability), rel=2**-8)
    assert out.dtype == dtype


def test_elements_are_independent() -> None:
    """Neighbours share a 64-bit number; whether they are kept must not be seen to hang together."""
    kept = (dropout(torch.ones(400_000), 0.5) != 0).double()
    for lag in (1, 2, 3, 4, 64):
        both = float((kept[:-lag] * kept[lag:]).mean())
        assert both == pytest.approx(0.25, abs=0.005)


def test_the_seed_decides() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.3), dropout(x, 0.3)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3), first)
    assert torch.equal(dropout(x, 0.3), second)


def test_the_gradient_meets_the_same_elements() -> None:
    x = torch.rand(3, 5, 7, requires_grad=True)
    out = dropout(x, 0.4)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(out, (x * x.grad).detach())
    assert set(x.grad.unique().tolist()) == {0.0, x.grad.max().item()}


def test_checkpointing_draws_the_same_again() -> None:
    layer, x = Dropout(0.5), torch.rand(64, 64, requires_grad=True)
    torch.manual_seed(5)
    layer(x).square().sum().backward()
    plain, x.grad = x.grad, None
    torch.manual_seed(5)
    checkpoint(lambda y: layer(y).square().sum(), x, use_reentrant=False).backward()
    assert plain is not None and x.grad is not None
    assert torch.equal(x.grad, plain)


def test_nothing_happens_without_training_or_probability() -> None:
    x = torch.rand(10)
    layer = Dropout(0.5).eval()
    assert layer(x) is x
    assert dropout(x, 0.0) is x
    assert dropout(torch.ones(0), 0.5).shape == (0,)
    assert not bool(dropout(x, 1.0).any())
