"""Bands of a moving mask: against a full sort, and how schedules walk through them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedmask.errors import ConfigError
from fedmask.masks import Rule, derive_mask
from fedmask.masks.bands import Bands, Schedule, band_of
from fedmask.space import backbone_parameters, parameter_space
from tests.support import make_model


def bands_of(rule: Rule) -> tuple[Any, Bands]:
    model = make_model("roberta", seed=3)
    return model, Bands(model, parameter_space(model, rule.eligible), rule)


@pytest.mark.parametrize("eligible", ["linear", "all"])
@pytest.mark.parametrize("name", ["magnitude", "largest"])
def test_bands_cut_a_stable_sort_in_pieces(name: str, eligible: Any) -> None:
    model, bands = bands_of(Rule(name, 0.013, eligible))
    space = bands.space
    parameters = backbone_parameters(model)
    flat = np.concatenate([parameters[n].detach().numpy().ravel() for n in space.names])
    keys = np.abs(flat) if name == "magnitude" else -np.abs(flat)
    for start, stop in space.excluded:
        keys[start:stop] = np.inf
    order = np.argsort(keys, kind="stable")
    k = bands.mask(0).k
    assert bands.count == space.eligible_size // k > 16  # so that the order is extended on the way
    for band in (0, 1, 9, bands.count - 1, 3):
        np.testing.assert_array_equal(bands.mask(band).indices, np.sort(order[band * k : (band + 1) * k]))


@pytest.mark.parametrize("rule", [
    Rule("magnitude", 0.02), Rule("magnitude", 0.02, per_tensor=True), Rule("largest", 0.02),
    Rule("random", 0.02, seed=5), Rule("random", 0.02, "all", seed=5),
])  # fmt: skip
def test_the_first_band_is_the_rules_own_mask(rule: Rule) -> None:
    model, bands = bands_of(rule)
    assert bands.mask(0).digest == derive_mask(model, rule).digest
    masks = [bands.mask(band) for band in range(4)]
    assert len({mask.digest for mask in masks}) == 4
    assert {mask.k for mask in masks} == {masks[0].k}
    if rule.name != "random":  # ranks are disjoint; draws meet by chance
        assert np.unique(np.concatenate([mask.indices for mask in masks])).size == 4 * masks[0].k
    if rule.per_tensor:
        counts = [[part.size for part in bands.space.split(mask.indices)] for mask in masks]
        assert all(one == counts[0] for one in counts)


def test_schedules() -> None:
    rounds = range(1, 11)
    assert [band_of("fixed", r, 4) for r in rounds] == [0] * 10
    assert [band_of("rotate", r, 4) for r in rounds] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert [band_of("anneal", r, 3) for r in rounds] == [0, 1, 1, 2, 2, 2, 2, 0, 0, 0]
    model = make_model("bert")
    schedule = Schedule(model, parameter_space(model), Rule(density=0.02), "rotate", 3)
    k = schedule.mask(1).k
    assert schedule.mask(4).digest == schedule.mask(1).digest
    assert [schedule.moved(0, r).size for r in (1, 2, 3, 4, 9)] == [0, k, 2 * k, 3 * k, 3 * k]
    np.testing.assert_array_equal(schedule.moved(3, 5), schedule.mask(4).indices)


def test_a_rule_without_bands_is_refused() -> None:
    model = make_model("bert")
    with pytest.raises(ConfigError, match="rule 'gradient' has no bands; use method 'pafi'"):
        Bands(model, parameter_space(model), Rule("gradient"))
