"""The work of a step, counted: how many matrix products of which kind. No clock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedmask import magnitude_mask, sparsify
from fedmask.space import linear_layers
from fedmask.tuner import tuning_of
from tests.support import batch, loss_of, make_model

_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}


class Products(TorchDispatchMode):
    """Keeps ``(rows, inner, columns)`` of each product of two matrices, and the name of everything called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls.append(str(function))
        if function in _PRODUCTS and args[_PRODUCTS[function]].dim() == 2:
            left, right = args[_PRODUCTS[function] :][:2]
            self.seen.append((left.shape[0], left.shape[1], right.shape[1]))
        return function(*args, **(kwargs or {}))


def products(model: nn.Module, tokens: int) -> tuple[int, int]:
    """Of the backward pass: products over the tokens (dense weight gradients), and input gradients."""
    loss = loss_of(model)
    with Products() as found:
        loss.backward()
    dense = sum(inner == tokens for _, inner, _ in found.seen)
    inputs = sum(rows == tokens for rows, inner, _ in found.seen if inner != tokens)
    return dense, inputs


def counted(prepare: Callable[[nn.Module], nn.Module]) -> tuple[int, int, int]:
    """Dense weight gradients, input gradients, and the number of the linear layers in the blocks."""
    model = make_model("bert")
    layers = len(list(linear_layers(model)))
    tokens = batch()["input_ids"].numel()
    assert layers >= 12 and tokens not in {side for p in model.parameters() for side in p.shape}
    return *products(prepare(model), tokens), layers


def sampled(model: nn.Module, kernel: str = "sampled") -> nn.Module:
    mask = magnitude_mask(model, 0.05)
    assert len(mask.per_tensor()) == len(list(linear_layers(model)))
    return sparsify(model, mask, kernel=kernel)


def test_a_step_makes_no_dense_weight_gradient() -> None:
    dense, inputs, layers = counted(sampled)
    assert dense == 0
    assert inputs == layers - 3  # nobody needs those of the first query, key and value


def test_the_reference_makes_one_a_layer() -> None:
    dense, inputs, layers = counted(lambda model: sampled(model, "dense"))
    assert (dense, inputs) == (layers, layers - 3)


def test_what_full_fine_tuning_makes() -> None:
    dense, inputs, layers = counted(lambda model: model.requires_grad_(True))
    assert dense >= layers and inputs >= layers


def test_indices_follow_the_model_to_another_device() -> None:
    """No other device is needed to see where they go: ``meta`` holds shapes alone."""
    tuned = sampled(make_model("bert"))
    other = copy.deepcopy(tuned).to("meta")
    tuning_of(other).restore()
    (entries,) = tuning_of(other).trainables
    for index, reference in zip(entries._indices, entries._reference, strict=True):  # type: ignore[call-overload]
        assert index.device.type == reference.device.type == "meta"
    tuning_of(tuned).restore()  # the copy went, the original stayed
    assert next(tuned.parameters()).device.type == "cpu"
