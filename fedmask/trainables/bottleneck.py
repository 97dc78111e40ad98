"""Bottleneck adapters: h + W_up f(W_down h + b_down) + b_up, h the output of a block's feed-forward part.

Source: Houlsby et al., ICML 2019 (arXiv 1902.00751), with their start near the identity (both matrices
normal with deviation 0.01, cut off at two deviations; biases zero), and one adapter a block as Pfeiffer
et al. (arXiv 2005.00247) found enough. What differs: the adapter reads the layer's output before the
dropout that follows it, and normalisations stay frozen. Its start is drawn from the run's seed. An
adapter stays in the model: it cannot be folded into a weight.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedmask.errors import ConfigError
from fedmask.space import backbone_of
from fedmask.trainables.adapters import checked, feed_forward_layers
from fedmask.trainables.base import Draw, full_precision, slots_of
from fedmask.trainables.drawn import Drawn

_DEVIATION = 0.01
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def last_feed_forward_layers(model: nn.Module) -> list[str]:
    """The last feed-forward layer of each block, by name in the backbone. ConfigError if there is none."""
    last: dict[str, str] = {}
    for name, _ in feed_forward_layers(model):
        block = re.match(r".*?\.\d+(?=\.)", f".{name}")
        last[block.group() if block else name] = name
    if not last:
        raise ConfigError(
            f"{type(model).__name__} has no feed-forward layers to adapt; use another method, such as 'lora'"
        )
    return list(last.values())


class Bottlenecks(Drawn):
    """One adapter behind the last feed-forward layer of every block.

    ``values`` float32, block by block: W_down ``[r, d]``, b_down ``[r]``, W_up ``[d, r]``, b_up ``[d]``.
    """

    beside = True
    mergeable = False

    def __init__(
        self, model: nn.Module, draw: Draw, *, bottleneck: int = 16, activation: str = "relu"
    ) -> None:
        """``draw`` gives the start: the same streams on all parties and in all rounds."""
        bottleneck, function = checked(bottleneck, activation)
        layers = last_feed_forward_layers(model)
        modules = dict(backbone_of(model).named_modules())
        widths = [_width(modules[name]) for name in layers]
        start = [
            piece
            for name, width in zip(layers, widths, strict=True)
            for piece in (
                _near_zero(draw, f"{name}/down", bottleneck * width),
                torch.zeros(bottleneck),
                _near_zero(draw, f"{name}/up", width * bottleneck),
                torch.zeros(width),
            )
        ]
        super().__init__("adapter", slots_of(backbone_of(model), [f"{n}.weight" for n in layers]), start)
        self.layers, self.bottleneck, self.activation = layers, bottleneck, activation
        self._function = function
        self._order = {f"{name}.weight": i for i, name in enumerate(layers)}

    def parts(self, block: int) -> dict[str, torch.Tensor]:
        """One adapter's tensors by name: ``down.weight`` float32 ``[r, d]`` and so on, differentiable."""
        pieces = self._chunks.get(self.values)[4 * block : 4 * block + 4]
        shapes = ((self.bottleneck, -1), (-1,), (-1, self.bottleneck), (-1,))
        named = zip(_PARTS, pieces, shapes, strict=True)
        return {name: piece.view(shape) for name, piece, shape in named}

    def output(self, slot: int, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        down, down_bias, up, up_bias = self.parts(self._order[self.slots[slot].name]).values()
        with full_precision(self.values):
            states = output.to(down.dtype)
            hidden = self._function(functional.linear(states, down, down_bias))
            return (states + functional.linear(hidden, up, up_bias)).to(output.dtype)

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def _width(layer: nn.Module) -> int:
    """Outputs of a linear layer of either kind."""
    found = getattr(layer, "out_features", None) or getattr(layer, "nf", None)
    return int(found)  # type: ignore[arg-type]


def _near_zero(draw: Draw, name: str, count: int) -> torch.Tensor:
    """Normal numbers cut off at two deviations, flat float32 ``[count]``: those outside are drawn again."""
    generator = draw(f"bottleneck/{name}")
    numbers = generator.standard_normal(count)
    while (outside := np.abs(numbers) > 2).any():
        numbers[outside] = generator.standard_normal(int(outside.sum()))
    return torch.as_tensor(numbers * _DEVIATION, dtype=torch.float32)
