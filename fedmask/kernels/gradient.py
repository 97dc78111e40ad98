"""The gradient of the trained entries of one weight, and the choice of how to compute it."""

from __future__ import annotations

from typing import Literal

import torch

from fedmask.errors import FedmaskError, unknown
from fedmask.kernels.pattern import Pattern

Kernel = Literal["auto", "dense", "sampled"]
"""How a weight gradient is computed: ``dense`` product and gather, ``sampled`` entries only, or ``auto``."""

_KERNELS = ("auto", "dense", "sampled")


def available_kernels() -> tuple[str, ...]:
    """The kernels that this process can run on a CPU."""
    return ("dense",)


def choose_kernel(tokens: int, rows: int, cols: int, k: int, kernel: str = "auto", threads: int = 1) -> str:
    """``dense`` or ``sampled``."""
    if kernel not in _KERNELS:
        raise FedmaskError(unknown("kernel", kernel, _KERNELS))
    return "dense" if kernel == "auto" else kernel


def dense_weight_gradient(grad_output: torch.Tensor, inputs: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The plain reference: the whole product ``grad_output^T inputs``, of which the entries are kept.

    ``grad_output`` is [T, rows], ``inputs`` [T, cols], on any device. Half-precision values are widened
    first, so that products and sums are float32. Returns float32[k] (float64[k] for float64 arguments) in
    the pattern's order.
    """
    wide = torch.float64 if torch.float64 in (grad_output.dtype, inputs.dtype) else torch.float32
    with torch.autocast(grad_output.device.type, enabled=False):
        product = grad_output.to(wide).t() @ inputs.to(wide)
        here = pattern.to(product.device)
        return product.view(-1)[here.rows.to(torch.int64) * pattern.shape[1] + here.cols]


def sampled_weight_gradient(
    grad_output: torch.Tensor, inputs: torch.Tensor, pattern: Pattern, kernel: Kernel = "auto"
) -> torch.Tensor:
    """``result[j] = sum_t grad_output[t, rows[j]] * inputs[t, cols[j]]``, in the pattern's order."""
    if grad_output.shape[0] != inputs.shape[0] or pattern.shape != (grad_output.shape[1], inputs.shape[1]):
        found = f"{list(grad_output.shape)} and {list(inputs.shape)} for {pattern.shape}"
        raise FedmaskError(f"a weight gradient needs [T, outputs] and [T, inputs], found {found}")
    choose_kernel(len(inputs), *pattern.shape, pattern.k, kernel)
    return dense_weight_gradient(grad_output, inputs, pattern)
