"""The methods: which mask, and what is trained besides. One entry each; no torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from fedmask.errors import ConfigError, unknown

if TYPE_CHECKING:
    from torch import nn

    from fedmask.config import AdapterConfig, RunConfig
    from fedmask.masks import Mask
    from fedmask.trainables import Trainable

Dense = Literal["full", "bitfit", "lora", "ffa-lora", "fedex-lora", "adapter"]


@dataclass(frozen=True)
class Method:
    """``mask``: the rule's name or None. ``biases``: how feed-forward biases train. ``dense``: what else
    trains without a mask. ``up``, ``down``: how values travel unless the settings say it. ``by_weight``: a
    ``down`` of ``topk`` sends the largest weights, not the largest changes. Heads always train.
    """

    name: str
    summary: str
    source: str
    mask: str | None = None
    biases: Literal["adapter", "direct"] | None = None
    dense: Dense | None = None
    up: str = "fp32"
    down: str = "fp32"
    by_weight: bool = False


_PAPER = "Liao, Meng, Monz, ACL 2023, arXiv 2305.16742"
_ALL = (
    Method("pafi+hiwi", "smallest-magnitude mask and adapters on biases", _PAPER, "magnitude", "adapter"),
    Method("pafi", "smallest-magnitude mask", _PAPER, "magnitude"),
    Method("hiwi", "adapters on feed-forward biases, folded", _PAPER, biases="adapter"),
    Method("ffn-bias", "the same biases trained directly", "after BitFit, arXiv 2106.10199", biases="direct"),
    Method("random", "a seeded uniform mask (control)", "arXiv 2405.02596", "random"),
    Method(
        "random-matched",
        "random, with as many entries a tensor as pafi (control)",
        "this project",
        "random-matched",
    ),
    Method(
        "s2ft",
        "random whole channels of the feed-forward part",
        "after S2FT, arXiv 2412.06289",
        "random-channels",
    ),
    Method("largest", "largest-magnitude mask (control)", "this project", "largest"),
    Method("full", "full fine-tuning of the backbone", "FedAvg, arXiv 1602.05629", dense="full"),
    Method("bitfit", "all biases of the backbone", "BitFit, arXiv 2106.10199", dense="bitfit"),
    Method("lora", "low-rank factors beside query and value", "LoRA, arXiv 2106.09685", dense="lora"),
    Method("ffa-lora", "LoRA with A frozen", "FFA-LoRA, arXiv 2403.12313", dense="ffa-lora"),
    # Changes are sent down, so that a client receives what is new of the residual and not the whole of it.
    Method(
        "fedex-lora",
        "LoRA whose products are averaged, by a residual in the weights",
        "FedEx-LoRA, arXiv 2410.09432",
        dense="fedex-lora",
        down="fp32+delta",
    ),
    # As in the paper's code: no error feedback, the largest weights down (zeros for the others), the largest
    # changes up, and the head takes part in both choices.
    Method(
        "flasc",
        "LoRA, of which the largest quarter travels",
        "FLASC, arXiv 2406.05233",
        dense="lora",
        up="topk:0.25/fp32+noef",
        down="topk:0.25/fp32+noef",
        by_weight=True,
    ),
    Method("adapter", "bottleneck adapters after the feed-forward part", "arXiv 1902.00751", dense="adapter"),
    Method("head", "the task head alone", "linear probing"),
)
_SPECIFIC = (
    Method("fish", "a mask of largest Fisher information", "FISH, arXiv 2111.09839", "fish"),
    Method("gradient", "a mask of largest gradients", "SIFT, arXiv 2312.11875", "gradient"),
    Method("lt-sft", "a mask of what full fine-tuning moves most", "LT-SFT, arXiv 2110.07560", "lt-sft"),
    Method("diff-pruning", "a mask learned by gates", "diff pruning, arXiv 2012.07463", "diff-pruning"),
)
METHODS: dict[str, Method] = {method.name: method for method in (*_ALL, *_SPECIFIC)}
TASK_SPECIFIC = frozenset(method.name for method in _SPECIFIC)
"""Methods whose mask comes from labelled rows: it has to be found, agreed on and sent (``placement``)."""


def known_method(name: str) -> str:
    """``name``. ConfigError with the nearest one for a method that there is not."""
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return name


def check_federated(method: Method, adapter: AdapterConfig) -> None:
    """ConfigError if what the method trains cannot be sent each round."""
    if adapter.target == "weight" and method.biases == "adapter" and method.mask is None:
        raise ConfigError(
            f"method {method.name!r} with adapters on weights: its folded change is as large as the "
            "feed-forward matrices and cannot be sent each round; use method 'pafi+hiwi', which restricts "
            "it to the mask's entries, or fedmask.weight_adapters for local tuning and export"
        )


def check_masks(config: RunConfig) -> None:
    """ConfigError for a mask that cannot move or be placed as ``config`` asks."""
    method, schedule, placement = METHODS[config.method], config.mask_schedule, config.placement
    specific = method.name in TASK_SPECIFIC
    if schedule != "fixed":
        if method.mask is None or specific:
            raise ConfigError(
                f"mask_schedule: method {method.name!r} has no mask that every client derives by itself, so"
                " it cannot move; use method 'pafi', 'largest' or 'random'"
            )
        if config.mask_transport != "recipe" or config.adapter.target == "weight":
            raise ConfigError(
                f"mask_schedule {schedule!r}: expected mask_transport 'recipe' and adapter.target 'bias',"
                f" found {config.mask_transport!r} and {config.adapter.target!r}"
            )
    if specific and placement == "server":
        if config.public is None:
            raise ConfigError(
                "placement 'server': missing the table 'public' with rows of the server's own; give one, or"
                " placement 'agreed'"
            )
        public = config.public.name, config.public.source
        if any(public == (task.name, task.source) for task in config.tasks):
            raise ConfigError(
                f"public: {config.public.name!r} is a task whose rows the clients hold; give another one"
            )


def backbone_trainables(
    method: Method, model: nn.Module, mask: Mask | None, config: RunConfig, kernel: str = "auto"
) -> list[Trainable]:
    """What ``method`` trains in the backbone, in the vector's order. Raises ConfigError as above.

    ``kernel``: how masked entries' gradients are computed, as in ``fedmask.kernels``.
    """
    from fedmask.space import backbone_of
    from fedmask.trainables import (
        BiasAdapters,
        CarriedMatrices,
        DenseTensors,
        MaskedEntries,
        MaskedWeightAdapters,
        feed_forward_biases,
        target_layers,
    )

    adapter = config.adapter
    check_federated(method, adapter)
    sizes = {"bottleneck": adapter.bottleneck, "activation": adapter.activation}
    on_weights = method.biases == "adapter" and adapter.target == "weight"
    parts: list[Trainable] = []
    if method.mask is not None:
        if mask is None:
            raise ConfigError(f"method {method.name!r} needs a mask")
        if on_weights:
            parts.append(MaskedWeightAdapters(model, mask, **sizes, kernel=kernel))  # type: ignore[arg-type]
        else:
            parts.append(MaskedEntries(model, mask, kernel=kernel))
    if method.biases == "adapter" and not on_weights:
        parts.append(BiasAdapters(model, **sizes))  # type: ignore[arg-type]
    if method.biases == "direct":
        parts.append(DenseTensors("bias", backbone_of(model), feed_forward_biases(model)))
    if method.dense is not None:
        trained = _dense(method.dense, model, config)
        if method.dense == "fedex-lora":
            layers = target_layers(model, config.lora.targets)
            parts.append(CarriedMatrices(model, [f"{layer}.weight" for layer in layers]))
        parts.append(trained)
    return parts


def _dense(kind: Dense, model: nn.Module, config: RunConfig) -> Trainable:
    from fedmask.rng import rng_for
    from fedmask.space import backbone_of, backbone_parameters
    from fedmask.trainables import Bottlenecks, DenseTensors, LoRA, WholeTensors, biases

    # A drawn start belongs to the run, not to a round: what is averaged are changes from it.
    draw = partial(rng_for, config.seed, -1, -1)
    match kind:
        case "full":
            return WholeTensors("backbone", backbone_of(model), list(backbone_parameters(model)))
        case "bitfit":
            return DenseTensors("bias", backbone_of(model), biases(model))
        case "lora" | "ffa-lora" | "fedex-lora":
            return LoRA(model, draw, **config.lora.model_dump(), freeze_down=kind == "ffa-lora")
        case "adapter":
            sizes = {"bottleneck": config.adapter.bottleneck, "activation": config.adapter.activation}
            return Bottlenecks(model, draw, **sizes)  # type: ignore[arg-type]
