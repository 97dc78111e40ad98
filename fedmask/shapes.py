"""What a run's vectors look like, from the model's shapes alone: no weights are read or allocated.

The model and what a method trains are built by the same code as in a run, on torch's ``meta`` device.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedmask.config import RunConfig
from fedmask.errors import ConfigError, unknown
from fedmask.known_models import KNOWN, known_config
from fedmask.layout import HEAD_PREFIX, Layout, Segment
from fedmask.masks import mask_size
from fedmask.methods import METHODS, backbone_trainables
from fedmask.models import HeadKind, OwnHead, head_parameters, model_source
from fedmask.products import Products, products_of
from fedmask.space import ParameterSpace, backbone_parameters, shape_space


@dataclass(frozen=True)
class Shapes:
    """A method on a model: ``shared`` are the segments that all clients share, in order.

    ``k`` masked values out of ``space`` (None without a mask); ``backbone``: shapes of all backbone tensors;
    ``products``: see ``fedmask.workspace.Workspace``.
    """

    shared: tuple[Segment, ...]
    k: int
    space: ParameterSpace | None
    backbone: dict[str, tuple[int, ...]]
    model: nn.Module
    products: Products | None = None

    @property
    def backbone_size(self) -> int:
        """Number of backbone parameters."""
        return sum(torch.Size(shape).numel() for shape in self.backbone.values())


def read_shapes(config: RunConfig) -> Shapes:
    """The shapes of ``config``'s method on its model. ConfigError where nobody knows the model."""
    method = METHODS[config.method]
    with torch.device("meta"):
        model = _meta_model(config.model)
        space = shape_space(model, config.eligible) if method.mask is not None else None
        k = mask_size(config.density, space.eligible_size) if space else 0
        bare = replace(method, mask=None)
        on_weights = method.biases == "adapter" and config.adapter.target == "weight"
        parts = [] if on_weights else backbone_trainables(bare, model, None, config)
        shared = [Segment("mask", k)] * bool(k) + [Segment(part.segment, part.size) for part in parts]
    shapes = {name: tuple(p.shape) for name, p in backbone_parameters(model).items()}
    products = products_of(parts, config) if method.dense == "fedex-lora" else None
    return Shapes(tuple(shared), k, space, shapes, model, products)


def task_layout(shapes: Shapes, task: str, outputs: int, head: HeadKind) -> Layout:
    """The vector of a task with ``outputs`` classes (1: a regression): shared segments and its head."""
    if head == "mean":
        size = (int(shapes.model.config.hidden_size) + 1) * outputs  # type: ignore[union-attr,arg-type]
    else:
        from transformers import AutoModelForSequenceClassification

        with torch.device("meta"), _silence():
            config = shapes.model.config
            config.num_labels = outputs  # type: ignore[union-attr]
            own = OwnHead(AutoModelForSequenceClassification.from_config(config))
        parameters = dict(own.named_parameters())
        size = sum(parameters[name].numel() for name in head_parameters(own))
    return Layout((*shapes.shared, Segment(HEAD_PREFIX + task, size)))


def _meta_model(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    with _silence():
        model: nn.Module = AutoModel.from_config(_config(name, AutoConfig))
    return model.eval()


def _config(name: str, auto: Any) -> Any:
    numbers = known_config(name)
    if numbers is not None:
        return auto.for_model(**numbers)
    try:
        return auto.from_pretrained(model_source(name))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {name!r}: its config.json cannot be read ({reason[:160]}); give a local folder with one;"
            f" {unknown('built-in model', name, KNOWN)}"
        ) from None


@contextlib.contextmanager
def _silence() -> Any:
    """Hold back transformers' notes about heads that are new."""
    from transformers.utils import logging as hf

    level = hf.get_verbosity()
    hf.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        hf.set_verbosity(level)
