"""SampledLinear against torch's own linear layer: same outputs, same gradients, less saved."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fedmask.kernels import Pattern, SampledLinear, WeightLayout, available_kernels

KERNELS = available_kernels()
LAYOUTS: tuple[WeightLayout, ...] = ("linear", "conv1d")


class Case:
    """One layer with k trained entries, and what torch's dense autograd says about it."""

    def __init__(
        self,
        layout: WeightLayout = "linear",
        k: int = 40,
        lead: tuple[int, ...] = (6, 11),
        dtype: torch.dtype = torch.float32,
        outputs: int = 24,
        inputs: int = 33,
    ) -> None:
        gen = torch.Generator().manual_seed(7)
        shape = (outputs, inputs) if layout == "linear" else (inputs, outputs)
        self.layout: WeightLayout = layout
        self.weight = torch.randn(shape, generator=gen).to(dtype)
        self.bias = torch.randn(outputs, generator=gen).to(dtype).requires_grad_()
        self.x = torch.randn(*lead, inputs, generator=gen).to(dtype).requires_grad_()
        self.flat = torch.randperm(outputs * inputs, generator=gen)[:k].sort().values
        self.pattern = Pattern.from_flat(self.flat, shape, layout)
        self.values = self.weight.view(-1)[self.flat].float().requires_grad_()
        self.upstream = torch.randn(*lead, outputs, generator=gen)

    def apply(self, kernel: str = "auto") -> torch.Tensor:
        out = SampledLinear.apply(
            self.x, self.weight, self.bias, self.values, self.pattern, self.layout, kernel
        )
        assert isinstance(out, torch.Tensor)
        return out

    def dense(self, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.x, weight if self.layout == "linear" else weight.t(), self.bias)

    def expected(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The output, and the gradients of x, bias and values, by torch's own layer."""
        weight = self.weight.clone().requires_grad_()
        y = self.dense(weight)
        gx, gb, gw = torch.autograd.grad(y, (self.x, self.bias, weight), self.upstream.to(y.dtype))
        return y, (gx, gb, gw.reshape(-1)[self.flat].float())


def close(found: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lead", [(66,), (6, 11), (2, 3, 5), (0,), (3, 0)])
def test_output_and_gradients_are_those_of_the_dense_layer(
    kernel: str, layout: WeightLayout, lead: tuple[int, ...]
) -> None:
    case = Case(layout, lead=lead)
    y = case.apply(kernel)
    expected, gradients = case.expected()
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y, (case.x, case.bias, case.values), case.upstream)
    for one, other in zip(found, gradients, strict=True):
        close(one, other)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_trained_entry_is_no_special_case(kernel: str, layout: WeightLayout) -> None:
    case = Case(layout, k=0)
    y = case.apply(kernel)
    expected, (gx, gb, _) = case.expected()
    assert torch.equal(y, expected)
    fx, fb, fv = torch.autograd.grad(y, (case.x, case.bias, case.values), case.upstream)
    close(fx, gx)
    close(fb, gb)
    assert fv.shape == (0,) and fv.dtype == torch.float32


@pytest.mark.parametrize("kernel", KERNELS)
def test_non_contiguous_inputs_and_gradients(kernel: str) -> None:
    case = Case(lead=(6, 11))
    case.x = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not case.x.is_contiguous()
    case.upstream = case.upstream.transpose(0, 1).contiguous().transpose(0, 1)
    _, gradients = case.expected()
    found = torch.autograd.grad(case.apply(kernel), (case.x, case.bias, case.values), case.upstream)
    for one, other in zip(found, gradients, strict=True):
        close(one, other)
    # sum() sends back a gradient whose strides are all zero.
    total = torch.autograd.grad(case.apply(kernel).sum(), case.values)[0]
    case.upstream = torch.ones_like(case.upstream)
    close(total, case.expected()[1][2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_in_double_precision(layout: WeightLayout) -> None:
    case = Case(layout, k=5, lead=(2, 3), dtype=torch.float64, outputs=3, inputs=4)
    values = case.values.detach().double().requires_grad_()

    def layer(x: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weight = case.weight.clone()
        weight.view(-1)[case.flat] = values.detach()
        out = SampledLinear.apply(x, weight, bias, values, case.pattern, layout, "dense")
        assert isinstance(out, torch.Tensor)
        return out

    assert torch.autograd.gradcheck(layer, (case.x, case.bias, values))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kernel: str, reentrant: bool) -> None:
    case = Case()

    def block(x: torch.Tensor) -> torch.Tensor:
        out = SampledLinear.apply(
            torch.tanh(x), case.weight, case.bias, case.values, case.pattern, "linear", kernel
        )
        assert isinstance(out, torch.Tensor)
        return out

    wanted = torch.autograd.grad(block(case.x), (case.x, case.bias, case.values), case.upstream)
    checkpoint(block, case.x, use_reentrant=reentrant).backward(case.upstream)
    for leaf, gradient in zip((case.x, case.bias, case.values), wanted, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_computes_in_bf16_and_returns_each_leaf_in_its_own_precision(
    kernel: str, layout: WeightLayout
) -> None:
    case = Case(layout)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.apply(kernel)
        expected, gradients = case.expected()
        inside = torch.autograd.grad(y, (case.x, case.bias, case.values), case.upstream.bfloat16(), True)
    outside = torch.autograd.grad(y, (case.x, case.bias, case.values), case.upstream.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    for one, same, other in zip(inside, outside, gradients, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, same)
        close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bf16_layer_gives_float32_gradients_to_its_float32_values(kernel: str) -> None:
    case = Case(dtype=torch.bfloat16)
    gx, gb, gv = torch.autograd.grad(
        case.apply(kernel), (case.x, case.bias, case.values), case.upstream.bfloat16()
    )
    assert (gx.dtype, gb.dtype, gv.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide = case.upstream.bfloat16().double().flatten(0, 1).t() @ case.x.detach().double().flatten(0, 1)
    close(gv, wide.view(-1)[case.flat].float())


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket.__name__)
        self.count["product"] += name in {"mm", "addmm", "bmm", "matmul", "linear"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "extra"), [(k, int(k == "dense")) for k in KERNELS])
def test_number_of_dense_products(layout: WeightLayout, kernel: str, extra: int) -> None:
    case = Case(layout)
    with Products() as products:
        y = case.apply(kernel)
        assert products.count["product"] == 1
        y.backward(case.upstream)
    assert products.count["product"] == 2 + extra


def saved(y: torch.Tensor) -> list[int]:
    """Where the tensors that a node keeps for its backward pass live."""
    assert y.grad_fn is not None
    return [t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None]


def test_only_what_the_backward_pass_needs_is_saved_and_never_a_copy() -> None:
    case = Case()
    assert sorted(saved(case.apply())) == sorted([case.x.data_ptr(), case.weight.data_ptr()])
    case.x.requires_grad_(False)
    assert saved(case.apply()) == [case.x.data_ptr()]
    case.x.requires_grad_(True)
    case.values.requires_grad_(False)
    assert saved(case.apply()) == [case.weight.data_ptr()]


def test_gradients_that_nobody_asked_for_are_not_computed() -> None:
    case = Case()
    case.x.requires_grad_(False)
    case.bias.requires_grad_(False)
    with Products() as products:
        case.apply("dense").backward(case.upstream)
    assert products.count["product"] == 2 and case.bias.grad is None and case.x.grad is None


def test_without_bias() -> None:
    case = Case()
    y = SampledLinear.apply(case.x, case.weight, None, case.values, case.pattern, "linear", "auto")
    assert isinstance(y, torch.Tensor)
    assert torch.equal(y, functional.linear(case.x, case.weight))
    found = torch.autograd.grad(y, case.values, case.upstream)[0]
    close(found, case.expected()[1][2])
