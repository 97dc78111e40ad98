"""Sums that do not depend on the order: against dense float64 references, under any permutation."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmask.aggregation import (
    SparseUpdate,
    add,
    add_update,
    averaged,
    fixed,
    fixed_sum,
    mean,
    merge,
    start_sums,
    union_mean,
)
from fedmask.codecs import MAX_ABS
from fedmask.errors import FedmaskError


def _updates(seed: int, count: int, size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Values of very different size, and weights."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-7, 4, (count, 1))
    return (rng.uniform(-1, 1, (count, size)) * scales).astype(np.float32), rng.integers(1, 5000, count)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), order=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_mean_does_not_depend_on_the_order(seed: int, count: int, order: object) -> None:
    values, weights = _updates(seed, count)
    numbers = list(range(count))
    found = []
    for _ in range(3):
        state = fixed_sum(values.shape[1], int(weights.sum()))
        for i in numbers:
            add(state, values[i], int(weights[i]))
        found.append(mean(state))
        order.shuffle(numbers)  # type: ignore[attr-defined]
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    exact = (values.astype(np.longdouble) * weights[:, None]).sum(0) / weights.sum()
    bound = count * 1.02 * MAX_ABS / 2**62 + np.abs(exact) * 2.0**-51
    assert np.all(np.abs(found[0] - exact) <= bound)


@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_a_tree_of_sums_is_the_sum(seed: int, cut: int) -> None:
    values, weights = _updates(seed, 12)
    parts = [fixed_sum(values.shape[1], int(weights.sum())) for _ in range(3)]
    for i in range(12):
        add(parts[0 if i < cut else 1], values[i], int(weights[i]))
        add(parts[2], values[i], int(weights[i]))
    whole = merge(parts[0], parts[1])
    assert (whole.total.tobytes(), whole.weight, whole.count) == (parts[2].total.tobytes(), weights.sum(), 12)
    with pytest.raises(FedmaskError, match="same bounds"):
        merge(whole, fixed_sum(values.shape[1], 1))
    with pytest.raises(FedmaskError, match="same bounds"):
        merge(whole, parts[2])


def test_hand_computed() -> None:
    state = fixed_sum(3, 40)
    add(state, np.array([1.0, -2.0, 0.0], np.float32), 10)
    add(state, np.array([4.0, 2.0, 1e-3], np.float32), 30)
    np.testing.assert_allclose(mean(state), [3.25, 1.0, 0.75e-3], rtol=1e-7)
    assert (state.weight, state.count) == (40, 2)


def test_the_largest_that_is_allowed_does_not_overflow() -> None:
    most = 10**8
    state = fixed_sum(2, most)
    for _ in range(4):
        add(state, np.array([MAX_ABS, -MAX_ABS], np.float32), most // 4)
    np.testing.assert_array_equal(mean(state), [MAX_ABS, -MAX_ABS])


@pytest.mark.parametrize(
    ("values", "weight", "said"),
    [
        ([1.0, 2.0, 3.0], 1, "expected 2 values"),
        ([1.0, 2.0], 0, "weight from 1 to 9, found 0"),
        ([1.0, 2.0], 10, "weight from 1 to 9, found 10"),
        ([np.nan, 0.0], 1, "found nan"),
        ([0.0, -np.inf], 1, "found inf"),
        ([2e4, 0.0], 1, "values up to 10200, found 20000"),
    ],
)
def test_what_has_no_room_is_refused_and_changes_nothing(values: list[float], weight: int, said: str) -> None:
    state = add(fixed_sum(2, 10), np.array([1.0, 2.0], np.float32), 1)
    with pytest.raises(FedmaskError, match=said):
        add(state, np.array(values, np.float32), weight)
    np.testing.assert_array_equal(mean(state), [1.0, 2.0])
    with pytest.raises(FedmaskError, match="nothing was added"):
        mean(fixed_sum(2, 10))
    with pytest.raises(FedmaskError, match="positive bounds"):
        fixed_sum(2, 0)


def test_tasks_are_weighed_at_the_end() -> None:
    """Two tasks, three replies, by hand; ``shared`` is one value, heads are one each."""
    replies = [("a", [1.0, 1.0], 10), ("b", [10.0, 7.0], 200), ("a", [4.0, 5.0], 30)]
    shared, heads = np.array([2.0], np.float32), {t: np.array([v], np.float32) for t, v in
                                                  (("a", 0.5), ("b", -1.0), ("c", 3.0))}  # fmt: skip
    state = start_sums(dict.fromkeys(heads, 2), 1000)
    for task, change, examples in replies:
        add_update(state, task, np.array(change, np.float32), examples)
    equal, after = averaged(state, shared, heads)
    np.testing.assert_allclose(equal, [2.0 + (3.25 + 10) / 2])
    np.testing.assert_allclose([after[t][0] for t in "abc"], [0.5 + 4.0, 6.0, 3.0])
    rows, _ = averaged(state, shared, heads, "examples")
    np.testing.assert_allclose(rows, [2.0 + (130 + 2000) / 240], rtol=1e-6)
    with pytest.raises(FedmaskError, match="found task 'd'"):
        add_update(state, "d", np.zeros(2, np.float32), 1)


def test_memory_does_not_grow_with_the_replies() -> None:
    size = 100_000
    change = np.full(size, 1e-3, np.float32)
    state = start_sums({"a": size}, 10**6)
    add_update(state, "a", change, 5)
    tracemalloc.start()
    try:
        for _ in range(200):
            add_update(state, "a", change, 5)
        grown, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 2_000 and peak < 300_000  # two blocks of scratch, none of the 400 kB replies


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    space=st.sampled_from([60, 1000, 70_000, 10**10]),
    over=st.sampled_from(["all", "holders"]),
)
@settings(max_examples=80, deadline=None)
def test_unions_against_a_dense_reference(seed: int, sizes: list[int], space: int, over: str) -> None:
    rng = np.random.default_rng(seed)
    updates = []
    for size in sizes:
        indices = np.unique(rng.integers(0, space, size))
        values = (rng.standard_normal(indices.size) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
        updates.append(SparseUpdate(indices, values, int(rng.integers(1, 1000))))
    union, found = union_mean(updates, space, over)  # type: ignore[arg-type]
    wanted = np.unique(np.concatenate([update.indices for update in updates]))
    np.testing.assert_array_equal(union, wanted)
    sums, weights = np.zeros(wanted.size), np.zeros(wanted.size)
    for update in updates:
        where = np.searchsorted(wanted, update.indices)
        sums[where] += update.values.astype(np.float64) * update.weight
        weights[where] += update.weight
    whole = sum(update.weight for update in updates)
    expected = sums / (whole if over == "all" else np.maximum(weights, 1))
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-9)
    order = rng.permutation(len(updates))
    again = union_mean([updates[i] for i in order], space, over)  # type: ignore[arg-type]
    assert (again[0].tobytes(), again[1].tobytes()) == (union.tobytes(), found.tobytes())


def test_equal_masks_are_the_plain_mean() -> None:
    values, weights = _updates(3, 9)
    indices = np.arange(0, 3 * values.shape[1], 3)
    updates = [SparseUpdate(indices, v, int(w)) for v, w in zip(values, weights, strict=True)]
    state = fixed_sum(values.shape[1], int(weights.sum()))
    for v, w in zip(values, weights, strict=True):
        add(state, v, int(w))
    for over in ("all", "holders"):
        union, found = union_mean(updates, 1000, over)  # type: ignore[arg-type]
        np.testing.assert_array_equal(union, indices)
        np.testing.assert_array_equal(found, mean(state).astype(np.float32))


@pytest.mark.parametrize(
    ("indices", "count"), [([1, 1], 2), ([2, 1], 2), ([-1, 3], 2), ([3, 100], 2), ([1, 2], 3)]
)
def test_unions_of_what_is_no_mask(indices: list[int], count: int) -> None:
    update = SparseUpdate(np.array(indices), np.zeros(count, np.float32), 1)
    with pytest.raises(FedmaskError, match="union of masks: expected"):
        union_mean([update], 100)
    with pytest.raises(FedmaskError, match="found none"):
        union_mean([], 100)


_UNION = """
import resource, sys
import numpy as np
from fedmask.aggregation import SparseUpdate, union_mean

def updates(size):
    rng = np.random.default_rng(1)
    for _ in range(20):
        indices = np.unique(rng.integers(0, size, 1000))
        yield SparseUpdate(indices, rng.standard_normal(indices.size).astype(np.float32), 3)

union_mean(list(updates(10**5)), 10**5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
union_mean(list(updates(10**10)), 10**10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_unions_cost_nothing_for_the_space() -> None:
    """A space of ten thousand million entries, of which one byte each would be ten gigabytes."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _UNION], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000  # kilobytes


def test_the_compiled_sum_has_the_bits_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves too, which round to the even number, and the largest values that may come.

    And of vectors as they come: those of ``numpy.frombuffer`` may only be read, parts of others have gaps.
    """
    native = pytest.importorskip("fedmask.aggregation.native", reason="numba is not installed")
    rng = np.random.default_rng(3)
    values = rng.normal(0, 1, 50_001).astype(np.float32)
    values[:6] = [0.5, -0.5, 1.5, -2.5, MAX_ABS, -MAX_ABS]
    for scale in (1.0, 2.0**20, 10 * 2.0**40):
        plain, compiled = rng.integers(-9, 9, (1, values.size)).repeat(2, axis=0)
        fixed._add_blocks(plain, values, scale)
        native.add_rounded(compiled, values, scale)
        assert np.array_equal(plain, compiled)
    for vector in (np.frombuffer(values.tobytes(), np.float32), values[::2], values[::-1]):
        assert not (vector.flags.writeable and vector.flags.c_contiguous)
        found = []
        for least in (1, values.size + 1):
            monkeypatch.setattr(fixed, "_WORTH_COMPILING", least)
            found.append(add(fixed_sum(vector.size, 9), vector, 7).total)
        assert found[0].any() and np.array_equal(*found)


def test_long_vectors_go_through_the_compiled_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(fixed, "_WORTH_COMPILING", 10)
    for compiled in (lambda total, values, scale: found.append(values.size), None):
        monkeypatch.setattr(fixed, "_compiled", lambda compiled=compiled: compiled)
        for size in (9, 10):
            add(fixed_sum(size, 1), np.ones(size, np.float32), 1)
    assert found == [10]
