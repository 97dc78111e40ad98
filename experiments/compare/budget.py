"""Sizes that match: a variant's density or rank, chosen so that it sends as many values as it must.

Only the setting that the variant names is changed, and sizes are measured on the model itself (the layout
of the vector that travels), so a method that is new needs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.compare.study import Study, Variant
from fedmask.channel import value_bytes
from fedmask.config import RunConfig
from fedmask.errors import ConfigError
from fedmask.methods import METHODS

TOLERANCE = 0.01


@dataclass(frozen=True)
class Match:
    """What a budget came to: the setting's value, the values it gives, and those that were wanted."""

    setting: str
    value: float | int
    found: int
    wanted: int

    @property
    def error(self) -> float:
        """Relative distance from what was wanted."""
        return abs(self.found - self.wanted) / self.wanted


def match_density(wanted: int, eligible: int, beside: int = 0) -> Match:
    """The density at which round(density x eligible) + beside is ``wanted``.

    ``eligible``: entries that a mask may choose from; ``beside``: values that travel with any mask. Raises
    ConfigError, naming the nearest possible budget, when the density would be above 1 or the mask empty.
    """
    k = wanted - beside
    if k > eligible:
        raise ConfigError(
            f"budget: {wanted:,} values need a density of {k / eligible:.3g}, above 1; the nearest possible"
            f" budget is {eligible + beside:,} values"
        )
    if k < 1:
        raise ConfigError(
            f"budget: {wanted:,} values leave none for the mask beside {beside:,} that travel with it; the"
            f" nearest possible budget is {beside + 1:,} values"
        )
    density = k / eligible
    return Match("density", density, max(1, round(density * eligible)) + beside, wanted)


def match_whole(wanted: int, per_unit: int, beside: int = 0, setting: str = "rank", most: int = 0) -> Match:
    """The whole number of units (a rank) whose ``per_unit`` values each come nearest to ``wanted``.

    ``most``: the largest number that means anything (0: no bound). Raises ConfigError, naming the nearest
    possible budget, below one unit, above ``most``, and when the nearest is more than 1 % away: then the
    other side of the comparison must move, a mask's density for instance, which can be any number.
    """
    units = (wanted - beside) / per_unit
    nearest = max(1, round(units))
    if most and nearest > most:
        raise ConfigError(
            f"budget: {wanted:,} values need {setting} {units:.3g}, above {most}; the nearest possible budget"
            f" is {most * per_unit + beside:,} values"
        )
    match = Match(setting, nearest, nearest * per_unit + beside, wanted)
    if units < 1 and match.error > TOLERANCE:
        raise ConfigError(
            f"budget: {wanted:,} values need {setting} {units:.3g}, below 1; the nearest possible budget is"
            f" {match.found:,} values ({setting} 1)"
        )
    if match.error > TOLERANCE:
        raise ConfigError(
            f"budget: {wanted:,} values are no whole {setting} ({units:.3g}); the nearest possible budget is"
            f" {match.found:,} values ({setting} {nearest}), {100 * match.error:.1f} % away; match the"
            " others' densities to it instead"
        )
    return match


def resolve(
    study: Study, config_of: Callable[[Variant, Mapping[str, Any]], RunConfig]
) -> dict[str, dict[str, Any]]:
    """The settings that each variant's budget comes to, by variant. Raises ConfigError, naming the variant.

    ``config_of(variant, sizes)``: a run's settings with some changed. Loads the model; trains nothing.
    """
    out: dict[str, dict[str, Any]] = {}
    sizes = _Sizes(config_of)
    for variant in sorted(study.variants, key=lambda one: bool(one.budget and one.budget.like)):
        if variant.budget is None:
            out[variant.name] = {}
            continue
        try:
            match = _match(study, variant, sizes, out)
        except ConfigError as error:
            raise ConfigError(f"variant {variant.name!r}: {error}") from None
        out[variant.name] = {match.setting: match.value}
    return {variant.name: out[variant.name] for variant in study.variants}


class _Sizes:
    """How many shared values a variant sends, measured on the layout of its vector."""

    def __init__(self, config_of: Callable[[Variant, Mapping[str, Any]], RunConfig]) -> None:
        self.config_of = config_of

    def shared(self, variant: Variant, changed: Mapping[str, Any]) -> tuple[int, int]:
        """(values, eligible entries) of a variant with some settings changed."""
        from experiments.compare.reuse import sent_values, workspace_for

        workspace = workspace_for(self.config_of(variant, changed))
        return sent_values(workspace), workspace.space.eligible_size


def _match(study: Study, variant: Variant, sizes: _Sizes, done: Mapping[str, Mapping[str, Any]]) -> Match:
    budget = variant.budget
    assert budget is not None
    by = budget.by or ("density" if METHODS[variant.method].mask is not None else "")
    if not by:
        raise ConfigError(
            f"budget.by: method {variant.method!r} has no density; name the setting to change, such as a rank"
        )
    wanted = _wanted(study, variant, sizes, done)
    if by == "density":
        probe = 0.001
        values, eligible = sizes.shared(variant, {by: probe})
        return match_density(wanted, eligible, values - max(1, round(probe * eligible)))
    one, two = (sizes.shared(variant, {by: count})[0] for count in (1, 2))
    return match_whole(wanted, two - one, 2 * one - two, by)


def _wanted(study: Study, variant: Variant, sizes: _Sizes, done: Mapping[str, Mapping[str, Any]]) -> int:
    budget = variant.budget
    assert budget is not None
    if budget.like:
        other = study.variant(budget.like)
        return sizes.shared(other, done[other.name])[0]
    if budget.values:
        return budget.values
    return max(1, round((budget.bytes or 0) / value_bytes(sizes.config_of(variant, {}).up)))
