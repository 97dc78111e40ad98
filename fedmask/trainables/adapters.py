"""HiWi: adapters on the pre-trained parameters themselves, folded away after training.

Source: Liao, Meng, Monz, ACL 2023 (arXiv 2305.16742). For a feed-forward bias b (or the rows of a
feed-forward matrix W), b' = b + f(b W_down) W_up; b' is stored and the adapter thrown away.
The paper's initialisation and scaling are not known to us. Here: no scaling; W_up starts at zero, so
the first step sees the pre-trained model; W_down is normal with deviation sqrt(2 / d) and drawn from a
stream that all clients of a round share. In a federation the adapter is fresh each round and reads
the current averaged parameters; the folded change travels, because the mean of folded changes is
exact and the mean of factors is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from fedmask.errors import CheckpointError, ConfigError, unknown
from fedmask.masks.base import Mask
from fedmask.space import backbone_of, backbone_parameters, is_conv1d, linear_layers
from fedmask.stored import lost_bits, stored_reader, unrounded
from fedmask.trainables.base import Chunks, Draw, Trainable, full_precision, slots_of
from fedmask.trainables.masked import MaskedEntries

Activation = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
}
_DRAWS = 100


def checked(bottleneck: int, activation: str) -> tuple[int, Activation]:
    """Hidden width and function of an adapter. ConfigError for less than one unit and an unknown name."""
    if not isinstance(bottleneck, int) or isinstance(bottleneck, bool) or bottleneck < 1:
        raise ConfigError(f"bottleneck: expected a whole number at least 1, found {bottleneck!r}; try 16")
    if activation not in ACTIVATIONS:
        raise ConfigError(unknown("activation", str(activation), ACTIVATIONS))
    return bottleneck, ACTIVATIONS[activation]


def feed_forward_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of the blocks that belong to no attention, by name: the feed-forward ones."""
    for name, module in linear_layers(model):
        parts = name.lower().split(".")
        if not any("attn" in part or "attention" in part for part in parts):
            yield name, module


def feed_forward_biases(model: nn.Module) -> list[str]:
    """Names of the feed-forward biases in the backbone; ConfigError where the architecture has none."""
    present = backbone_parameters(model)
    names = [f"{name}.bias" for name, _ in feed_forward_layers(model) if f"{name}.bias" in present]
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no feed-forward biases, which this method trains; use method 'pafi'"
        )
    return names


def biases(model: nn.Module) -> list[str]:
    """Names of all biases in the backbone, normalisation included; ConfigError where there is none."""
    names = [name for name in backbone_parameters(model) if name.rsplit(".", 1)[-1].endswith("bias")]
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no biases, which this method trains; use method 'pafi'"
        )
    return names


def draw_down(
    draw: Draw, name: str, rows: torch.Tensor, bottleneck: int, activation: Activation
) -> torch.Tensor:
    """W_down float32 ``[d, r]`` for ``rows`` float32 ``[n, d]``, with some hidden value that is not zero.

    Where f(rows W_down) is zero throughout (ReLU with every unit off), W_up would get no gradient
    at all, so the draw is repeated. CheckpointError if the inputs are all zero.
    """
    if not bool(rows.any()):
        raise CheckpointError(
            f"{name}: expected some value that is not zero, found only zeros: an adapter on it would never "
            "train; use method 'ffn-bias' or 'pafi'"
        )
    width = rows.shape[1]
    for attempt in range(_DRAWS):
        numbers = (
            draw(f"adapter/{name}/{attempt}").standard_normal((width, bottleneck)) * (2.0 / width) ** 0.5
        )
        down = torch.from_numpy(numbers).float()
        if bool(activation(rows @ down).any()):
            return down
    raise CheckpointError(
        f"{name}: no draw of {_DRAWS} gave an adapter with a live unit; use a larger bottleneck"
    )


class BiasAdapters(Trainable):
    """The main variant: one adapter on each feed-forward bias.

    ``values`` float32: W_down ``[d, r]`` then W_up ``[r, d]``, bias by bias. What travels is the
    folded change of the biases: float32 ``[sum of d]``, whatever r is.
    """

    def __init__(self, model: nn.Module, *, bottleneck: int = 16, activation: str = "relu") -> None:
        bottleneck, function = checked(bottleneck, activation)
        names = feed_forward_biases(model)
        parameters = backbone_parameters(model)
        self._widths = [parameters[name].numel() for name in names]
        local = [w * bottleneck for w in self._widths for _ in (0, 1)]
        slots = slots_of(backbone_of(model), names)
        super().__init__("bias", slots, size=sum(self._widths), local_size=sum(local))
        read = stored_reader(model, parameters)
        self.names = names
        self.bottleneck, self.activation = bottleneck, function
        self._reference = [read(name).detach().reshape(-1).float().clone() for name in names]
        self._lost = [lost_bits(read, name, parameters[name]) for name in names]
        self._start = [torch.zeros(w) for w in self._widths]
        self._order = {name: i for i, name in enumerate(names)}
        self._chunks = Chunks(local)

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        self._start = [part.clone() for part in torch.split(change.detach(), self._widths)]
        factors = []
        for name, reference, start in zip(self.names, self._reference, self._start, strict=True):
            rows = (reference + start)[None, :]
            down = draw_down(draw, name, rows, self.bottleneck, self.activation)
            factors += [down.reshape(-1), torch.zeros(down.numel())]
        with torch.no_grad():
            self.values.copy_(torch.cat(factors))

    def _folded(self, i: int) -> torch.Tensor:
        """f(b W_down) W_up for bias i: float32 ``[d]``, differentiable in ``values``."""
        pieces = self._chunks.get(self.values)
        down = pieces[2 * i].view(-1, self.bottleneck)
        up = pieces[2 * i + 1].view(self.bottleneck, -1)
        with full_precision(self.values):
            hidden: torch.Tensor = self.activation((self._reference[i] + self._start[i]) @ down)
            return hidden @ up

    def change(self) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([start + self._folded(i) for i, start in enumerate(self._start)])

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        i = self._order[self.slots[slot].name]
        base = unrounded(tensor, self._lost[i])
        return (base + (self._start[i] + self._folded(i))).to(tensor.dtype)


class WeightAdapters(Trainable):
    """The variant on feed-forward weights, W' = W + f(W W_down) W_up: for local use and export.

    The rows of W are fed like tokens (one row an output). Its folded change is dense (float32
    ``[sum of outputs x inputs]``), so a federation refuses it; see ``MaskedWeightAdapters``.
    """

    def __init__(self, model: nn.Module, *, bottleneck: int = 16, activation: str = "relu") -> None:
        bottleneck, function = checked(bottleneck, activation)
        layers = dict(feed_forward_layers(model))
        names = [f"{name}.weight" for name in layers]
        parameters = backbone_parameters(model)
        self._turned = [is_conv1d(module) for module in layers.values()]
        self._shapes = [parameters[name].shape for name in names]
        local = [side * bottleneck for i in range(len(names)) for side in [self._inputs(i)] * 2]
        size = sum(shape.numel() for shape in self._shapes)
        super().__init__("ffn-weight", slots_of(backbone_of(model), names), size=size, local_size=sum(local))
        self.names = names
        self.bottleneck, self.activation = bottleneck, function
        self._order = {name: i for i, name in enumerate(names)}
        self._tensors = [next(s for s in self.slots if s.name == name) for name in names]
        self._start: list[torch.Tensor] | None = None
        self._chunks = Chunks(local)

    def _inputs(self, i: int) -> int:
        return int(self._shapes[i][0] if self._turned[i] else self._shapes[i][1])

    def _rows(self, i: int) -> torch.Tensor:
        """The matrix that the adapter reads, one row an output: pre-trained plus the start's change."""
        weight = self._tensors[i].tensor.detach().float()
        if self._start is not None:
            weight = weight + self._start[i]
        return weight.t() if self._turned[i] else weight

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        # An all-zero start needs no dense copy of its own.
        parts = torch.split(change.detach(), [s.numel() for s in self._shapes])
        shaped = [part.view(shape).clone() for part, shape in zip(parts, self._shapes, strict=True)]
        self._start = shaped if bool(change.any()) else None
        factors = []
        for i, name in enumerate(self.names):
            down = draw_down(draw, name, self._rows(i), self.bottleneck, self.activation)
            factors += [down.reshape(-1), torch.zeros(down.numel())]
        with torch.no_grad():
            self.values.copy_(torch.cat(factors))

    def _folded(self, i: int) -> torch.Tensor:
        pieces = self._chunks.get(self.values)
        down = pieces[2 * i].view(-1, self.bottleneck)
        up = pieces[2 * i + 1].view(self.bottleneck, -1)
        with full_precision(self.values):
            change = self.activation(self._rows(i) @ down) @ up
        change = change.t() if self._turned[i] else change
        return change if self._start is None else self._start[i] + change

    def change(self) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self._folded(i).reshape(-1) for i in range(len(self.names))])

    def effective(self, slot: int, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor + self._folded(self._order[self.slots[slot].name])).to(tensor.dtype)


class MaskedWeightAdapters(MaskedEntries):
    """The weight variant restricted to the mask: k changes train and travel, helped by adapters.

    At the masked entries of a feed-forward matrix the change is values + (f(W W_down) W_up) there;
    elsewhere it is the values alone. ``values`` float32: the k changes, then W_down ``[inputs, r]`` and
    W_up ``[r, inputs]`` for each feed-forward matrix that holds masked entries. Needs a copy of those
    matrices while a round trains, as the adapter reads the weights of the round's start.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        *,
        bottleneck: int = 16,
        activation: str = "relu",
        kernel: str = "auto",
    ) -> None:
        bottleneck, function = checked(bottleneck, activation)
        super().__init__(model, mask, kernel=kernel)
        layers = {f"{name}.weight" for name, _ in feed_forward_layers(model)}
        self._adapted = [slot.name for slot in self._tensors if slot.name in layers]
        if not self._adapted:
            raise ConfigError(
                "weight adapters: the mask holds no entry of a feed-forward matrix; raise the density"
            )
        self.bottleneck, self.activation = bottleneck, function
        factors = [self._patterns[name].shape[1] * bottleneck for name in self._adapted for _ in (0, 1)]
        self._factor_at = {name: len(self._indices) + 2 * i for i, name in enumerate(self._adapted)}
        self._chunks = Chunks([len(index) for index in self._indices] + factors)
        self._input: dict[str, torch.Tensor] = {}
        self.values = nn.Parameter(torch.zeros(mask.k + sum(factors)))

    def begin(self, change: torch.Tensor, draw: Draw) -> None:
        self._input = {}  # until the inputs are taken, the entries are the plain changes
        with torch.no_grad():
            self.values.zero_()
            self.values[: self.size].copy_(change)
            self._write_all()
        inputs, factors = {}, []
        for slot in self._tensors:
            if slot.name in self._factor_at:
                weight = slot.tensor.detach().float().clone()
                rows = weight.t().contiguous() if is_conv1d(slot.module) else weight
                down = draw_down(draw, slot.name, rows, self.bottleneck, self.activation)
                inputs[slot.name] = rows
                factors += [down.reshape(-1), torch.zeros(down.numel())]
        with torch.no_grad():
            self.values[self.size :].copy_(torch.cat(factors))
        self._input = inputs

    def entry(self, name: str) -> torch.Tensor:
        direct = super().entry(name)
        if name not in self._input:
            return direct
        pieces = self._chunks.get(self.values)
        at, pattern = self._factor_at[name], self._patterns[name]
        down = pieces[at].view(-1, self.bottleneck)
        up = pieces[at + 1].view(self.bottleneck, -1)
        with full_precision(self.values):
            hidden = self.activation(self._input[name] @ down)
        rows, columns = pattern.rows.long(), pattern.cols.long()
        return direct + (hidden[rows] * up.t()[columns]).sum(1)

    def change(self) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.entry(slot.name) for slot in self._tensors])
