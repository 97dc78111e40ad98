"""A study: what is compared, on which rows, with which learning rates; one TOML file.

The settings that all runs share stand under ``[run]``, in the words of a run's own settings
(docs/settings.md); each ``[[variants]]`` table names a method, what it changes, and the learning rates
that it may choose from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fedmask.config import (
    MethodName,
    Metric,
    Name,
    PartitionConfig,
    Real,
    RunConfig,
    Settings,
    Whole,
    read_toml,
)
from fedmask.errors import ConfigError, unknown
from fedmask.methods import METHODS

# A narrower grid decides a comparison by where it stands: small sets of values want far larger steps.
LEAST_SPAN = 30.0
# Set by the study itself for each run.
_OWN = ("name", "runs_dir", "seed", "method", "tasks", "workers", "test_every_round")


# Also a file's name, but pafi+hiwi should be called what it is.
VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=48)]


class HubRows(Settings):
    """A task's rows on the Hugging Face hub: the splits, and its columns where they have other names there.

    ``source``: ``owner/name``, ``owner/name:config`` or ``owner/name@revision``.
    """

    source: str = Field(min_length=1)
    train: str = "train"
    reported: str = "validation"
    text: tuple[str, ...] = ()
    label: str = ""


class StudyTask(Settings):
    """One task and its rows. Files are named relative to the data folder; none means a bundled task.

    ``train`` is cut into ``train_rows`` that are dealt to the clients and ``validation_rows`` that choose
    the learning rate; ``reported`` holds the rows that are reported, which choose nothing. A bundled task
    gives all three from its one table. ``where``: only rows whose columns have these values. ``hub``: from
    where the rows are fetched when no data folder is named; ``fetch``: how to get files that no hub has.
    """

    name: Name
    train: str = ""
    reported: str = ""
    hub: HubRows | None = None
    fetch: str = ""
    text: tuple[str, ...] = Field(default=("text",), min_length=1, max_length=2)
    label: str = "label"
    metric: Metric = "accuracy"
    clients: Whole = Field(ge=1)
    where: dict[str, str] = Field(default_factory=dict)
    train_rows: Whole = Field(ge=1)
    validation_rows: Whole = Field(default=500, ge=1)
    reported_rows: Whole | None = Field(default=None, ge=1)
    partition: PartitionConfig | None = None

    @field_validator("text", mode="before")
    @classmethod
    def _one_column_is_a_tuple_too(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _both_files_or_none(self) -> StudyTask:
        if bool(self.train) != bool(self.reported):
            raise ConfigError("reported: train and reported are two files; name both, or none (bundled)")
        if not self.train and (self.hub is not None or self.fetch):
            raise ConfigError("train: hub and fetch say where named files come from; a bundled task has none")
        if self.hub is not None and len(self.hub.text) not in (0, len(self.text)):
            raise ConfigError(f"hub.text: expected {len(self.text)} columns, found {len(self.hub.text)}")
        if not self.train and self.reported_rows is None:
            raise ConfigError("reported_rows: a bundled task is one table, so say how many rows are reported")
        return self


class Budget(Settings):
    """How large a variant must be: matched by changing ``by`` until it sends as many values, or bytes.

    Exactly one of ``values`` (shared values sent per client and round), ``bytes`` (payload of the whole run:
    all clients, both directions, heads and masks included) and ``like`` (another variant's values). ``by``:
    the setting that is changed, the density where the method has a mask.
    """

    values: Whole | None = Field(default=None, ge=1)
    bytes: Whole | None = Field(default=None, ge=1)
    like: str = ""
    by: str = ""

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [key for key in ("values", "bytes", "like") if getattr(self, key)]
        if len(given) != 1:
            raise ConfigError(f"values: expected one of values, bytes and like, found {len(given)} of them")
        return self


class Variant(Settings):
    """One way to tune: a method, the settings in which it differs, and its learning rates.

    ``lr``: tried on the first seed; ``tune``: the setting that they are for; ``follow``: further settings
    that are a fixed multiple of it. ``settings``: dotted keys of a run's settings. ``narrow``: why this
    variant's grid may span less than a factor of 30.
    """

    name: VariantName
    method: MethodName
    lr: tuple[Real, ...] = Field(min_length=1)
    tune: str = "train.lr"
    follow: dict[str, Real] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    budget: Budget | None = None
    narrow: str = ""

    @field_validator("lr")
    @classmethod
    def _rates_are_sorted(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(rate <= 0 for rate in value):
            raise ConfigError(f"lr: expected positive learning rates, found {min(value)}")
        if len(set(value)) != len(value):
            raise ConfigError("lr: expected different learning rates, found one of them twice")
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _what_is_searched_matters(self) -> Variant:
        tuned = {self.tune, *self.follow}
        # A method with adapters on biases alone does not listen to train.lr, so its grid would be flat.
        if METHODS[self.method].biases == "adapter" and "train.adapter_lr" not in tuned:
            raise ConfigError(
                "follow: this method's adapters have a learning rate of their own; let it follow the grid"
                ' by follow = {"train.adapter_lr" = 0.2}, or search it by tune = "train.adapter_lr"'
            )
        doubled = sorted(tuned & set(self.settings))
        if doubled:
            raise ConfigError(f"settings: {doubled[0]} is searched, so it cannot be fixed too")
        return self


class Study(Settings):
    """A whole study. ``select``: the round whose validation score chooses the learning rate.

    ``narrow``: why all grids may span less than a factor of 30; a variant can say it for its own alone.
    ``reference``: the variant against whose size and bytes the tables call others equal; ``full``: the one
    whose quality is the goal of "bytes to 95 %".
    """

    name: Name
    title: str = ""
    seeds: tuple[Whole, ...] = Field(default=(1, 2, 3), min_length=1)
    select: Literal["final", "best"] = "final"
    narrow: str = ""
    reference: str = "pafi"
    full: str = "full"
    run: dict[str, Any] = Field(default_factory=dict)
    tasks: tuple[StudyTask, ...] = Field(min_length=1)
    variants: tuple[Variant, ...] = Field(min_length=1)

    @field_validator("run")
    @classmethod
    def _shared_settings_are_known(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _OWN:
                raise ConfigError(f"{key}: the study sets this for each run; leave it out of [run]")
            if key not in RunConfig.model_fields:
                raise ConfigError(unknown("key", key, [k for k in RunConfig.model_fields if k not in _OWN]))
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> Study:
        names = [variant.name for variant in self.variants]
        for kind, found in (("variants", names), ("tasks", [task.name for task in self.tasks])):
            doubled = sorted({name for name in found if found.count(name) > 1})
            if doubled:
                raise ConfigError(f"{kind}: each needs a name of its own, found {doubled[0]!r} twice")
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError("seeds: expected different seeds, found one of them twice")
        for variant in self.variants:
            self._check_grid(variant)
            if variant.budget is not None and variant.budget.like:
                self._check_like(variant, names)
        return self

    def _check_grid(self, variant: Variant) -> None:
        span = variant.lr[-1] / variant.lr[0]
        if span < LEAST_SPAN * (1 - 1e-9) and not (variant.narrow or self.narrow):
            raise ConfigError(
                f"variant {variant.name!r}: lr: expected a grid at least {LEAST_SPAN:g} times wide, found"
                f" {span:.3g} times; widen it, or say under the variant's 'narrow' why it does without"
            )

    def _check_like(self, variant: Variant, names: list[str]) -> None:
        assert variant.budget is not None
        other = next((v for v in self.variants if v.name == variant.budget.like), None)
        if other is None:
            where = f"variant {variant.name!r}: budget.like: "
            raise ConfigError(where + unknown("variant", variant.budget.like, names))
        if other.budget is not None and other.budget.like:
            raise ConfigError(
                f"variant {variant.name!r}: budget.like: {other.name!r} is itself matched to another; name"
                f" {other.budget.like!r}"
            )

    def variant(self, name: str) -> Variant:
        """The variant of that name. Raises ConfigError with the nearest one."""
        found = next((variant for variant in self.variants if variant.name == name), None)
        if found is None:
            raise ConfigError(unknown("variant", name, [variant.name for variant in self.variants]))
        return found


def load_study(path: Path) -> Study:
    """The study in a TOML file. Raises ConfigError, naming the file."""
    try:
        return study_from(read_toml(path))
    except ConfigError as error:
        raise ConfigError(f"study {path}: {error}") from None


def study_from(values: Mapping[str, Any]) -> Study:
    """A study from plain values, as TOML gives them. Raises ConfigError; nothing is read or run."""
    from experiments.compare.plan import configs_without_data

    study = Study(**values)
    configs_without_data(study)  # a run's own mistakes are found now, not after an hour
    return study
