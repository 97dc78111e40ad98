"""A change of whole matrices that others have made: in the weights, and not trained here.

With ``fedex-lora`` the server adds to the adapted layers' weights what the averaged factors miss
(fedmask.products); every party that trains or scores carries the sum of it.
"""

from __future__ import annotations

import torch

from fedmask.layout import RESIDUAL
from fedmask.space import backbone_parameters
from fedmask.stored import lost_bits, stored_reader, unrounded
from fedmask.trainables.base import Draw, Trainable


class CarriedMatrices(Trainable):
    """Holds a given change of the named tensors of the backbone, end to end, row-major; no gradient.

    Written into the weights by ``begin`` and taken out by ``restore``, so a layer costs what it did. In a
    backbone of bfloat16 the sum of stored value and change is rounded, as the stored value was.
    Memory: 4 bytes an entry while a client trains, and 4 more for what bfloat16 has lost.
    """

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        parameters = backbone_parameters(model)
        self._sizes = [parameters[name].numel() for name in names]
        super().__init__(RESIDUAL, [], size=sum(self._sizes), local_size=0)
        self.names = names
        read = stored_reader(model, parameters)
        self._tensors = [parameters[name] for name in names]
        self._lost = [lost_bits(read, name, parameters[name]) for name in names]
        self._change = torch.zeros(0)
        self._before: list[torch.Tensor] = []

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        self.restore()
        self._change = change.detach().clone()
        if not self._change.any():  # before the first mean; the weights stay as they are
            return
        pieces = torch.split(self._change, self._sizes)
        with torch.no_grad():
            for tensor, lost, piece in zip(self._tensors, self._lost, pieces, strict=True):
                self._before.append(tensor.detach().clone())
                tensor.copy_(unrounded(tensor, lost) + piece.view(tensor.shape))

    def change(self) -> torch.Tensor:
        return self._change.clone()

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("carried matrices drive no parameter: they are in the weights")

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, before in zip(self._tensors, self._before, strict=False):
                tensor.copy_(before)
        self._before = []
