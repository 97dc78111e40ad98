"""The tables of a run's settings: tasks, shards, local training, adapters, scores, the server.

Every model is frozen, refuses unknown keys and turns each mistake into one ``ConfigError`` line
that names the key, what was expected and what was found. Nothing here imports torch or Flower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedmask.config_errors import one_line as _one_line
from fedmask.errors import ConfigError
from fedmask.sharing import Sharing

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


class Settings(BaseModel):
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


class PartitionConfig(Settings):
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


class _SourceConfig(Settings):
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
            or self.source.partition("@")[0].count("/") > 1  # a hub name's revision may have more
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


class AdapterConfig(Settings):
    """The HiWi weight adapter: hidden width, activation, and what it is folded into."""

    bottleneck: Whole = Field(default=16, ge=1)
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    target: Literal["bias", "weight"] = "bias"


class LoraConfig(Settings):
    """LoRA's factors: rank r, scaling alpha / r, and beside which linear layers (parts joined by ``+``)."""

    rank: Whole = Field(default=8, ge=1)
    alpha: Real = Field(default=16.0, gt=0)
    targets: str = Field(default="query+value", min_length=1)


class TrainConfig(Settings):
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


class ScoreConfig(Settings):
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


class ServerConfig(Settings):
    """Sampling and aggregation. ``options`` go to the strategy; ``timeout`` is seconds per round, and
    ``join_timeout`` until all must have joined, which may take longer: a client loads its model then.

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
    join_timeout: Real = Field(default=3600.0, gt=0)
