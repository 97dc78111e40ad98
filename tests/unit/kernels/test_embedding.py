"""An embedding's gradient by rows equals the dense one, gathered; and no table of it is ever made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedmask import magnitude_mask, sparsify
from fedmask.kernels import SampledEmbedding, TableRows, is_plain_embedding
from tests.support import batch, loss_of, make_model
from tests.unit.kernels.test_work import Products


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 60), st.integers(0, 2**32), st.booleans())
def test_the_gradient_is_the_dense_one_gathered(
    rows: int, width: int, tokens: int, seed: int, padded: bool
) -> None:
    rng = np.random.default_rng(seed)
    flat = np.flatnonzero(rng.random(rows * width) < rng.random())
    table = torch.from_numpy(rng.normal(size=(rows, width))).float().requires_grad_()
    ids = torch.from_numpy(rng.integers(0, rows, (tokens, 1)))
    padding = int(rng.integers(rows)) if padded else None
    out_grad = torch.from_numpy(rng.normal(size=(tokens, 1, width))).float()
    functional.embedding(ids, table, padding).backward(out_grad)
    assert table.grad is not None
    values = torch.zeros(len(flat), requires_grad=True)
    where = TableRows.from_flat(flat, (rows, width))
    seen = SampledEmbedding.apply(ids, table.detach(), values, where, padding)  # type: ignore[no-untyped-call]
    assert torch.equal(seen, table.detach()[ids])
    seen.backward(out_grad)
    assert values.grad is not None
    torch.testing.assert_close(values.grad, table.grad.view(-1)[torch.from_numpy(flat)], rtol=1e-4, atol=1e-5)


def test_no_gradient_of_the_table_is_made() -> None:
    model = make_model("bert")
    mask = magnitude_mask(model, 0.1, "linear+embeddings", per_tensor=True)
    tables = [name for name in mask.per_tensor() if "embedding" in name]
    assert len(tables) == 3
    loss = loss_of(sparsify(model, mask), batch())
    with Products() as found:
        loss.backward()
    assert found.calls and not [name for name in found.calls if "embedding" in name]


@pytest.mark.parametrize("odd", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embeddings_that_do_more_keep_their_own_way(odd: dict[str, bool]) -> None:
    class Own(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    assert is_plain_embedding(nn.Embedding(3, 2, padding_idx=1))
    assert not is_plain_embedding(nn.Embedding(3, 2, **odd))  # type: ignore[arg-type]
    assert not is_plain_embedding(Own(3, 2))
    assert not is_plain_embedding(nn.Linear(3, 2))
