"""Everything that one process needs to serve any client of a run, built from the config alone.

Server, in-process worker, Ray actor and container all use it: a client is its vector, its shard and
its random stream; the backbone is loaded once a process.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fedmask import config as configuration
from fedmask.config import RunConfig, ScoreConfig
from fedmask.errors import ConfigError, unknown
from fedmask.layout import HEAD_PREFIX, Layout
from fedmask.masks import (
    Evidence,
    Mask,
    Recipe,
    Rule,
    Scores,
    derive_mask,
    mask_from_indices,
    score_entries,
)
from fedmask.methods import METHODS, backbone_trainables
from fedmask.models import Backbone, MeanHead, OwnHead, head_parameters, load_backbone, task_model
from fedmask.precision import PRECISIONS, Precision, cast
from fedmask.recent import Recent
from fedmask.rng import rng_for
from fedmask.space import ParameterSpace, backbone_parameters, checkpoint_digest, parameter_space
from fedmask.stored import is_half
from fedmask.tasks import (
    TaskData,
    Tokenized,
    assignments,
    load_task,
    shards,
    split_held_out,
    tokenize_rows,
)
from fedmask.trainables import DenseTensors
from fedmask.training import LocalUpdate, Stream, evaluate, local_update, tuned
from fedmask.tuner import attach, detach, tuning_of

if TYPE_CHECKING:
    from datasets import Dataset


# Tokenized shards that a process keeps at hand: millions of tokens, more than most runs have.
SHARD_BYTES = 64_000_000


@dataclass(frozen=True)
class Shard:
    """One client's rows: ``train`` and the part that it holds out for itself."""

    task: str
    train: Tokenized
    held_out: Tokenized

    @property
    def bytes(self) -> int:
        """Memory of both parts' arrays, and a little for the objects around them."""
        return self.train.bytes + self.held_out.bytes + 2000


class Workspace:
    """One run's backbone, mask, task models and data, each made when first asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._tasks = {task.name: task for task in config.tasks}
        self._assignments = assignments(config)
        self._data: dict[str, TaskData] = {}
        self._labels: dict[str, np.ndarray] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._shards: Recent[int, Shard] = Recent(SHARD_BYTES, lambda shard: shard.bytes)
        self._central: dict[tuple[str, str, int | None], Tokenized] = {}
        self._models: dict[str, MeanHead | OwnHead] = {}
        self._given: Mask | None = None
        self._precision: Precision | None = None if config.precision == "auto" else config.precision

    # The model ---------------------------------------------------------------------------------

    @cached_property
    def backbone(self) -> Backbone:
        """The pre-trained model in the precision in use (until then float32), pristine between uses.

        ConfigError if texts are longer than it can read.
        """
        backbone, asked = load_backbone(self.config.model), self.config.train.max_tokens
        if backbone.most_tokens is not None and asked > backbone.most_tokens:
            raise ConfigError(
                f"train.max_tokens: model {self.config.model!r} reads at most {backbone.most_tokens} tokens, "
                f"found {asked}; lower it"
            )
        cast(backbone.model, self._precision or "fp32")
        return backbone

    @property
    def precision(self) -> Precision:
        """The precision in use. ConfigError while the config says ``auto`` and nobody has chosen."""
        if self._precision is None:
            raise ConfigError(
                "precision 'auto' is not settled yet; call fedmask.settle.settle_precision, or state one"
            )
        return self._precision

    def use_precision(self, precision: Precision) -> None:
        """Compute in ``precision`` from now on, whatever the config says."""
        if precision not in PRECISIONS:
            raise ConfigError(unknown("precision", precision, PRECISIONS))
        if precision == self._precision:
            return
        self._forget_models()
        if precision == "bf16" and "backbone" in self.__dict__:
            cast(self.backbone.model, precision)
        elif self._precision is not None:  # what was rounded is read again
            self.__dict__.pop("backbone", None)
        self._precision = precision

    def trial(self, precision: Precision) -> Workspace:
        """A workspace to measure with: same data and mask, models of its own. For one in float32."""
        other = copy.copy(self)
        other._models, other._precision = {}, precision
        if precision != "fp32":
            other.__dict__["backbone"] = self.backbone.copy_in(precision)
        return other

    def _forget_models(self) -> None:
        for model in self._models.values():
            detach(model)
        self._models.clear()

    def use_backbone(self, backbone: Backbone) -> None:
        """Use an equal backbone from elsewhere in memory, unless models stand on the first.

        One that an earlier run has rounded is left alone: the stored values behind it did not come along.
        """
        if not self._models and not any(is_half(p) for p in backbone.model.parameters()):
            cast(backbone.model, self._precision or "fp32")
            self.backbone = backbone

    @cached_property
    def backbone_size(self) -> int:
        """Number of backbone parameters; pooler and head are outside."""
        return sum(p.numel() for p in backbone_parameters(self.backbone.model).values())

    @property
    def rule(self) -> Rule | None:
        """How the run's mask is chosen; None for methods without one."""
        name = METHODS[self.config.method].mask
        if name is None:
            return None
        seed = self.config.seed if name.startswith("random") else 0
        return Rule(name, self.config.density, self.config.eligible, self.config.per_tensor, seed)

    @cached_property
    def _derived(self) -> Mask | None:
        return derive_mask(self.backbone.model, self.rule) if self.rule is not None else None

    @property
    def mask(self) -> Mask | None:
        """The mask in use: the one that was handed in, else the one derived from the checkpoint."""
        return self._given or self._derived

    @cached_property
    def space(self) -> ParameterSpace:
        """The space over which masks are indexed."""
        return (
            self._derived.space
            if self._derived
            else parameter_space(self.backbone.model, self.config.eligible)
        )

    @cached_property
    def checkpoint_digest(self) -> str:
        """SHA-256 (hex) of the backbone's stored values."""
        return self._derived.space.checkpoint if self._derived else checkpoint_digest(self.backbone.model)

    @property
    def digest(self) -> str:
        """What an update's envelope names: the mask's digest, or the checkpoint's where there is no mask."""
        return self.mask.digest if self.mask is not None else self.checkpoint_digest

    def recipe(self) -> Recipe | None:
        """What the server offers; None for methods without a mask."""
        return self.mask.recipe() if self.mask is not None else None

    def use_mask(self, indices: np.ndarray) -> None:
        """Use a mask that came by wire (int64, sorted) instead. CheckpointError if it is unsound."""
        if self.rule is None:
            raise ConfigError(f"method {self.config.method!r} has no mask to replace")
        given = mask_from_indices(indices, self.space, self.rule)
        if self.mask is not None and given.digest == self.mask.digest:
            return
        self._forget_models()
        self._given = given

    def model(self, task: str) -> MeanHead | OwnHead:
        """The task's model with the method's trainables and its head attached, at the reference."""
        if task not in self._models:
            model = self._new_model(task)
            parts = backbone_trainables(METHODS[self.config.method], model, self.mask, self.config.adapter)
            head = DenseTensors(HEAD_PREFIX + task, model, head_parameters(model))
            attach(model, [*parts, head])
            self._models[task] = model
        return self._models[task]

    def _new_model(self, task: str) -> MeanHead | OwnHead:
        _ = self.precision  # an error before anything is built
        data, config = self.data(task), self.config
        outputs = len(data.labels) if data.kind == "classification" else 1
        return task_model(
            self.backbone, task, outputs, head=config.head, seed=config.seed, dropout=config.train.dropout
        )

    def layout(self, task: str) -> Layout:
        """The segments of the vector that a client of ``task`` receives and sends."""
        return tuning_of(self.model(task)).layout

    # The data ----------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the config's order."""
        return tuple(self._tasks)

    def task_of(self, partition: int) -> str:
        """The task of a client."""
        return self._assignments[partition][0]

    def data(self, task: str) -> TaskData:
        """The task's rows and labels."""
        if task not in self._data:
            self._data[task] = load_task(self._tasks[task])
        return self._data[task]

    def rows(self, partition: int) -> np.ndarray:
        """Rows (int64, of the task's train split) that the client holds, its held-out part included."""
        task, index = self._assignments[partition]
        if task not in self._rows:
            settings = self._tasks[task]
            partition_rule = settings.partition or self.config.partition
            self._rows[task] = shards(settings, self.data(task), partition_rule, self.config.seed)
        return self._rows[task][index]

    def split(self, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """The client's rows as (train, held out): sorted int64 row numbers of the task's train split."""
        task, rows = self.task_of(partition), self.rows(partition)
        rule = self._tasks[task].partition or self.config.partition
        fraction = min(rule.held_out, rule.held_out_max / len(rows))
        rng = rng_for(self.config.seed, -1, partition, "held-out")
        return split_held_out(rows, self.labels(task)[rows], fraction, rng)

    def labels(self, task: str) -> np.ndarray:
        """Labels of the task's train split: int64 class numbers or float64 values."""
        if task not in self._labels:
            self._labels[task] = np.asarray(self.data(task).train.with_format("numpy")["label"][:])
        return self._labels[task]

    def shard(self, partition: int) -> Shard:
        """The client's tokenized rows, kept while there is room: a client at rest costs its row numbers."""
        return self._shards.get(partition, lambda: self._read_shard(partition))

    def _read_shard(self, partition: int) -> Shard:
        task = self.task_of(partition)
        train, held_out = (self._tokenize(self.data(task).train, rows) for rows in self.split(partition))
        return Shard(task, train, held_out)

    def central(self, task: str, split: str, rows: int | None = None) -> Tokenized:
        """``rows`` rows of the task's dev or test split, the same choice each time; all of them for None."""
        key = (task, split, rows)
        if key not in self._central:
            data = getattr(self.data(task), split)
            chosen = np.arange(len(data))
            if rows is not None and rows < len(data):
                picked = rng_for(self.config.seed, -1, -1, f"rows/{task}/{split}").permutation(len(data))
                chosen = np.sort(picked[:rows])
            self._central[key] = self._tokenize(data, chosen)
        return self._central[key]

    def _tokenize(self, data: Dataset, rows: np.ndarray) -> Tokenized:
        return tokenize_rows(data, rows, self.backbone.tokenizer, self.config.train.max_tokens)

    # The work ----------------------------------------------------------------------------------

    def local_update(self, partition: int, round: int, vector: np.ndarray) -> LocalUpdate:
        """One client's round from ``vector`` (float32 ``[layout.size]``); see ``fedmask.training``."""
        shard = self.shard(partition)
        return local_update(
            self.model(shard.task),
            vector,
            shard.train,
            shard.held_out,
            metric=self.data(shard.task).metric,
            plan=self.config.train,
            pad_id=self.backbone.pad_id,
            stream=Stream(self.config.seed, round, partition),
        )

    def scores(self, name: str, partition: int, settings: ScoreConfig | None = None) -> Scores:
        """A client's scores under a task-specific rule (``fedmask.masks.SCORERS``), from its training rows.

        Needs the client's rows and dense gradients, which the shared mask does not.
        """
        shard = self.shard(partition)
        model = self._new_model(shard.task)  # not tuned: a tuned layer makes no dense gradient
        evidence = Evidence(shard.train, self.backbone.pad_id, self.config.train, self.config.seed, partition)
        return score_entries(name, model, self.space, evidence, settings or self.config.scores)

    def evaluate(self, task: str, vector: np.ndarray, data: Tokenized) -> dict[str, float]:
        """Loss and metric of the model at ``vector`` (float32, as ``layout(task)`` says) on ``data``."""
        model = self.model(task)
        with tuned(model, vector, Stream(self.config.seed, -1, -1)):
            return evaluate(model, data, self.data(task).metric, self.backbone.pad_id)


@lru_cache(maxsize=2)
def _workspace(text: str) -> Workspace:
    return Workspace(configuration.from_json(text))


def get_workspace(config: RunConfig) -> Workspace:
    """The process's workspace for ``config``; made once."""
    return _workspace(config.model_dump_json())
