"""The sizes that the benchmark of entropy codes compares."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.benchmarks.entropy import BITS, sizes


@pytest.mark.parametrize("bits", BITS)
def test_no_code_beats_the_entropy_and_ours_comes_near(bits: int) -> None:
    change = np.random.default_rng(1).normal(0, 1e-3, 50_000).astype(np.float32)
    found = sizes(change, bits)
    coded = {name: size for name, size in found.items() if name not in ("plain", "entropy")}
    assert {"ours", "zlib"} <= set(coded)
    assert found["entropy"] < found["plain"]
    for name, size in coded.items():
        assert size >= 0.99 * found["entropy"], name  # the scales could be coded too, by a per cent at most
    assert found["ours"] <= 1.03 * found["entropy"]


def test_entropy_of_a_change_whose_codes_are_known() -> None:
    """No change has one code: nothing remains but the scales."""
    found = sizes(np.zeros(4096, np.float32), 8)
    assert found["entropy"] == found["plain"] - 4096
