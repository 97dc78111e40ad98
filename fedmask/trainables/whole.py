"""Full fine-tuning: every entry of the backbone, trained as it is and not as a change beside it."""

from __future__ import annotations

import torch

from fedmask.stored import unrounded
from fedmask.trainables.base import Chunks, Draw
from fedmask.trainables.dense import DenseTensors


class WholeTensors(DenseTensors):
    """``DenseTensors`` for as many values as the model has: what a layer sees is a piece of ``values``.

    Between ``begin`` and ``restore``, ``values`` float32 ``[sum of sizes]`` holds the weights themselves, so
    a step adds and copies nothing that plain full fine-tuning would not, but for gathering the gradients.
    Afterwards it is empty: a process holds one task's weights at a time, however many tasks it serves.
    Weight decay pulls the weights to zero, as is usual for full fine-tuning, and not their change.
    """

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        self.values.data = change.detach().clone()
        for piece, reference in zip(
            torch.split(self.values.detach(), self._sizes), self._references(), strict=True
        ):
            piece += reference

    def change(self) -> torch.Tensor:
        out = self.values.detach().clone()
        for piece, reference in zip(torch.split(out, self._sizes), self._references(), strict=True):
            piece -= reference
        return out

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        name = self.slots[slot].name
        piece = self._chunks.get(self.values)[self._order[name]]
        return piece.view(self._shapes[name]).to(tensor.dtype)

    def restore(self) -> None:
        self.values.grad = None
        self.values.data = torch.empty(0)
        self._chunks = Chunks(self._sizes)  # its pieces would keep the old values in memory

    def _references(self) -> list[torch.Tensor]:
        """The stored values, flat float32, tensor by tensor."""
        tensors = {slot.name: slot.tensor.detach() for slot in self.slots}
        return [
            unrounded(tensors[name], lost).float().reshape(-1)
            for name, lost in zip(self.names, self._lost, strict=True)
        ]
