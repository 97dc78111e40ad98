"""Sparse fine-tuning in plain PyTorch: the same parts that a federation uses, without one."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from torch import nn

from fedmask.delta import apply_delta, read_delta, write_delta
from fedmask.errors import CheckpointError, ConfigError, expect, unknown
from fedmask.kernels import Kernel
from fedmask.masks import Mask
from fedmask.models import head_parameters
from fedmask.rng import rng_for
from fedmask.space import backbone_of, checkpoint_digest
from fedmask.trainables import (
    BiasAdapters,
    DenseTensors,
    MaskedEntries,
    Trainable,
    WeightAdapters,
    feed_forward_biases,
)
from fedmask.tuner import attach, refuse_tuned, tuning_of

_LOAD = "load one first, as with transformers' AutoModel.from_pretrained"


def sparsify(
    model: nn.Module,
    mask: Mask,
    *,
    head: bool = False,
    ffn_bias: bool = False,
    bias_adapters: int | None = None,
    kernel: str = "auto",
) -> nn.Module:
    """Make ``model`` train exactly the mask's k entries; returns it, ready for any training loop.

    Afterwards the parameters that require grad are one float32 vector of k changes, plus what is
    asked for: ``head`` (all that is not backbone), ``ffn_bias`` (feed-forward biases) or
    ``bias_adapters`` (HiWi adapters of that bottleneck on them, folded by ``merge``). Frozen entries
    keep their bits. Works in place; undone by ``merge``. Source: PaFi and HiWi, arXiv 2305.16742.
    Raises ConfigError if the model is being tuned already or lacks the asked tensors, and for wrong
    arguments (``kernel`` is ``auto``, ``dense`` or ``sampled``), and CheckpointError if the mask was made
    for other weights.
    """
    expect("model", model, nn.Module, _LOAD)
    expect("mask", mask, Mask, "make one with fedmask.magnitude_mask(model)")
    if kernel not in get_args(Kernel):
        raise ConfigError(unknown("kernel", str(kernel), get_args(Kernel)))
    refuse_tuned(model)
    found = checkpoint_digest(model)
    if found != mask.space.checkpoint:
        raise CheckpointError(
            f"mask: made for the checkpoint {mask.space.checkpoint}, found {found}; derive it from this model"
        )
    parts: list[Trainable] = [MaskedEntries(model, mask, kernel=kernel)]
    if ffn_bias:
        parts.append(DenseTensors("bias", backbone_of(model), feed_forward_biases(model)))
    if bias_adapters is not None:
        parts.append(BiasAdapters(model, bottleneck=bias_adapters))
    if head:
        names = head_parameters(model)
        if not names:
            raise ConfigError(
                f"{type(model).__name__} has no head to train; load it with its head, such as "
                "AutoModelForSequenceClassification"
            )
        parts.append(DenseTensors("head", model, names))
    return _start(model, parts)


def weight_adapters(
    model: nn.Module, *, bottleneck: int = 16, activation: str = "relu", seed: int = 0
) -> nn.Module:
    """Put a HiWi adapter on every feed-forward weight: W' = W + f(W W_down) W_up, folded by ``merge``.

    For local tuning and export: the folded change is dense. Source: arXiv 2305.16742. Raises ConfigError
    for a ``bottleneck`` below 1, an ``activation`` other than ``relu``, ``gelu`` and ``tanh``, and a model
    that is being tuned already.
    """
    expect("model", model, nn.Module, _LOAD)
    return _start(model, [WeightAdapters(model, bottleneck=bottleneck, activation=activation)], seed)


def _start(model: nn.Module, parts: list[Trainable], seed: int = 0) -> nn.Module:
    import torch

    tuning = attach(model, parts)
    tuning.begin(torch.zeros(tuning.layout.size), lambda purpose: rng_for(seed, -1, -1, purpose))
    return model


def save_delta(model: nn.Module, path: str | Path) -> None:
    """Write what ``model`` (from ``sparsify``) has learned: k float32 values and the mask's recipe.

    ConfigError if nothing is attached to the model or ``path`` cannot be written.
    """
    expect("model", model, nn.Module, _LOAD)
    folder = Path(path).parent
    if not folder.is_dir():
        raise ConfigError(f"delta {path}: expected the folder {folder}, found none; make it first")
    if Path(path).is_dir():
        raise ConfigError(f"delta {path}: expected a file's name, found a folder; name a file in it")
    trainables = tuning_of(model).trainables
    masks = [t.mask for t in trainables if isinstance(t, MaskedEntries)]
    names = {t.segment: list(t.names) for t in trainables if t.names}
    write_delta(
        path,
        {t.segment: t.change().numpy() for t in trainables},
        # Only masked entries are written in place, and a mask knows its checkpoint.
        checkpoint=masks[0].space.checkpoint if masks else checkpoint_digest(model),
        mask=masks[0] if masks else None,
        names=names,
    )


def load_delta(model: nn.Module, path: str | Path) -> nn.Module:
    """Add a delta file to a freshly loaded pre-trained ``model``, in place, and return it.

    CheckpointError if the model is not the checkpoint that the file was made for, or the file is damaged.
    """
    expect("model", model, nn.Module, _LOAD)
    return apply_delta(model, read_delta(path))
