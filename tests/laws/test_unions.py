"""A sparse change over a growing union: against a dense vector, and in time by its own size alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmask.errors import FedmaskError
from fedmask.unions import SparseChange, find, grow, no_change, put, take, union, without

SIZE = 40
index_sets = st.sets(st.integers(0, SIZE - 1)).map(lambda found: np.array(sorted(found), np.int64))


@given(steps=st.lists(st.tuples(index_sets, st.booleans()), max_size=6), asked=index_sets)
@settings(max_examples=150, deadline=None)
def test_a_union_is_a_dense_vector(steps: list[tuple[np.ndarray, bool]], asked: np.ndarray) -> None:
    dense, known = np.zeros(SIZE, np.float32), np.zeros(SIZE, bool)
    change = no_change()
    for number, (indices, with_values) in enumerate(steps):
        if with_values:
            values = (np.arange(indices.size) + 10 * number + 1).astype(np.float32)
            dense[indices] = values
            change = put(change, indices, values)
        else:
            change = grow(change, indices)
        known[indices] = True
        np.testing.assert_array_equal(change.indices, np.flatnonzero(known))
        np.testing.assert_array_equal(change.values, dense[known])
    np.testing.assert_array_equal(take(change, asked), dense[asked])
    at, there = find(change.indices, asked)
    np.testing.assert_array_equal(there, known[asked])
    np.testing.assert_array_equal(change.indices[at[there]], asked[there])
    np.testing.assert_array_equal(without(asked, change.indices), asked[~known[asked]])


def test_nothing_of_the_models_size_is_made() -> None:
    rng = np.random.default_rng(1)
    far = 10**12  # a dense vector of this length would fill any machine
    change = no_change()
    tracemalloc.start()
    for _ in range(5):
        indices = np.unique(rng.integers(0, far, 20_000))
        change = put(change, indices, rng.standard_normal(indices.size).astype(np.float32))
    assert take(change, union(change.indices, indices)).size == change.size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * change.size


def test_values_and_indices_must_fit() -> None:
    with pytest.raises(FedmaskError, match="expected a value an index, found"):
        SparseChange(np.arange(3), np.zeros(2, np.float32))
