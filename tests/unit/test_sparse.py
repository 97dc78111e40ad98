"""What a caller of the plain functions gets wrong is one line that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedmask
from fedmask.errors import ConfigError
from fedmask.masks import Rule
from tests.support import make_model, state_bits

WRONG: dict[str, tuple[Callable[[Any, Any, Path], object], str]] = {
    "a name for a model": (lambda m, mask, path: fedmask.magnitude_mask("minilm"), "model: expected a Module, found a str; load"),
    "text for a density": (lambda m, mask, path: fedmask.magnitude_mask(m, density="0.1"), "share in (0, 1], found '0.1'; the usual"),
    "true for a density": (lambda m, mask, path: fedmask.magnitude_mask(m, density=True), "share in (0, 1], found True"),
    "an unknown set": (lambda m, mask, path: fedmask.magnitude_mask(m, 0.1, "liner"), "the nearest is 'linear'"),
    "an unknown kernel": (lambda m, mask, path: fedmask.sparsify(m, mask, kernel="sample"), "the nearest is 'sampled'"),
    "indices for a mask": (lambda m, mask, path: fedmask.sparsify(m, mask.indices), "mask: expected a Mask, found a ndarray; make"),
    "a name to sparsify": (lambda m, mask, path: fedmask.sparsify("minilm", mask), "found a str; load"),
    "no units on biases": (lambda m, mask, path: fedmask.sparsify(m, mask, bias_adapters=0), "at least 1, found 0; try 16"),
    "no units on weights": (lambda m, mask, path: fedmask.weight_adapters(m, bottleneck=0), "at least 1, found 0; try 16"),
    "half a unit": (lambda m, mask, path: fedmask.weight_adapters(m, bottleneck=1.5), "found 1.5"),
    "an unknown activation": (lambda m, mask, path: fedmask.weight_adapters(m, activation="glu"), "nearest is 'gelu'"),
    "a missing folder": (lambda m, mask, path: fedmask.save_delta(m, path / "no" / "d.safetensors"), "found none; make it first"),
    "a folder for a file": (lambda m, mask, path: fedmask.save_delta(m, path), "found a folder; name a file in it"),
    "nothing tuned": (lambda m, mask, path: fedmask.save_delta(m, path / "d.safetensors"), "call fedmask.sparsify"),
    "a missing file": (lambda m, mask, path: fedmask.load_delta(m, path / "d.safetensors"), "no such file; write one"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_line_and_changes_nothing(case: str, tmp_path: Path) -> None:
    call, said = WRONG[case]
    model = make_model("bert")
    mask, before = fedmask.magnitude_mask(model, 0.1), state_bits(model)
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        call(model, mask, tmp_path)
    assert "\n" not in str(error.value)
    assert state_bits(model) == before
    assert list(tmp_path.iterdir()) == []


def test_a_numpy_number_is_a_density_like_any_other() -> None:
    model = make_model("bert")
    mask = fedmask.magnitude_mask(model, np.float32(0.25))
    assert mask == fedmask.magnitude_mask(model, 0.25)
    assert mask.recipe().to_json() == fedmask.magnitude_mask(model, 0.25).recipe().to_json()
    assert type(Rule("magnitude", 1).density) is float
