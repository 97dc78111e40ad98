"""A study's results in rows: one row a variant, whatever has run so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from experiments.compare.choose import Result, Winner, best_point, choose, score_of
from experiments.compare.plan import grid, repeats, settings_of
from experiments.compare.released import Packed, packed
from experiments.compare.study import Study, Variant
from fedmask.errors import ConfigError

GOALS = (0.95, 0.99)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the seeds (None for one seed)."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one or more values."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Point:
    """The mean over the seeds at one round: reported quality, and bytes of all clients so far."""

    round: int
    quality: float
    payload_bytes: float


@dataclass(frozen=True)
class Summary:
    """One variant. Fields but the first four are empty until a run of it is done.

    While not all rates were tried, the winner is the best so far (``provisional``).

    ``grid``: rate -> validation score of the search, None for a failed run; rates not yet run are absent.
    ``against``: paired difference to the reference's final quality with its 95 % interval (lower, mean,
    upper), from the seeds that both have. Bytes are means over clients, rounds and seeds. ``packed``: the
    indices of task-specific masks, mean over the seeds. ``overlap``: how the clients' own masks overlap in
    the first seed.
    """

    variant: Variant
    wanted: int
    grid: Mapping[float, float | None]
    errors: Sequence[str]
    winner: Winner | None = None
    final: Spread | None = None
    best: Spread | None = None
    by_task: Mapping[str, Spread] = field(default_factory=dict)
    curve: Sequence[Point] = ()
    against: tuple[float, float, float] | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    packed: Packed | None = None
    overlap: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.variant.name

    @property
    def provisional(self) -> bool:
        """Whether rates remain to be tried, so that another one may win."""
        return len(self.grid) < len(self.variant.lr)

    def reach(self, goal: float) -> Point | None:
        """The first round whose mean quality is ``goal`` or more."""
        return next((point for point in self.curve if point.quality >= goal), None)

    def within(self, payload_bytes: float) -> Point | None:
        """The last round that ``payload_bytes`` pay for."""
        return next((p for p in reversed(self.curve) if p.round and p.payload_bytes <= payload_bytes), None)


def summarize(study: Study, results: Sequence[Result]) -> list[Summary]:
    """A row for each variant, in the study's order. Results of other settings are left out."""
    at = {(r["variant"], r["lr"], r["seed"]): r for r in results if _states(study, r)}
    finals = {}
    chosen: dict[str, tuple[Winner | None, list[Result]]] = {}
    for variant in study.variants:
        chosen[variant.name] = _winner(study, variant, at)
        finals[variant.name] = {
            r["seed"]: score_of(r["curve"][-1], "reported") for r in chosen[variant.name][1]
        }
    return [
        _summary(
            study, variant, at, *chosen[variant.name], _difference(finals, variant.name, study.reference)
        )
        for variant in study.variants
    ]


def _states(study: Study, result: Result) -> bool:
    """Whether a result was made by the settings that the study states now; matched sizes are its own."""
    try:
        variant = study.variant(result["variant"])
    except ConfigError:
        return False
    if result["lr"] not in variant.lr or result["seed"] not in study.seeds:
        return False
    stated = settings_of(study, variant, result["lr"], result["seed"])
    found = dict(result["settings"])
    if variant.budget is not None:
        knob = variant.budget.by or "density"
        return _without(stated, knob) == _without(found, knob)
    return stated == found


def _without(values: Mapping[str, Any], dotted: str) -> dict[str, Any]:
    first, _, rest = dotted.partition(".")
    out = dict(values)
    if not rest:
        out.pop(first, None)
    elif isinstance(out.get(first), Mapping):
        out[first] = _without(out[first], rest)
    return {key: value for key, value in out.items() if value != {}}


def _winner(
    study: Study, variant: Variant, at: Mapping[tuple[str, float, int], Result]
) -> tuple[Winner | None, list[Result]]:
    """The winner of the rates tried so far, and its finished runs."""
    tried = [at.get((cell.variant, cell.lr, cell.seed)) for cell in grid(study, variant)]
    winner = choose([result for result in tried if result is not None], variant.lr, study.select)
    if winner is None:
        return None, []
    cells = [(variant.name, winner.lr, seed) for seed in study.seeds]
    return winner, [at[cell] for cell in cells if cell in at and at[cell]["status"] == "ok"]


def _summary(
    study: Study,
    variant: Variant,
    at: Mapping[tuple[str, float, int], Result],
    winner: Winner | None,
    runs: Sequence[Result],
    against: tuple[float, float, float] | None,
) -> Summary:
    tried = {lr: at.get((variant.name, lr, study.seeds[0])) for lr in variant.lr}
    found = {lr: _validation(study, result) for lr, result in tried.items() if result is not None}
    cells = grid(study, variant) + (repeats(study, variant, winner.lr) if winner else [])
    failed = [(cell, at.get((cell.variant, cell.lr, cell.seed))) for cell in cells]
    errors = [f"lr {c.lr:g}, seed {c.seed}: {r['error']}" for c, r in failed if r and r["status"] != "ok"]
    if not runs:
        return Summary(variant, len(study.seeds), found, errors, winner)
    return Summary(
        variant,
        len(study.seeds),
        found,
        errors,
        winner,
        final=Spread.of([score_of(run["curve"][-1], "reported") for run in runs]),
        best=Spread.of([score_of(best_point(run), "reported") for run in runs]),
        by_task={
            task: Spread.of([run["curve"][-1]["reported"][task] for run in runs])
            for task in runs[0]["curve"][-1]["reported"]
        },
        curve=_mean_curve(runs),
        against=against,
        numbers=_numbers(runs),
        packed=_packed(runs),
        overlap=next((run["overlap"] for run in runs if run.get("overlap")), {}),
    )


def _validation(study: Study, result: Result) -> float | None:
    if result["status"] != "ok":
        return None
    point = result["curve"][-1] if study.select == "final" else best_point(result)
    return score_of(point, "validation")


def _mean_curve(runs: Sequence[Result]) -> list[Point]:
    by_round = zip(*(run["curve"] for run in runs), strict=True)
    return [
        Point(
            points[0]["round"],
            fmean(score_of(point, "reported") for point in points),
            fmean(point["payload_bytes"] for point in points),
        )
        for points in by_round
    ]


def _numbers(runs: Sequence[Result]) -> dict[str, float]:
    out = {key: float(runs[0][key]) for key in ("trained_values", "sent_values", "stored_bytes")}
    out["trained_values"] = max(out["trained_values"], out["sent_values"])  # what is sent was trained
    out["head_values"] = fmean(runs[0]["head_values"].values())
    for key in runs[0]["bytes"]:
        out[key] = fmean(run["bytes"][key] for run in runs)
    if all("positions" in run for run in runs):  # older results did not count them
        for way in ("up", "down"):
            out[f"positions_{way}_per_client"] = fmean(
                run["positions"][f"bytes_{way}"] / sum(task["clients"] for task in run["config"]["tasks"])
                for run in runs
            )
    if "backbone_size" in runs[0]:
        out["backbone_size"] = float(runs[0]["backbone_size"])
    out["client_seconds"] = fmean(run["client_seconds"] for run in runs)
    peaks = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"]]
    if peaks:
        # A process goes on to the next run, and holds some of what the one before took: the least is nearest.
        out["peak_memory_bytes"] = float(min(peaks))
    return out


def _packed(runs: Sequence[Result]) -> Packed | None:
    found = [one for one in map(packed, runs) if one is not None]
    if len(found) < len(runs):
        return None
    return Packed(*(fmean(getattr(one, key) for one in found) for key in ("payload", "indices", "sets")))


def _difference(
    finals: Mapping[str, Mapping[int, float]], name: str, reference: str
) -> tuple[float, float, float] | None:
    """Paired by seed: shards, heads and orders are the same for both, so their luck cancels out."""
    ours, theirs = finals[name], finals.get(reference, {})
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if name == reference or len(pairs) < 2:
        return None
    from scipy import stats

    mean, half = fmean(pairs), stdev(pairs) / math.sqrt(len(pairs))
    half *= float(stats.t.ppf(0.975, len(pairs) - 1))
    return mean - half, mean, mean + half


def goals(study: Study, rows: Sequence[Summary]) -> dict[float, float]:
    """Share -> the quality that is that share of full fine-tuning's; empty until that has run."""
    full = next((row for row in rows if row.name == study.full and row.final is not None), None)
    return {} if full is None or full.final is None else {share: share * full.final.mean for share in GOALS}
