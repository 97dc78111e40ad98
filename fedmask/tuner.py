"""Attaching trainables to a model without copying its code or renaming its parameters.

A patched module's ``forward`` runs the module's own class's code while the driven parameters are
replaced by their effective tensors; linear layers with masked weights take the sampled-gradient path.
The model keeps its classes, parameter names and ``state_dict`` keys (plus ``fedmask.*`` for the values).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fedmask.errors import CheckpointError, ConfigError
from fedmask.kernels import SampledEmbedding, SampledLinear
from fedmask.layout import Layout, Segment
from fedmask.space import is_conv1d
from fedmask.trainables.base import Draw, Trainable
from fedmask.trainables.masked import MaskedEntries, is_matrix, is_table


class PatchedForward:
    """Stands in for one module's ``forward``. A plain object, so that deepcopy and pickle follow it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.drivers: dict[str, list[tuple[Trainable, int]]] = {}
        self.beside: list[tuple[Trainable, int]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(*args, **kwargs)
        for trainable, slot in self.beside:
            out = trainable.output(slot, next(iter((*args, *kwargs.values()))), out)
        return out

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        own = {key: module._parameters[key] for key in self.drivers}
        sampled = self._sampled() if len(args) == 1 and not kwargs else None
        dense = [key for key in self.drivers if sampled is None or key != "weight"]
        seen = {key: self._effective(key) for key in dense}
        if sampled is not None and isinstance(module, nn.Embedding):
            values, rows = sampled.table(self.drivers["weight"][0][1])
            return SampledEmbedding.apply(  # type: ignore[no-untyped-call]
                args[0], own["weight"], values, rows, module.padding_idx
            )
        if sampled is not None:
            values, pattern = sampled.pattern(self.drivers["weight"][0][1])
            bias = seen.get("bias", module._parameters.get("bias"))
            layout = "conv1d" if is_conv1d(module) else "linear"
            return SampledLinear.apply(  # type: ignore[no-untyped-call]
                args[0], own["weight"], bias, values, pattern, layout, sampled.kernel
            )
        try:
            module._parameters.update(seen)  # type: ignore[arg-type]
            return type(module).forward(module, *self._readable(args), **kwargs)
        finally:
            module._parameters.update(own)

    def _readable(self, args: tuple[Any, ...]) -> list[Any]:
        """The arguments; a float32 layer (a head) on a bfloat16 backbone gets them widened."""
        widen = any(p is not None and p.dtype == torch.float32 for p in self.module._parameters.values())
        return [
            x.float() if widen and isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
            for x in args
        ]

    def _sampled(self) -> MaskedEntries | None:
        """The masked entries, if they alone drive a linear layer's weight or an embedding's table."""
        drivers = self.drivers.get("weight", [])
        if len(drivers) == 1:
            trainable, slot = drivers[0]
            found = trainable.slots[slot]
            if isinstance(trainable, MaskedEntries) and (is_matrix(found) or is_table(found)):
                return trainable
        return None

    def _effective(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self.module._parameters[key]  # type: ignore[assignment]
        for trainable, slot in self.drivers[key]:
            tensor = trainable.effective(slot, tensor)
        return tensor

    def folded(self) -> dict[str, torch.Tensor]:
        """The module's tensors (of their shapes) with everything in them, by name in the module."""
        out = {key: self._effective(key) for key in self.drivers}
        for trainable, slot in self.beside:
            key = trainable.slots[slot].parameter
            out[key] = trainable.effective(slot, out.get(key, self.module._parameters[key]))  # type: ignore[arg-type]
        return out


class MergedSave:
    """Stands in for a transformers model's ``save_pretrained`` while it is tuned: writes the merged model.

    So what ``from_pretrained`` reads is the tuned model, under its own names. Needs one copy of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, state_dict: object = None, **kwargs: Any) -> Any:
        # A given state is the tuned model's (trainers pass it), whose names are not the merged one's.
        return merge(copy.deepcopy(self.model)).save_pretrained(*args, **kwargs)  # type: ignore[operator]


class Tuning(nn.Module):
    """The trainables attached to a model: registered there as ``fedmask``, found by ``tuning_of``."""

    def __init__(self, trainables: list[Trainable]) -> None:
        super().__init__()
        self.frozen_before: dict[str, bool] = {}
        for trainable in trainables:
            self.add_module(trainable.segment.replace("/", "_").replace(".", "_"), trainable)

    @property
    def trainables(self) -> list[Trainable]:
        """In the vector's order."""
        return [child for child in self.children() if isinstance(child, Trainable)]

    @property
    def layout(self) -> Layout:
        """The segments of the vector that travels."""
        return Layout(tuple(Segment(t.segment, t.size) for t in self.trainables))

    def begin(self, vector: torch.Tensor, draw: Draw) -> None:
        """Start all trainables from ``vector`` (float32 ``[layout.size]``: changes from the reference).

        Raises CheckpointError for a vector of another length.
        """
        slices, size = self.layout.slices(), self.layout.size
        if vector.shape != (size,):
            raise CheckpointError(f"vector: expected {size} values, found {list(vector.shape)}")
        for trainable in self.trainables:
            trainable.begin(vector[slices[trainable.segment]], draw)

    def vector(self) -> torch.Tensor:
        """The present changes, adapters folded: float32 ``[layout.size]``."""
        return torch.cat([t.change() for t in self.trainables]) if self.trainables else torch.zeros(0)

    def restore(self) -> None:
        """Put the model's own tensors back to the reference."""
        for trainable in self.trainables:
            trainable.restore()


def attach(model: nn.Module, trainables: list[Trainable]) -> Tuning:
    """Freeze ``model`` and let ``trainables`` drive it. ConfigError if something is attached already."""
    refuse_tuned(model)
    segments = [trainable.segment for trainable in trainables]
    if len(set(segments)) < len(segments):
        raise ConfigError(f"two trainables fill one segment, found {', '.join(segments)}: choose one of them")
    _refuse_fused(model, trainables)
    tuning = Tuning(trainables)
    tuning.frozen_before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    patches: dict[int, PatchedForward] = {}
    for trainable in trainables:
        for index, slot in enumerate(trainable.slots):
            patch = patches.setdefault(id(slot.module), PatchedForward(slot.module))
            if trainable.beside:
                patch.beside.append((trainable, index))
            else:
                patch.drivers.setdefault(slot.parameter, []).append((trainable, index))
    for patch in patches.values():
        patch.module.forward = patch
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MergedSave(model)  # type: ignore[assignment]
    model.add_module("fedmask", tuning)
    return tuning


def detach(model: nn.Module) -> None:
    """Undo ``attach``: the model as it was, with the reference's values."""
    tuning_of(model).restore()
    _remove(model)


def _remove(model: nn.Module) -> None:
    """Take the patches and trainables away and leave the weights as they are."""
    tuning = tuning_of(model)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), PatchedForward):
            del module.__dict__["forward"]
    model.__dict__.pop("save_pretrained", None)
    del model._modules["fedmask"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tuning.frozen_before.get(name, True))


def merge(model: nn.Module) -> nn.Module:
    """Fold everything that was trained into the weights and return the plain model.

    Same class, same parameter names and shapes as before tuning, so the same latency. Adapters are
    folded and gone. Works in place. ConfigError if ``model`` is not being tuned, or with adapters between
    its layers, which no weight can hold.
    """
    for trainable in tuning_of(model).trainables:
        if not trainable.mergeable:
            raise ConfigError(
                f"merge: the segment {trainable.segment!r} stays beside the model's layers and cannot be"
                " folded; fedmask export writes it beside the checkpoint"
            )
    return fold(model)


def fold(model: nn.Module) -> nn.Module:
    """``merge``, without a word about what cannot be folded: the caller keeps that."""
    folded: list[tuple[nn.Parameter, torch.Tensor]] = []
    with torch.no_grad():
        for module in model.modules():
            patch = module.__dict__.get("forward")
            if isinstance(patch, PatchedForward):
                for key, value in patch.folded().items():
                    parameter = module._parameters[key]
                    # Masked entries alone are in the weight already.
                    if parameter is not None and value.data_ptr() != parameter.data_ptr():
                        folded.append((parameter, value))
        _remove(model)
        for parameter, value in folded:
            parameter.copy_(value)
    return model


def refuse_tuned(model: nn.Module) -> None:
    """ConfigError if something is attached to ``model``."""
    if "fedmask" in model._modules:
        raise ConfigError("this model is being tuned already; call fedmask.merge(model) first")


def tuning_of(model: nn.Module) -> Tuning:
    """What is attached to ``model``; ConfigError if nothing is."""
    tuning = model._modules.get("fedmask")
    if not isinstance(tuning, Tuning):
        raise ConfigError(
            f"{type(model).__name__} is not being tuned: call fedmask.sparsify(model, mask) first"
        )
    return tuning


def _refuse_fused(model: nn.Module, trainables: list[Trainable]) -> None:
    """torch.nn's own attention reads weights past the layer's forward: no gradient would come."""
    inside = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        for child in module.modules()
    }
    for trainable in trainables:
        for slot in trainable.slots:
            if id(slot.module) in inside:
                raise ConfigError(
                    f"{slot.name} lies in a fused {type(slot.module).__name__} of torch.nn, which cannot be "
                    "tuned sparsely; use a transformers model"
                )
