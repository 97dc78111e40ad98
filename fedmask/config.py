"""The settings of one run: what a TOML file, the command line or Python code may say.

``RunConfig`` is the whole; its tables and their common rules are in ``fedmask.config_tables``.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from fedmask.channel.ways import down_way, up_codec
from fedmask.config_errors import short as _short
from fedmask.config_tables import (
    FILE_ENDINGS,
    AdapterConfig,
    LoraConfig,
    Metric,
    Name,
    PartitionConfig,
    PublicConfig,
    Real,
    ScoreConfig,
    ServerConfig,
    Settings,
    TaskConfig,
    TrainConfig,
    Whole,
)
from fedmask.errors import ConfigError
from fedmask.methods import METHODS, TASK_SPECIFIC, check_federated, check_masks, known_method
from fedmask.products import check_products
from fedmask.sharing import check_sharing

__all__ = [
    "FILE_ENDINGS",
    "AdapterConfig",
    "LoraConfig",
    "MethodName",
    "Metric",
    "Name",
    "PartitionConfig",
    "PublicConfig",
    "Real",
    "RunConfig",
    "ScoreConfig",
    "ServerConfig",
    "Settings",
    "TaskConfig",
    "TrainConfig",
    "Whole",
    "from_dict",
    "from_json",
    "load_config",
    "read_toml",
]


MethodName = Annotated[str, AfterValidator(known_method)]


class RunConfig(Settings):
    """One whole run. Clients are numbered over the tasks in order: the first task's come first."""

    name: Name = "run"
    seed: Whole = Field(default=1, ge=0, lt=2**63)
    model: str = Field(default="minilm", min_length=1)
    head: Literal["mean", "hf"] = "mean"
    method: MethodName = "pafi+hiwi"
    density: Real = Field(default=0.005, gt=0, le=1)
    eligible: Literal["linear", "linear+embeddings", "all"] = "linear"
    per_tensor: bool = False
    mask_schedule: Literal["fixed", "rotate", "anneal"] = "fixed"
    mask_bands: Whole | None = Field(default=None, ge=2)
    placement: Literal["client", "agreed", "server"] = "agreed"
    agree_by: Literal["scores", "votes"] = "scores"
    public: PublicConfig | None = None
    mask_transport: Literal["recipe", "packed"] = "recipe"
    up: str = "fp32"
    down: str = "fp32"
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    kernel: Literal["auto", "sampled", "dense"] = "auto"
    rounds: Whole = Field(default=8, ge=1)
    threads: Whole = Field(default=1, ge=1)
    workers: Whole | None = Field(default=None, ge=1)
    eval_rows: Whole = Field(default=1000, ge=1)
    test_every_round: bool = False
    overlap_batches: Whole = Field(default=2, ge=0)
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    scores: ScoreConfig = Field(default_factory=ScoreConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    runs_dir: str = Field(default="runs", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _methods_may_choose_codecs(cls, values: Any) -> Any:
        method = METHODS.get(str(values.get("method"))) if isinstance(values, dict) else None
        return values if method is None else {"up": method.up, "down": method.down, **values}

    @field_validator("up")
    @classmethod
    def _up_is_a_codec(cls, value: str) -> str:
        up_codec(value)
        return value

    @field_validator("down")
    @classmethod
    def _down_is_a_way(cls, value: str) -> str:
        down_way(value)
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        check_federated(METHODS[self.method], self.adapter)
        check_masks(self)
        check_sharing(self)
        check_products(self)
        names = [task.name for task in self.tasks]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError(f"tasks: each needs a name of its own, found {doubled[0]!r} twice")
        sampled = self.server.clients_per_round or self.clients
        if sampled > self.clients:
            raise ConfigError(
                f"server.clients_per_round: expected at most {self.clients} clients, found {sampled}"
            )
        if self.server.over_select > 1 and self.server.clients_per_round is None:
            raise ConfigError("server.over_select: expected server.clients_per_round with it, found none")
        if self.server.min_replies > sampled:
            raise ConfigError(
                f"server.min_replies: expected at most the {sampled} clients of a round,"
                f" found {self.server.min_replies}"
            )
        return self

    def task_of(self, client: int) -> TaskConfig:
        """The settings of a client's task."""
        return [task for task in self.tasks for _ in range(task.clients)][client]

    @property
    def has_views(self) -> bool:
        """Whether the trained entries differ between rounds or clients, so that the state is a union."""
        own = self.method in TASK_SPECIFIC and self.placement == "client"
        return own or self.mask_schedule != "fixed"

    @property
    def clients(self) -> int:
        """Number of clients over all tasks."""
        return sum(task.clients for task in self.tasks)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """A config from plain values (as TOML or JSON give them). Raises ConfigError."""
    return RunConfig(**values)


def from_json(text: str) -> RunConfig:
    """The inverse of ``config.model_dump_json()``. Raises ConfigError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"config: expected JSON, found {_short(text)} ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: expected a JSON object, found {_short(values)}")
    return from_dict(values)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file as plain values. Raises ConfigError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # also UnicodeDecodeError and TOMLDecodeError
        raise ConfigError(f"config file {path}: expected TOML, found an error ({error})") from None


def load_config(path: str | Path) -> RunConfig:
    """The config of a TOML file. Raises ConfigError, naming the file."""
    values = read_toml(path)
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"config file {path}: {error}") from None
