"""A linear layer on a frozen weight of which k entries are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedmask.kernels.gradient import Kernel, sampled_weight_gradient, without_autocast
from fedmask.kernels.pattern import Pattern, WeightLayout


class SampledLinear(torch.autograd.Function):
    """``y = x W^T + b`` whose backward pass computes the gradient of W's trained entries only.

    Call ``SampledLinear.apply(x, weight, bias, values, pattern, layout, kernel)``:

    - ``x`` [..., inputs], any number of leading dimensions, contiguous or not.
    - ``weight`` as the layer stores it (``layout`` says which way round), without gradient. It must already
      hold ``values`` at the pattern's entries, and must not change before the backward pass.
    - ``bias`` [outputs] or None.
    - ``values`` float32[k]: not read here, present so that autograd has somewhere to put their gradient.
    - ``pattern`` the trained entries, ``layout`` "linear" or "conv1d", ``kernel`` "auto", "dense" or
      "sampled".

    Returns y [..., outputs]. Nothing of the weight's size is made, but for the dense kernel's product and,
    under autocast, the weight in the gradient's precision; both are freed at once. Saved for the backward
    pass: ``x`` if the values need their gradient, ``weight`` (itself) if ``x`` does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        values: torch.Tensor,
        pattern: Pattern,
        layout: WeightLayout,
        kernel: Kernel,
    ) -> torch.Tensor:
        needs_x, _, _, needs_values, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_values and pattern.k else None, weight if needs_x else None)
        ctx.pattern, ctx.layout, ctx.kernel = pattern, layout, kernel
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.values_dtype, ctx.values_device = values.dtype, values.device
        return functional.linear(x, weight if layout == "linear" else weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, _, needs_bias, needs_values, *_ = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        grad_x = grad_bias = grad_values = None
        # Autocast has had its say in the forward pass: from here on the incoming gradient's precision
        # decides, as it does for torch's own linear layer, whatever surrounds the call of backward().
        with without_autocast(grad_output.device.type):
            grad = grad_output.reshape(-1, grad_output.shape[-1])
            if needs_x:
                matrix = weight.to(grad.dtype)
                matrix = matrix if ctx.layout == "linear" else matrix.t()
                grad_x = (grad @ matrix).to(ctx.x_dtype).reshape(ctx.x_shape)
            if needs_bias:
                grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
            if needs_values:
                if x is None:
                    grad_values = torch.zeros(0, dtype=ctx.values_dtype, device=ctx.values_device)
                else:
                    tokens = x.reshape(-1, x.shape[-1])
                    sampled = sampled_weight_gradient(grad, tokens, ctx.pattern, ctx.kernel)
                    grad_values = sampled.to(ctx.values_dtype)
        return grad_x, None, grad_bias, grad_values, None, None, None
