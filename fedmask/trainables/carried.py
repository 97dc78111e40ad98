"""Carried entries: what others have trained, written into the weights and not trained here.

With a mask that moves, or one a client, the run's change lies at more entries than a client trains in a
round. The rest of them has to be in the weights all the same.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmask.errors import CheckpointError
from fedmask.space import ParameterSpace, backbone_parameters
from fedmask.stored import stored_reader
from fedmask.trainables.base import Draw, Trainable
from fedmask.trainables.masked import flat

SEGMENT = "carried"


class CarriedEntries(Trainable):
    """Holds a given change at given entries; no gradient, nothing of it moves.

    ``place`` says which entries (int64 flat indices over ``space``, sorted); the segment has their number of
    values. They must not be among the entries that another trainable writes in place. Memory: 12 bytes an
    entry, and as much again while a client trains. Raises CheckpointError for indices outside ``space``.
    """

    def __init__(self, model: torch.nn.Module, space: ParameterSpace) -> None:
        super().__init__(SEGMENT, [], size=0, local_size=0)
        parameters = backbone_parameters(model)
        self._tensors = {name: parameters[name] for name in space.names}
        self._read = stored_reader(model, parameters)
        self._space = space
        self._indices = np.empty(0, np.int64)
        self._places: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # name, where, stored values there
        self._change = torch.zeros(0)
        self._before: list[torch.Tensor] = []

    def place(self, indices: np.ndarray) -> None:
        """Carry the change at ``indices`` (int64, sorted) from the next ``begin`` on."""
        if np.array_equal(indices, self._indices):
            return
        self.restore()
        if indices.size and (indices[0] < 0 or indices[-1] >= self._space.size):
            raise CheckpointError(
                f"carried entries: expected indices below {self._space.size}, found {indices[0]} to "
                f"{indices[-1]}; they belong to another model"
            )
        self._indices, self.size, self._places = indices, int(indices.size), []
        for name, part in zip(self._space.names, self._space.split(indices), strict=True):
            if part.size:
                where = torch.from_numpy(part)
                self._places.append((name, where, self._read(name).reshape(-1)[where].float()))

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        self.restore()
        self._change = change.detach().clone()
        pieces = torch.split(self._change, [len(where) for _, where, _ in self._places])
        with torch.no_grad():
            for (name, where, stored), piece in zip(self._places, pieces, strict=True):
                weights = flat(self._tensors[name])
                self._before.append(weights[where])
                weights[where] = (stored + piece).to(weights.dtype)

    def change(self) -> torch.Tensor:
        return self._change.clone()

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("carried entries drive no parameter: they are in the weights")

    def restore(self) -> None:
        with torch.no_grad():
            for (name, where, _), values in zip(self._places, self._before, strict=False):
                flat(self._tensors[name])[where] = values
        self._before = []
