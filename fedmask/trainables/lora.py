"""LoRA: W + (alpha / r) B A with W frozen; the two factors train, travel and are averaged each on its own.

Source: Hu et al., ICLR 2022 (arXiv 2106.09685), with the rules of the PEFT library, so that one client's
training is PEFT's own: A uniform in +-1/sqrt(inputs) (Kaiming with a = sqrt(5)), B zero, no dropout before
A. Here A's start is drawn from the run's seed and equal on all parties, since factors that start apart
cannot be averaged. Federated averaging of the factors is FedAvg (FedIT, arXiv 2305.05644); the mean of
products is another thing, see ``fedex-lora``. With A frozen: FFA-LoRA (arXiv 2403.12313), here without its
noise for privacy.

FLASC (arXiv 2406.05233; imkevinkuo/flasc, train_sparse_lora_dp.py) trains these factors and the head whole;
the largest weights of them go down, zeros for the others, and the largest changes go up. Different here: the
server averages (there AdamW), no dropout before A (there 0.1), a share of n values is rounded (there cut
off), and the server's whole vector is scored (there the largest weights by the round's choice, unless told).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from fedmask.errors import ConfigError, unknown
from fedmask.space import backbone_of, is_conv1d, linear_layers
from fedmask.trainables.adapters import feed_forward_layers
from fedmask.trainables.base import Draw, full_precision, slots_of
from fedmask.trainables.drawn import Drawn

_FUSED = {"c_attn", "query_key_value", "qkv_proj", "Wqkv"}
_NAMES = {
    "query": {"query", "q_proj", "q_lin", "q", "query_proj"} | _FUSED,
    "key": {"key", "k_proj", "k_lin", "k", "key_proj"} | _FUSED,
    "value": {"value", "v_proj", "v_lin", "v", "value_proj"} | _FUSED,
}
_GROUPS = (*_NAMES, "attention", "feed-forward", "linear")


def target_layers(model: nn.Module, targets: str) -> list[str]:
    """Names (in the backbone) of the linear layers that ``targets`` means, in the model's order.

    ``targets``: parts joined by ``+``: ``query``, ``key``, ``value``, ``attention``, ``feed-forward``,
    ``linear`` (all), or the last part of layers' own names. A fused projection counts for each of its
    parts. ConfigError for a part that fits no layer.
    """
    layers = [name for name, _ in linear_layers(model)]
    chosen: set[str] = set()
    for part in targets.split("+"):
        found = set(_matching(model, layers, part))
        if not found:
            own = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ConfigError(f"lora.targets: {unknown('layers', part, dict.fromkeys([*_GROUPS, *own]))}")
        chosen |= found
    return [name for name in layers if name in chosen]


def _matching(model: nn.Module, layers: list[str], part: str) -> Iterator[str]:
    feed_forward = {name for name, _ in feed_forward_layers(model)}
    for name in layers:
        last = name.rsplit(".", 1)[-1]
        if (
            part in ("linear", last)
            or last in _NAMES.get(part, ())
            or (part == "feed-forward" and name in feed_forward)
            or (part == "attention" and name not in feed_forward)
        ):
            yield name


class LoRA(Drawn):
    """Low-rank factors beside the targeted layers' frozen weights.

    ``values`` float32: A ``[r, inputs]`` then B ``[outputs, r]``, layer by layer; with ``freeze_down``
    (FFA-LoRA) the B alone. What travels is their change from the drawn start, so A's start costs no byte.
    A layer computes x W^T + (alpha / r) (x A^T) B^T and never forms the product, other than to be merged.
    Weight decay pulls the factors themselves to zero, as it does in PEFT.
    """

    beside = True

    def __init__(
        self,
        model: nn.Module,
        draw: Draw,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: str = "query+value",
        freeze_down: bool = False,
    ) -> None:
        """``draw`` gives the start of A: the same streams on all parties and in all rounds."""
        layers = target_layers(model, targets)
        slots = slots_of(backbone_of(model), [f"{name}.weight" for name in layers])
        matrices = {slot.name: slot for slot in slots}
        turned = [is_conv1d(matrices[f"{name}.weight"].module) for name in layers]
        shapes = [tuple(matrices[f"{name}.weight"].tensor.shape) for name in layers]
        sides = [
            (shape[1], shape[0]) if turn else (shape[0], shape[1])
            for shape, turn in zip(shapes, turned, strict=True)
        ]
        downs = [_kaiming(draw, name, rank, side[1]) for name, side in zip(layers, sides, strict=True)]
        ups = [torch.zeros(side[0] * rank) for side in sides]
        both = [part for pair in zip(downs, ups, strict=True) for part in pair]
        super().__init__("lora", slots, ups if freeze_down else both)
        self.layers, self.turned, self.sides = layers, turned, sides  # sides: (outputs, inputs)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self._frozen = downs if freeze_down else None
        self._order = {f"{name}.weight": i for i, name in enumerate(layers)}

    def factors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[r, inputs]`` and B ``[outputs, r]`` (float32) of a layer, differentiable in ``values``."""
        pieces = self._chunks.get(self.values)
        down, up = (
            pieces[2 * layer : 2 * layer + 2]
            if self._frozen is None
            else (self._frozen[layer], pieces[layer])
        )
        return down.view(self.rank, -1), up.view(-1, self.rank)

    def output(self, slot: int, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        down, up = self.factors(self._order[self.slots[slot].name])
        with full_precision(self.values):
            hidden = functional.linear(inputs.to(down.dtype), down).flatten(0, -2)
            rows = output.flatten(0, -2).to(down.dtype)
            return torch.addmm(rows, hidden, up.t(), alpha=self.scale).view(output.shape).to(output.dtype)

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        layer = self._order[self.slots[slot].name]
        down, up = self.factors(layer)
        with full_precision(self.values):
            product = self.scale * (up @ down)
        return (tensor + (product.t() if self.turned[layer] else product)).to(tensor.dtype)


def _kaiming(draw: Draw, name: str, rank: int, inputs: int) -> torch.Tensor:
    """The start of A, flat float32 ``[rank * inputs]``."""
    bound = inputs**-0.5
    # as_tensor: on the default device, which is torch's "meta" where only shapes are wanted (fedmask.shapes).
    return torch.as_tensor(draw(f"lora/{name}").uniform(-bound, bound, rank * inputs), dtype=torch.float32)
