import math

import numpy as np
import pytest

from fedmask.codecs import (
    Malformed,
    Truncated,
    WrongLength,
    index_entropy_bytes,
    pack_indices,
    unpack_indices,
)
from fedmask.codecs.bits import varint

GOLOMB, BITMAP, COMPLEMENT, SECTIONS = b"\x00", b"\x01", b"\x02", b"\x03"


def test_golden_power_of_two() -> None:
    # Gaps 3, 5, 0, 29 over divisor 4: remainders 3 1 0 1 (two bits each, lowest first), quotients 0 1 0 7.
    data = bytes([0, 4, 4, 0b01_00_01_11, 0b0000_1101, 0b0000_1000])
    assert unpack_indices(data, 64).tolist() == [3, 9, 10, 40]


def test_golden_truncated_binary() -> None:
    # The same gaps over divisor 3: remainders 0 2 0 2 as the words 0, 1(1), 0, 1(1); quotients 1 1 0 9.
    data = bytes([0, 4, 3, 0b1010, 0b11, 0b0001_1010, 0b0100_0000])
    assert unpack_indices(data, 64).tolist() == [3, 9, 10, 40]


SIZES = {
    "none": ([], 1000),
    "one": ([7], 1000),
    "first": ([0], 1 << 40),
    "last": ([(1 << 40) - 1], 1 << 40),
    "ends": ([0, (1 << 40) - 1], 1 << 40),
    "front": (list(range(1000)), 1 << 40),
    "back": (list(range((1 << 40) - 1000, 1 << 40)), 1 << 40),
    "outlier": ([*range(5000), 1 << 39], 1 << 40),
    "all": (list(range(1000)), 1000),
    "all but one": (list(range(1, 1000)), 1000),
    "half": (list(range(0, 1000, 2)), 1000),
    "empty space": ([], 0),
    "space of one": ([0], 1),
}


@pytest.mark.parametrize("case", SIZES)
def test_corner_sets_round_trip(case: str) -> None:
    values, size = SIZES[case]
    indices = np.array(values, np.int64)
    data = pack_indices(indices, size)
    back = unpack_indices(data, size, len(values))
    assert back.dtype == np.int64
    np.testing.assert_array_equal(back, indices)
    # No worse than twice a random set of this size, and never worse than a bitmap.
    assert len(data) <= 2 * index_entropy_bytes(len(values), size) + 24
    assert len(data) <= 1 + math.ceil(size / 8)


def test_a_dense_random_set_is_a_bitmap_and_a_full_one_costs_nothing() -> None:
    half = np.flatnonzero(np.random.default_rng(0).random(8000) < 0.5)
    assert pack_indices(half, 8000)[:1] == BITMAP and len(pack_indices(half, 8000)) == 1001
    assert pack_indices(np.arange(8000), 8000) == COMPLEMENT + varint(0)


def test_sections_are_used_when_they_are_smaller_and_only_then() -> None:
    rng = np.random.default_rng(1)
    offsets = [0, 100_000, 200_000, 300_000]
    uneven = np.flatnonzero(rng.random(300_000) < np.repeat([0.2, 0.001, 0.02], 100_000))
    alone, cut = pack_indices(uneven, 300_000), pack_indices(uneven, 300_000, offsets)
    assert cut[:1] == SECTIONS and len(cut) < 0.9 * len(alone)
    np.testing.assert_array_equal(unpack_indices(cut, 300_000), uneven)
    even = np.flatnonzero(rng.random(300_000) < 0.01)
    assert pack_indices(even, 300_000, offsets) == pack_indices(even, 300_000)


def test_sections_need_not_name_both_ends() -> None:
    indices = np.flatnonzero(np.random.default_rng(2).random(4000) < np.repeat([0.4, 0.01], 2000))
    assert pack_indices(indices, 4000, [2000]) == pack_indices(indices, 4000, [0, 2000, 4000])


@pytest.mark.parametrize(
    ("indices", "size"),
    [([2, 1], 10), ([1, 1], 10), ([-1, 1], 10), ([1, 10], 10), ([0], 0)],
)
def test_packing_refuses_what_is_no_set_of_indices(indices: list[int], size: int) -> None:
    with pytest.raises(Malformed, match="sorted unique"):
        pack_indices(np.array(indices), size)


def test_packing_refuses_other_arrays_and_sizes() -> None:
    with pytest.raises(Malformed, match="float64"):
        pack_indices(np.array([1.0]), 10)
    with pytest.raises(Malformed, match="shape"):
        pack_indices(np.zeros((2, 2), np.int64), 10)
    with pytest.raises(Malformed, match="boundaries"):
        pack_indices(np.array([1]), 10, [0, 20])
    with pytest.raises(Malformed, match="size"):
        unpack_indices(b"\x00\x00", -1)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", Truncated),
        (b"\x09", Malformed),  # an unknown kind
        (GOLOMB, Truncated),
        (GOLOMB + varint(101) + varint(1) + b"\xff" * 13, WrongLength),  # more indices than the space has
        (GOLOMB + varint(4) + varint(0) + b"\xff", Malformed),  # divisor 0
        (GOLOMB + varint(4) + varint(101) + b"\xff" * 9, Malformed),  # divisor beyond the space
        (GOLOMB + varint(80) + varint(1) + b"\xff", Malformed),  # more indices than bits
        (GOLOMB + varint(4) + varint(4) + b"\x00", Malformed),  # no quotients
        (GOLOMB + varint(4) + varint(4) + b"\x00\x07", Malformed),  # three quotients of four
        (GOLOMB + varint(4) + varint(4) + b"\x00\x0f\x00", Malformed),  # a byte too many
        (GOLOMB + varint(1) + varint(60) + b"\xff" * 4 + b"\x08", Malformed),  # an index past the end
        (GOLOMB + varint(0) + b"\x00", WrongLength),
        (BITMAP + b"\x00" * 12, Truncated),
        (BITMAP + b"\x00" * 14, WrongLength),
        (COMPLEMENT + varint(101), WrongLength),
        (SECTIONS + varint(2) + varint(50) + varint(2) + varint(49) + varint(2) + GOLOMB * 4, WrongLength),
        (SECTIONS + varint(2) + varint(50) + varint(2) + varint(50) + varint(3) + GOLOMB * 4, WrongLength),
        (SECTIONS + varint(1) + varint(100) + varint(2) + SECTIONS + GOLOMB, Malformed),  # no nesting
        (SECTIONS + varint(1 << 40), Malformed),
    ],
)
def test_unpacking_refuses_malformed_bytes(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        unpack_indices(data, 100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("boundaries", [None, [0, 50, 100]])
def test_unpacking_refuses_another_count(boundaries: list[int] | None) -> None:
    for indices in (
        np.arange(0, 100, 9),
        np.arange(3, 97),
        np.flatnonzero(np.arange(100) % 3),
        np.arange(50),
    ):
        data = pack_indices(indices, 100, boundaries)
        for count in (indices.size - 1, indices.size + 1):
            with pytest.raises(WrongLength, match=str(count)):
                unpack_indices(data, 100, count)


def test_a_few_bytes_cannot_claim_a_huge_set() -> None:
    size = 1 << 40
    everything = COMPLEMENT + varint(0)
    for data in (everything, SECTIONS + varint(1) + varint(size) + varint(len(everything)) + everything):
        with pytest.raises(WrongLength, match="at most 5 indices"):
            unpack_indices(data, size, 5)


@pytest.mark.parametrize(
    ("k", "size"), [(0, 0), (0, 9), (9, 9), (1, 2), (4, 64), (3, 60), (500, 1000), (150, 10**6)]
)
def test_entropy_is_log2_of_the_binomial(k: int, size: int) -> None:
    exact = math.log2(math.comb(size, k)) / 8
    assert index_entropy_bytes(k, size) == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_entropy_of_large_sets() -> None:
    exact = math.log2(math.comb(400_000, 100_000)) / 8  # the other branch: too many factors to add up
    assert index_entropy_bytes(100_000, 400_000) == pytest.approx(exact, rel=1e-9)
    assert index_entropy_bytes(1, 1 << 40) == pytest.approx(5.0)
    with pytest.raises(Malformed, match="k 5 and size 4"):
        index_entropy_bytes(5, 4)
