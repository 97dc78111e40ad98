"""The settings of one run: what a TOML file, the command line or Python code may say.

Every model is frozen, refuses unknown keys and turns each mistake into one ``ConfigError`` line
that names the key, what was expected and what was found. Nothing here imports torch or Flower.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedmask.channel.ways import down_way, up_codec
from fedmask.config_errors import one_line as _one_line
from fedmask.config_errors import short as _short
from fedmask.errors import ConfigError, unknown
from fedmask.methods import METHODS, TASK_SPECIFIC, check_federated, check_masks
from fedmask.sharing import Sharing, check_sharing

# Strict: a TOML string "8" or the value true is no number, and saying so beats guessing.
Whole = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(strict=True)]
# Names become folder names and segment names, so a path separator must not get in.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]

Metric = Literal["accuracy", "f1", "matthews", "spearman"]
# Of the files that tasks are read from, and of others that no hub name ends in.
FILE_ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_OTHER_ENDINGS = (".txt", ".xlsx", ".xls", ".ods", ".xml", ".ndjson", ".arrow", ".feather", ".dat", ".zip",
                  ".gz", ".bz2", ".xz", ".zst", ".pkl", ".db", ".sqlite")  # fmt: skip
PartitionKind = Literal["dirichlet", "pathological", "shard", "quantity", "iid", "natural"]


class _Settings(BaseModel):
    """Shared rules of all settings: frozen, no unknown keys, no NaN, errors in one line.

    The text ``none`` clears a setting that may be None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        for key, field in type(self).model_fields.items():
            # TOML and the command line have no word for None, so text stands for it where None is allowed.
            if values.get(key) == "none" and type(None) in get_args(field.annotation):
                values[key] = None
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error.errors()[0], type(self))) from None


class PartitionConfig(_Settings):
    """How a task's training rows are dealt to its clients (``alpha`` is the Dirichlet concentration).

    Each client holds out the share ``held_out`` of its rows for itself, at most ``held_out_max`` rows.
    """

    kind: PartitionKind = "dirichlet"
    alpha: Real = Field(default=0.5, gt=0)
    classes_per_client: Whole = Field(default=2, ge=1)
    shards_per_client: Whole = Field(default=2, ge=1)
    column: str = ""
    held_out: Real = Field(default=0.1, ge=0, lt=1)
    held_out_max: Whole = Field(default=200, ge=0)

    @model_validator(mode="after")
    def _natural_needs_a_column(self) -> PartitionConfig:
        if self.kind == "natural" and not self.column:
            raise ConfigError("column: a natural partition needs the column whose values are the clients")
        return self


class _SourceConfig(_Settings):
    """Where labelled rows come from: a bundled task (``source`` empty), a local file, or a hub data set."""

    name: Name
    source: str = ""
    text: tuple[str, ...] = Field(default=(), max_length=2)
    label: str = ""
    metric: Metric = "accuracy"

    @field_validator("text", mode="before")
    @classmethod
    def _one_column_is_a_tuple_too(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _own_data_needs_columns(self) -> Self:
        if self.source and not (self.text and self.label):
            raise ConfigError(f"task {self.name!r} has a source, so it needs its text and label columns")
        return self


class TaskConfig(_SourceConfig):
    """One task, and its clients."""

    clients: Whole = Field(ge=1)
    dev: str = ""
    test: str = ""
    own_data: bool = False
    labels: tuple[str, ...] = ()
    most_rows: Whole = Field(default=100_000, ge=1)
    partition: PartitionConfig | None = None

    @model_validator(mode="after")
    def _own_data_is_the_clients(self) -> TaskConfig:
        if not self.own_data:
            if self.labels:
                raise ConfigError("labels: only for own_data; otherwise the rows say which labels there are")
            return self
        if self.source or self.partition is not None:
            raise ConfigError("own_data: training rows lie with the clients; leave source and partition out")
        if not (self.text and self.label and self.dev):
            raise ConfigError("own_data: it needs text, label, and dev: a file with the server's own rows")
        if self.metric == "spearman" and self.labels:
            raise ConfigError("labels: a regression (metric spearman) has none; leave them out")
        if self.metric != "spearman" and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ConfigError("labels: own_data needs two different ones or more: no party sees all rows")
        return self

    @property
    def is_local(self) -> bool:
        """Whether ``source`` names a file of this machine, there or not, rather than a hub data set."""
        path = Path(self.source).expanduser()
        return bool(self.source) and (
            path.exists()
            or path.suffix.lower() in (*FILE_ENDINGS, *_OTHER_ENDINGS)
            or self.source.startswith((".", "/", "~"))
            or self.source.count("/") > 1
            or "\\" in self.source
            or ("/" in self.source and path.parent.is_dir())
        )


class PublicConfig(_SourceConfig):
    """At most ``rows`` rows of the server's own, of a task that no client has: for placement ``server``."""

    rows: Whole = Field(default=1024, ge=1)

    @property
    def task(self) -> TaskConfig:
        """The same as a task."""
        return TaskConfig(**self.model_dump(exclude={"rows"}), clients=1)


class AdapterConfig(_Settings):
    """The HiWi weight adapter: hidden width, activation, and what it is folded into."""

    bottleneck: Whole = Field(default=16, ge=1)
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    target: Literal["bias", "weight"] = "bias"


class LoraConfig(_Settings):
    """LoRA's factors: rank r, scaling alpha / r, and beside which linear layers (parts joined by ``+``)."""

    rank: Whole = Field(default=8, ge=1)
    alpha: Real = Field(default=16.0, gt=0)
    targets: str = Field(default="query+value", min_length=1)


class TrainConfig(_Settings):
    """Local training. ``steps`` caps the optimizer steps per client and round; None: epochs decide.

    ``head_lr`` defaults to ``lr``; adapters on biases want smaller steps and have ``adapter_lr``.
    ``clip_norm`` bounds the norm of the whole trained vector's gradient; None: no clipping.
    ``dropout`` goes for every dropout layer, backbone included.
    """

    epochs: Real = Field(default=1.0, gt=0)
    steps: Whole | None = Field(default=None, ge=1)
    batch_size: Whole = Field(default=32, ge=1)
    max_tokens: Whole = Field(default=64, ge=4)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Real = Field(default=5e-3, gt=0)
    head_lr: Real | None = Field(default=None, gt=0)
    adapter_lr: Real = Field(default=1e-3, gt=0)
    momentum: Real = Field(default=0.9, ge=0, lt=1)
    weight_decay: Real = Field(default=0.0, ge=0)
    clip_norm: Real | None = Field(default=1.0, gt=0)
    dropout: Real = Field(default=0.1, ge=0, lt=1)


class ScoreConfig(_Settings):
    """How task-specific masks are found: what each rule looks at, and how the rules that train do so.

    ``samples``: fish. ``batches``: gradient. ``steps`` and ``lr``: lt-sft and diff-pruning.
    ``gate_lr`` and ``penalty``: diff-pruning's gates.
    """

    samples: Whole = Field(default=1024, ge=1)
    batches: Whole = Field(default=1, ge=1)
    steps: Whole = Field(default=100, ge=1)
    lr: Real = Field(default=1e-4, gt=0)
    gate_lr: Real = Field(default=0.1, gt=0)
    penalty: Real = Field(default=1.25e-7, ge=0)


class ServerConfig(_Settings):
    """Sampling and aggregation. ``options`` go to the strategy; ``timeout`` is seconds per round.

    ``over_select``: so many times ``clients_per_round`` are asked, and the first replies count.
    """

    strategy: str = "fedavg"
    options: dict[str, Whole | Real] = Field(default_factory=dict)
    clients_per_round: Whole | None = Field(default=None, ge=1)
    over_select: Real = Field(default=1.0, ge=1, le=10)
    task_weighting: Literal["equal", "examples"] = "equal"
    sharing: Sharing = "all"
    min_replies: Whole = Field(default=1, ge=1)
    timeout: Real = Field(default=3600.0, gt=0)


class RunConfig(_Settings):
    """One whole run. Clients are numbered over the tasks in order: the first task's come first."""

    name: Name = "run"
    seed: Whole = Field(default=1, ge=0, lt=2**63)
    model: str = Field(default="minilm", min_length=1)
    head: Literal["mean", "hf"] = "mean"
    method: str = "pafi+hiwi"
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

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, value: str) -> str:
        if value not in METHODS:
            raise ConfigError(unknown("method", value, METHODS))
        return value

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
