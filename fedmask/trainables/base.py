"""The contract of a trainable: what a client trains, and what of it travels.

A trainable owns one leaf ``values`` (float32, what the local optimizer moves) and drives some
parameters of the model (its slots). The model's own tensors stay where they are and keep their
names; a slot's tensor is replaced only while its module's ``forward`` runs (fedmask.tuner).

What travels is ``change()``: float32 ``[size]``, the change from the reference that all parties
hold. Writing your own is four methods::

    class Shift(Trainable):                        # one number added to every slot
        def __init__(self, slots): super().__init__("shift", slots, size=1, local_size=1)
        def begin(self, change, draw): self.values.data.copy_(change)
        def change(self): return self.values.detach().clone()
        def effective(self, slot, tensor): return tensor + self.values
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Draw = Callable[[str], np.random.Generator]
"""A random generator for one named purpose; equal on all parties of a round."""


@dataclass(frozen=True)
class Slot:
    """One parameter of one module: ``getattr(module, parameter)``; ``name`` is its name in the backbone."""

    module: nn.Module
    parameter: str
    name: str

    @property
    def tensor(self) -> nn.Parameter:
        """The model's own tensor behind the slot."""
        found = self.module._parameters[self.parameter]
        if found is None:
            raise RuntimeError(f"{self.name} is gone from the model")
        return found


def slots_of(module: nn.Module, names: Sequence[str], within: nn.Module | None = None) -> list[Slot]:
    """The slots of ``module``'s named parameters; one that several modules share (tied) gets a slot in each.

    Modules are looked for in ``within``, by default ``module`` itself: a language model's output layer
    shares the backbone's embedding and lies outside of it.
    """
    parameters = dict(module.named_parameters())
    wanted = {id(parameters[name]): name for name in names}
    return [
        Slot(owner, key, wanted[id(parameter)])
        for owner in (within or module).modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None and id(parameter) in wanted
    ]


class Trainable(nn.Module, ABC):
    """See the module's text. ``segment`` names the part of the vector that it fills."""

    values: nn.Parameter
    names: Sequence[str] = ()
    """The driven tensors in order, where the segment is whole tensors end to end."""
    beside: bool = False
    """Whether it works on its layers' outputs (``output``) and leaves their tensors alone until merged."""
    mergeable: bool = True
    """Whether what it learns can be folded into the model's own tensors."""

    def __init__(self, segment: str, slots: list[Slot], *, size: int, local_size: int) -> None:
        super().__init__()
        self.segment = segment
        self.slots = slots
        self.size = size
        self.values = nn.Parameter(torch.zeros(local_size, dtype=torch.float32))

    @abstractmethod
    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        """Start from ``change`` (float32 ``[size]``); ``draw`` gives the random streams that all share."""

    @abstractmethod
    def change(self) -> torch.Tensor:
        """What has changed from the reference, adapters folded: float32 ``[size]``, no gradient."""

    def origin(self) -> torch.Tensor:
        """What is added to ``change`` where weights are to be ranked (FLASC), float32 ``[size]``.

        By default nothing: entries of a large tensor are ranked by how far they have moved.
        """
        return torch.zeros(self.size)

    @abstractmethod
    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        """What the slot's module sees instead of ``tensor`` (of its shape), differentiable in ``values``."""

    def output(self, slot: int, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """With ``beside``: what the slot's layer gives for ``inputs``, instead of ``output`` (same shape)."""
        return output

    def restore(self) -> None:
        """Put back every value of the model that was written in place."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if f"{prefix}values" not in state_dict:
            # Not only a missing key: a trainer that loads leniently would go on from the start, silently.
            errors.append(
                f"the state has no {prefix}values: it is a merged model's (save_pretrained writes one); "
                "load what model.state_dict() gave, or load it before fedmask.sparsify"
            )


class Chunks:
    """``values`` cut into one piece a tensor, by a single differentiable split.

    One split for all layers makes the backward pass write each gradient once (k values), where one
    slice a layer would write k values per layer. The pieces are kept while ``values`` is unchanged.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._key: tuple[Any, ...] = ()
        self._pieces: tuple[torch.Tensor, ...] = ()

    def get(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pieces of ``values`` (float32 ``[sum(sizes)]``) for the present gradient mode."""
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), values.requires_grad
        key = (values._version, values.data_ptr(), *modes)
        if key != self._key:
            self._pieces, self._key = torch.split(values, self._sizes), key
        return self._pieces

    def __deepcopy__(self, memo: dict[int, Any]) -> Chunks:
        return Chunks(self._sizes)  # pieces belong to the original's values

    def __reduce__(self) -> tuple[Any, ...]:
        return Chunks, (self._sizes,)


def full_precision(values: torch.Tensor) -> torch.autocast:
    """A context without autocast where ``values`` (any shape) are: folding must give training's bits."""
    return torch.autocast(values.device.type, enabled=False)
