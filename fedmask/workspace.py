"""Everything that one process needs to serve any client of a run, built from the config alone.

Server, in-process worker, Ray actor and container all use it: a client is its vector, its shard and
its random stream; the backbone is loaded once a process.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING
from typing import cast as as_type

import numpy as np
from torch import nn

from fedmask import config as configuration
from fedmask.channel import Terms, down_way
from fedmask.config import RunConfig, ScoreConfig
from fedmask.errors import ConfigError, unknown
from fedmask.kernels import available_kernels
from fedmask.layout import HEAD_PREFIX, Layout, sent
from fedmask.masks import Evidence, Mask, Scores, score_entries
from fedmask.methods import METHODS, backbone_trainables
from fedmask.models import Backbone, MeanHead, OwnHead, head_parameters, load_backbone, task_model
from fedmask.positions import Positions, UnionTerms
from fedmask.precision import PRECISIONS, Precision, cast
from fedmask.products import Products, products_of
from fedmask.rng import rng_for
from fedmask.run_masks import RunMasks
from fedmask.sharing import travelling
from fedmask.space import backbone_parameters
from fedmask.stored import is_half
from fedmask.tasks import TaskData, Tokenized, load_task, tokenize_rows
from fedmask.trainables import CarriedEntries, DenseTensors
from fedmask.training import LocalUpdate, Stream, evaluate, local_update, tuned
from fedmask.tuner import attach, detach, tuning_of
from fedmask.views import View, turn

if TYPE_CHECKING:
    from datasets import Dataset
NO_KERNEL = (
    "this run's kernel is 'sampled', for which numba is missing here: pip install numba on this node,"
    " or start the run with --set kernel=dense"
)


class Workspace(RunMasks):
    """One run's backbone, mask, task models and data, each made when first asked for."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._models: dict[str, MeanHead | OwnHead] = {}
        self._trained: dict[str, str] = {}  # the digest of the mask that a task's model trains now
        self._bare: dict[str, Layout] = {}  # layouts without any view's entries
        self._origins: dict[str, np.ndarray] = {}
        self._precision: Precision | None = None if config.precision == "auto" else config.precision
        self._kernel: str | None = None

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

    @cached_property
    def own_kernel(self) -> str:
        """The config's kernel; for ``auto`` what this process can do. Methods without a mask need none."""
        if self.config.kernel != "auto":
            return self.config.kernel
        return "sampled" if self.rule is not None and "sampled" in available_kernels() else "dense"

    @property
    def kernel(self) -> str:
        """``sampled`` (where it is cheaper) or ``dense``: all parties use the server's, for the last bits."""
        return self._kernel or self.own_kernel

    def use_kernel(self, kernel: str) -> None:
        """Compute by ``kernel`` (``sampled`` or ``dense``) from now on."""
        if kernel != self.kernel:
            self._forget_models()
        self._kernel = kernel

    def cannot_train(self) -> str:
        """Why this process cannot do what the run's kernel asks for; empty if it can."""
        able = self.rule is None or self.kernel in available_kernels()
        return "" if able else NO_KERNEL

    def trial(self, precision: Precision) -> Workspace:
        """A workspace to measure with: same data and mask, models of its own. For one in float32."""
        other = copy.copy(self)
        other._models, other._trained, other._precision = {}, {}, precision
        if precision != "fp32":
            other.__dict__["backbone"] = self.backbone.copy_in(precision)
        return other

    @property
    def _masked_model(self) -> nn.Module:
        return self.backbone.model

    def _forget_models(self) -> None:
        for model in self._models.values():
            detach(model)
        self._models.clear()
        self._trained.clear()

    def use_backbone(self, backbone: Backbone) -> None:
        """Use an equal backbone from elsewhere in memory, unless models stand on the first.

        One that is rounded already is for runs that state bfloat16: nobody else could have it unrounded.
        """
        rounded = any(is_half(p) for p in backbone.model.parameters())
        if not self._models and (not rounded or self._precision == "bf16"):
            cast(backbone.model, "fp32" if rounded else self._precision or "fp32")
            self.backbone = backbone

    @cached_property
    def backbone_size(self) -> int:
        """Number of backbone parameters; pooler and head are outside."""
        return sum(p.numel() for p in backbone_parameters(self.backbone.model).values())

    def union_terms(self, client: int, positions: Positions) -> UnionTerms:
        """What the values of a client's messages mean where its view is of ``positions``."""
        return UnionTerms(positions, self.layout(self.task_of(client)), self.space, self.no_mask.rule)

    def model(self, task: str, view: View | None = None) -> MeanHead | OwnHead:
        """The task's model with the method's trainables and its head attached, at the reference.

        ``view``: train its mask and carry its other entries; the same model is turned to another view in a
        few milliseconds. None: the run's one mask; in a run of views, a model that trains none.
        """
        if view is None and self.config.has_views:
            view = View(self.no_mask, self.no_mask.indices)
        mask = self.mask if view is None else view.trained
        if task not in self._models:
            self._models[task] = self._tune(task, mask, carries=view is not None)
        model, digest = self._models[task], mask.digest if mask else ""
        if mask is not None and self._trained[task] != digest:
            turn(model, mask)
            self._trained[task] = digest
        if view is not None:
            carried = tuning_of(model).trainables[0]
            as_type(CarriedEntries, carried).place(view.carried)
        return model

    def _tune(self, task: str, mask: Mask | None, *, carries: bool) -> MeanHead | OwnHead:
        model = self._new_model(task)
        # "auto" is the sampled kernel where the fixed rule finds it cheaper than the dense product.
        kernel, method = "dense" if self.kernel == "dense" else "auto", METHODS[self.config.method]
        parts = backbone_trainables(method, model, mask, self.config, kernel)
        head = DenseTensors(HEAD_PREFIX + task, model, head_parameters(model))
        carried = [CarriedEntries(model, self.space)] if carries else []
        attach(model, [*carried, *parts, head])
        self._trained[task] = mask.digest if mask else ""
        return model

    def _new_model(self, task: str) -> MeanHead | OwnHead:
        return self._fresh_model(self.data(task))

    def _fresh_model(self, data: TaskData) -> MeanHead | OwnHead:
        _ = self.precision  # an error before anything is built
        config, outputs = self.config, len(data.labels) if data.kind == "classification" else 1
        return task_model(
            self.backbone,
            data.name,
            outputs,
            head=config.head,
            seed=config.seed,
            dropout=config.train.dropout,
        )

    def layout(self, task: str, view: View | None = None) -> Layout:
        """The segments of the vector that a client of ``task`` receives and sends; see ``model``."""
        if view is None and self.config.has_views:  # asked often, and turning the model takes a while
            if task not in self._bare:
                self._bare[task] = tuning_of(self.model(task)).layout
            return self._bare[task]
        return tuning_of(self.model(task, view)).layout

    def down_terms(self, client: int, version: int) -> Terms:
        """What the values mean that the server sends ``client`` as version ``version``."""
        task = self.task_of(client)
        layout = travelling(self.layout(task), self.config.server.sharing)
        return Terms(layout, self.digest, origin=self._origin(task, layout.size))

    def _origin(self, task: str, size: int) -> np.ndarray | None:
        """The first ``size`` weights at the start of the run, where the largest weights are sent down."""
        way = down_way(self.config.down)
        if not METHODS[self.config.method].by_weight or way.change or way.codec.name != "topk":
            return None
        if task not in self._origins:
            parts = tuning_of(self.model(task)).trainables
            self._origins[task] = np.concatenate([part.origin().numpy() for part in parts])
        return self._origins[task][:size]

    @cached_property
    def products(self) -> Products | None:
        """What the exact mean of LoRA's products needs to know; None for other methods."""
        if METHODS[self.config.method].dense != "fedex-lora":
            return None
        return products_of(tuning_of(self.model(self.tasks[0])).trainables, self.config)

    def change_terms(self, client: int, version: int, factors: np.ndarray | None = None) -> Terms:
        """What the values mean of the change that leads ``client`` to version ``version``.

        ``factors`` (float32, flat): what the server has to say of the products in it.
        """
        whole = self.down_terms(client, version)
        return whole if self.products is None else self.products.change(whole, factors)

    def up_terms(self, client: int, round: int) -> Terms:
        """What the values mean that ``client`` sends in round ``round``."""
        whole = self.down_terms(client, round)
        return replace(whole, layout=sent(whole.layout), origin=None)

    def stream_of(self, client: int) -> str:
        """Which of the server's vectors the client receives: clients of one stream get the same bytes."""
        return self.task_of(client)

    def _tokenize(self, data: Dataset, rows: np.ndarray) -> Tokenized:
        return tokenize_rows(data, rows, self.backbone.tokenizer, self.config.train.max_tokens)

    # The work ----------------------------------------------------------------------------------

    def local_update(
        self, partition: int, round: int, vector: np.ndarray, view: View | None = None
    ) -> LocalUpdate:
        """One client's round from ``vector`` (float32 ``[layout.size]``); see ``fedmask.training``.

        With a ``view`` the vector is what ``view.read`` gives.
        """
        shard = self.shard(partition)
        return local_update(
            self.model(shard.task, view),
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

    def public_scores(self) -> Scores:
        """The scores of the method's rule on rows of the server's own (``public``)."""
        settings, rule = self.config.public, self.rule
        if settings is None or rule is None:
            raise ConfigError("public: expected rows of the server's own and a mask to find, found none")
        data = load_task(settings.task)
        model = self._fresh_model(data)
        drawn = rng_for(self.config.seed, -1, -1, "public-rows").permutation(len(data.train))[: settings.rows]
        rows = self._tokenize(data.train, np.sort(drawn))
        evidence = Evidence(rows, self.backbone.pad_id, self.config.train, self.config.seed)
        return score_entries(rule.name, model, self.space, evidence, self.config.scores)

    def evaluate(
        self, task: str, vector: np.ndarray, data: Tokenized, view: View | None = None
    ) -> dict[str, float]:
        """Loss and metric on ``data`` of the model at ``vector`` (float32, in ``layout(task, view)``)."""
        model = self.model(task, view)
        with tuned(model, vector, Stream(self.config.seed, -1, -1)):
            return evaluate(model, data, self.data(task).metric, self.backbone.pad_id)


@lru_cache(maxsize=2)
def _workspace(text: str) -> Workspace:
    return Workspace(configuration.from_json(text))


def get_workspace(config: RunConfig) -> Workspace:
    """The process's workspace for ``config``; made once."""
    return _workspace(config.model_dump_json())
