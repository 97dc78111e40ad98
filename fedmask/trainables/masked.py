"""Masked entries: k scattered values of the frozen weights (PaFi, arXiv 2305.16742, and any other mask)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedmask.errors import CheckpointError
from fedmask.kernels import Pattern, TableRows, WeightLayout, is_plain_embedding
from fedmask.masks.base import Mask
from fedmask.space import backbone_of, backbone_parameters, is_conv1d, is_linear
from fedmask.stored import stored_reader
from fedmask.trainables.base import Chunks, Draw, Slot, Trainable, slots_of


class MaskedEntries(Trainable):
    """Trains the change of exactly the mask's entries; everything else keeps its bits.

    ``values`` float32 ``[k]`` in the mask's order: the change from the stored checkpoint. The model's
    weights hold reference + change at the masked places (in the weights' dtype), written in place
    whenever ``values`` has changed, so that the forward pass needs no copy of a weight.

    Raises CheckpointError for a mask over tensors that ``model`` lacks.
    """

    def __init__(self, model: torch.nn.Module, mask: Mask, *, kernel: str = "auto") -> None:
        parts = mask.per_tensor()
        names = list(parts)
        parameters = backbone_parameters(model)
        _check_tensors(parameters, mask)
        slots = slots_of(backbone_of(model), names, within=model)
        super().__init__("mask", slots, size=mask.k, local_size=mask.k)
        read = stored_reader(model, parameters)
        self.mask = mask
        self.kernel = kernel
        self._order = {name: i for i, name in enumerate(names)}
        self._indices = [torch.from_numpy(parts[name]) for name in names]
        self._reference = [
            read(name).reshape(-1)[index] for name, index in zip(names, self._indices, strict=True)
        ]
        self._tensors = self._one_slot_each(names)
        self._patterns: dict[str, Any] = {
            slot.name: _pattern(slot, parts[slot.name]) for slot in self.slots if is_matrix(slot)
        }
        self._tables = {
            slot.name: TableRows.from_flat(parts[slot.name], slot.tensor.shape)
            for slot in self.slots
            if is_table(slot)
        }
        self._chunks = Chunks([len(index) for index in self._indices])
        self._written: list[torch.Tensor | None] = [None] * len(names)  # the entries that the weights hold

    def _one_slot_each(self, names: list[str]) -> list[Slot]:
        first: dict[str, Slot] = {}
        for slot in self.slots:
            first.setdefault(slot.name, slot)
        return [first[name] for name in names]

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        with torch.no_grad():
            self.values.copy_(change)
            self._write_all()

    def change(self) -> torch.Tensor:
        return self.values.detach().clone()

    def entry(self, name: str) -> torch.Tensor:
        """One tensor's masked changes: float32 ``[k of the tensor]``, differentiable in ``values``."""
        return self._chunks.get(self.values)[self._order[name]]

    def written(self, name: str) -> torch.Tensor:
        """``entry(name)`` (float32), after the weight has been brought up to date with it.

        Compared by value: optimizers that write through ``values.data`` leave no other trace.
        """
        entry, held = self.entry(name), self._written[self._order[name]]
        if held is None or held.dtype != entry.dtype or not torch.equal(held, entry):
            self._write(name, entry)
        return entry

    def pattern(self, slot: int) -> tuple[torch.Tensor, Any]:
        """For a linear layer's weight: its changes (float32 ``[k of the layer]``) and where they lie."""
        name = self.slots[slot].name
        return self.written(name), self._patterns[name]

    def table(self, slot: int) -> tuple[torch.Tensor, TableRows]:
        """For an embedding's table: its changes (float32 ``[k of the table]``) and where they lie."""
        name = self.slots[slot].name
        return self.written(name), self._tables[name]

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        name = self.slots[slot].name
        entries, (index, _) = self.written(name), self._places(self._order[name])
        # An alias of the weight, which already holds the change; only the gradient is routed.
        seen: torch.Tensor = _Gather.apply(entries, tensor, index)  # type: ignore[no-untyped-call]
        return seen

    def restore(self) -> None:
        with torch.no_grad():
            for i, slot in enumerate(self._tensors):
                index, reference = self._places(i)
                flat(slot.tensor).scatter_(0, index, reference.to(slot.tensor.dtype))
        self._written = [None] * len(self._tensors)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._written = [None] * len(self._tensors)  # the weights have been loaded too, maybe a step behind

    def _write_all(self) -> None:
        """Write whatever was written before: another task's model may have used the same tensors since."""
        for slot in self._tensors:
            self._write(slot.name, self.entry(slot.name))

    def _write(self, name: str, entry: torch.Tensor) -> None:
        i = self._order[name]
        tensor, (index, reference) = self._tensors[i].tensor, self._places(i)
        with torch.no_grad():
            # scatter_ takes a third of the time of writing by an index
            flat(tensor).scatter_(0, index, (reference + entry).to(tensor.dtype))
            self._written[i] = entry.detach().clone()

    def _places(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where tensor i's entries lie (int64 [k of it]) and their stored values, on the tensor's device."""
        device = self._tensors[i].tensor.device
        if self._indices[i].device != device:  # the model has been moved
            self._indices[i] = self._indices[i].to(device)
            self._reference[i] = self._reference[i].to(device)
        return self._indices[i], self._reference[i]


def _check_tensors(parameters: dict[str, torch.nn.Parameter], mask: Mask) -> None:
    for name, shape in zip(mask.space.names, mask.space.shapes, strict=True):
        found = tuple(parameters[name].shape) if name in parameters else None
        if found != shape:
            raise CheckpointError(
                f"mask: expected a tensor {name} of shape {shape}, found {found}: the mask was made "
                "for another architecture"
            )


def is_matrix(slot: Slot) -> bool:
    """Whether the slot is the weight of a linear layer, which has the sampled gradient."""
    return is_linear(slot.module) and slot.parameter == "weight"


def is_table(slot: Slot) -> bool:
    """Whether the slot is the table of an embedding, whose gradient is found by the rows that were read."""
    return slot.parameter == "weight" and is_plain_embedding(slot.module)


def flat(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's storage as one row ``[n]``; an error where that would be a copy (writes get lost)."""
    return parameter.detach().view(-1)


def _pattern(slot: Slot, indices: np.ndarray) -> Any:
    layout: WeightLayout = "conv1d" if is_conv1d(slot.module) else "linear"
    rows, columns = slot.tensor.shape
    return Pattern.from_flat(indices, (rows, columns), layout=layout)


class _Gather(torch.autograd.Function):
    """Identity on a tensor that already holds the change; the backward pass gathers k gradients."""

    @staticmethod
    def forward(ctx: Any, entries: torch.Tensor, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.index = index
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.reshape(-1)[ctx.index].float(), None, None
