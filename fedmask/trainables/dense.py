"""Whole tensors trained directly: heads and biases."""

from __future__ import annotations

import torch

from fedmask.stored import lost_bits, stored_reader, unrounded
from fedmask.trainables.base import Chunks, Draw, Trainable, slots_of


class DenseTensors(Trainable):
    """Trains the change of all entries of the named parameters of ``module``, in the given order.

    ``values`` float32 ``[sum of sizes]``: the change from the stored values, tensor by tensor, row-major.
    """

    def __init__(self, segment: str, module: torch.nn.Module, names: list[str]) -> None:
        parameters = dict(module.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        sizes = [int(torch.Size(shapes[name]).numel()) for name in names]
        super().__init__(segment, slots_of(module, names), size=sum(sizes), local_size=sum(sizes))
        self.names = names
        read = stored_reader(module, parameters)
        self._lost = [lost_bits(read, name, parameters[name]) for name in names]
        self._order = {name: i for i, name in enumerate(names)}
        self._shapes = shapes
        self._sizes = sizes
        self._chunks = Chunks(sizes)

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        with torch.no_grad():
            self.values.copy_(change)

    def change(self) -> torch.Tensor:
        return self.values.detach().clone()

    def origin(self) -> torch.Tensor:
        tensors = {slot.name: slot.tensor.detach() for slot in self.slots}
        return torch.cat([tensors[name].float().flatten() for name in self.names])

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        name = self.slots[slot].name
        at = self._order[name]
        change = self._chunks.get(self.values)[at].view(self._shapes[name])
        return (unrounded(tensor, self._lost[at]) + change).to(tensor.dtype)
