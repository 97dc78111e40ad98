"""Sizes that match: a variant's density or rank, chosen so that it sends as many values as it must.

Only the setting that the variant names is changed. Values are counted on the model itself (the layout of the
vector that travels), bytes on the messages of a whole run, made by its own code before it runs
(``experiments.estimate``). So a method that is new needs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.compare.study import Study, Variant
from experiments.estimate import LINKS, estimate, label_counts
from fedmask.config import RunConfig
from fedmask.errors import ConfigError
from fedmask.methods import METHODS
from fedmask.workspace import Workspace

TOLERANCE = 0.01


@dataclass(frozen=True)
class Match:
    """What a budget came to: the setting's value, and the values (or bytes) it gives and should give."""

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
    if per_unit <= 0:
        raise ConfigError(
            f"budget.by: {setting} does not change how many values there are; name another setting"
        )
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

    ``config_of(variant, sizes)``: a run's settings with some changed. Loads the model; trains nothing. Each
    variant's mask and factors are looked at in their final size: what cannot be is refused here.
    """
    out: dict[str, dict[str, Any]] = {}
    sizes = _Sizes(config_of)
    for variant in sorted(study.variants, key=lambda one: bool(one.budget and one.budget.like)):
        try:
            match = _match(study, variant, sizes, out) if variant.budget is not None else None
            out[variant.name] = {} if match is None else {match.setting: match.value}
            sizes.check(variant, out[variant.name])
        except ConfigError as error:
            raise ConfigError(f"variant {variant.name!r}: {error}") from None
    return {variant.name: out[variant.name] for variant in study.variants}


class _Sizes:
    """How large a variant is with some settings changed."""

    def __init__(self, config_of: Callable[[Variant, Mapping[str, Any]], RunConfig]) -> None:
        self.config_of = config_of
        self.labels: dict[str, int] = {}

    def workspace(self, variant: Variant, changed: Mapping[str, Any]) -> Workspace:
        """The model with what the variant trains."""
        from experiments.compare.reuse import workspace_for

        return workspace_for(self.config_of(variant, changed))

    def shared(self, variant: Variant, changed: Mapping[str, Any]) -> tuple[int, int]:
        """(values, eligible entries), measured on the layout of its vector."""
        from experiments.compare.reuse import sent_values

        workspace = self.workspace(variant, changed)
        return sent_values(workspace), workspace.space.eligible_size

    def payload(self, variant: Variant, changed: Mapping[str, Any]) -> int:
        """Bytes of a whole run's payload: all clients, both directions, masks included."""
        config = self.config_of(variant, changed)
        if config.has_views:
            raise ConfigError(
                "budget.bytes: what comes down where each client has a mask, or where it moves, only the run"
                " knows; match its values instead"
            )
        self.labels = self.labels or label_counts(config, None)
        rows = estimate(config, self.labels, LINKS["lan"])["rows"]
        return sum(row["payload_bytes"] for row in rows if row["kind"] != "evaluate")

    def check(self, variant: Variant, changed: Mapping[str, Any]) -> None:
        """Find the mask where that needs no data; ConfigError for what its matrices cannot hold."""
        method = METHODS[variant.method]
        if method.mask is None and "lora" not in (method.dense or ""):
            return
        workspace = self.workspace(variant, changed)
        _ = workspace.mask  # raises where the rule's tensors do not hold as many entries
        if method.mask is not None:
            return
        rank, most = workspace.config.lora.rank, _most_rank(workspace)
        if rank > most:
            raise ConfigError(f"lora.rank: expected at most {most}, the matrices' least side, found {rank}")


def _most_rank(workspace: Workspace) -> int:
    """The least side of the matrices that LoRA adapts: no product of factors has a higher rank."""
    from fedmask.space import backbone_parameters
    from fedmask.trainables import target_layers

    model = workspace.backbone.model
    weights = backbone_parameters(model)
    return min(
        min(weights[f"{name}.weight"].shape) for name in target_layers(model, workspace.config.lora.targets)
    )


def _match(study: Study, variant: Variant, sizes: _Sizes, done: Mapping[str, Mapping[str, Any]]) -> Match:
    budget = variant.budget
    assert budget is not None
    by = budget.by or ("density" if METHODS[variant.method].mask is not None else "")
    if not by:
        raise ConfigError(
            f"budget.by: method {variant.method!r} has no density; name the setting to change, such as a rank"
        )
    if budget.bytes is not None:
        return _match_bytes(variant, by, budget.bytes, sizes)
    wanted = _wanted(study, variant, sizes, done)
    if by == "density":
        probe = 0.001
        values, eligible = sizes.shared(variant, {by: probe})
        return match_density(wanted, eligible, values - max(1, round(probe * eligible)))
    one, two = (sizes.shared(variant, {by: count})[0] for count in (1, 2))
    most = _most_rank(sizes.workspace(variant, {by: 1})) if by == "lora.rank" else 0
    return match_whole(wanted, two - one, 2 * one - two, by, most)


def _match_bytes(variant: Variant, by: str, wanted: int, sizes: _Sizes) -> Match:
    """The size at which a whole run's payload comes to ``wanted`` bytes: straight lines through two sizes.

    Packed indices and scales make the payload no straight line quite, so a density is drawn nearer a few
    times. Raises ConfigError, naming the nearest possible budget, where that is more than 1 % away.
    """
    whole = by != "density"
    unit = 1 if whole else sizes.shared(variant, {by: 0.001})[1]
    most = (
        unit if not whole else _most_rank(sizes.workspace(variant, {by: 1})) if by == "lora.rank" else 1 << 20
    )
    near, far = (1, 2) if whole else (max(1, unit // 1000), max(2, unit // 500))
    found = {count: sizes.payload(variant, {by: count if whole else count / unit}) for count in (near, far)}
    for _ in range(1 if whole else 4):
        slope = (found[far] - found[near]) / (far - near)
        if slope <= 0:  # neighbours with equal bytes: no nearer than this
            break
        best = min(most, max(1, round(far + (wanted - found[far]) / slope)))
        if best in found:
            break
        found[best] = sizes.payload(variant, {by: best if whole else best / unit})
        near, far = far, best
    count = min(found, key=lambda one: abs(found[one] - wanted))
    match = Match(by, count if whole else count / unit, found[count], wanted)
    if match.error > TOLERANCE:
        raise ConfigError(
            f"budget: no {by} comes to {wanted:,} bytes in the whole run; the nearest possible budget is"
            f" {match.found:,} bytes ({by} {match.value:.4g}), {100 * match.error:.1f} % away"
        )
    return match


def _wanted(study: Study, variant: Variant, sizes: _Sizes, done: Mapping[str, Mapping[str, Any]]) -> int:
    budget = variant.budget
    assert budget is not None
    if budget.like:
        other = study.variant(budget.like)
        return sizes.shared(other, done[other.name])[0]
    assert budget.values is not None  # bytes are matched elsewhere
    return budget.values
