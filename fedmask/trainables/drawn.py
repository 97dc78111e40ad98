"""Values that start from a draw that all parties of a run share; what travels is their change from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmask.trainables.base import Chunks, Draw, Slot, Trainable


class Drawn(Trainable):
    """``values`` float32 begin at ``start`` (flat pieces end to end), which costs no byte: it is not sent."""

    def __init__(self, segment: str, slots: list[Slot], start: Sequence[torch.Tensor]) -> None:
        sizes = [piece.numel() for piece in start]
        super().__init__(segment, slots, size=sum(sizes), local_size=sum(sizes))
        self._start = torch.cat(list(start))
        self._chunks = Chunks(sizes)
        with torch.no_grad():
            self.values.copy_(self._start)

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        with torch.no_grad():
            self.values.copy_(self._start + change)

    def change(self) -> torch.Tensor:
        return self.values.detach() - self._start

    def origin(self) -> torch.Tensor:
        return self._start
