"""The gradient of the trained entries of one weight, and the choice of how to compute it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch

from fedmask.errors import FedmaskError, unknown
from fedmask.kernels.pattern import Pattern

Kernel = Literal["auto", "dense", "sampled"]
"""How a weight gradient is computed: ``dense`` product and gather, ``sampled`` entries only, or ``auto``."""

_KERNELS = ("auto", "dense", "sampled")
SETTLED = ("dense", "sampled")
"""What the parties of a run agree on: ``sampled`` stands for the sampled kernel where it is cheaper."""


# Costs of a token, in multiplications of the dense product (experiments/benchmarks/kernels.py measures them):
# of a feature that is transposed and of an entry that is summed; and what the dense product pays for each
# result that it writes, in tokens.
FEATURE_COST = 16
ENTRY_COST = 4
RESULT_TOKENS = 64
BLOCK_TOKENS = 32


@cache
def _native() -> tuple[ModuleType | None, str]:
    """The compiled kernel's module, or why there is none. Imported on first use: numba may be absent."""
    try:
        return import_module("fedmask.kernels.native"), ""
    except ImportError as error:  # not installed, or not made for this NumPy
        return None, f"numba cannot be imported ({error}); pip install numba"


def available_kernels() -> tuple[str, ...]:
    """The kernels that this process can run: ``dense`` everywhere, ``sampled`` (CPU) where numba is there.

    The first call imports numba and compiles. A run that is to be repeated bit for bit records the answer.
    """
    return ("dense", "sampled") if _native()[0] else ("dense",)


def choose_kernel(
    tokens: int, rows: int, cols: int, k: int, kernel: str = "auto", threads: int = 1
) -> Literal["dense", "sampled"]:
    """The kernel for one weight gradient: ``kernel`` itself, or for ``auto`` the cheaper one by a fixed rule.

    The arguments alone decide, not the machine and no measurement, so that a run can be repeated bit for bit:
    ``tokens`` T, the weight's ``rows`` (outputs) and ``cols`` (inputs), its ``k`` trained entries and the
    ``threads``. Raises FedmaskError for an unknown kernel and for less than one thread.
    """
    if kernel not in _KERNELS:
        raise FedmaskError(unknown("kernel", kernel, _KERNELS))
    if threads < 1:
        raise FedmaskError(f"a weight gradient needs at least 1 thread, found {threads}")
    if kernel != "auto":
        return "dense" if kernel == "dense" else "sampled"
    # A thread takes whole blocks, so a few tokens on many threads cost as much as a block on each.
    block_tokens = -(-tokens // (BLOCK_TOKENS * threads)) * BLOCK_TOKENS * threads
    sampled = block_tokens * (FEATURE_COST * (rows + cols) + ENTRY_COST * k)
    dense = (tokens + RESULT_TOKENS) * rows * cols
    return "sampled" if sampled < dense else "dense"


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context in which products keep their arguments' precision; costs nothing where that is so already."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def dense_weight_gradient(grad_output: torch.Tensor, inputs: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The plain reference: the whole product ``grad_output^T inputs``, of which the entries are kept.

    ``grad_output`` is [T, rows], ``inputs`` [T, cols], on any device. Half-precision values are widened
    first, so that products and sums are float32. Returns float32[k] (float64[k] for float64 arguments) in
    the pattern's order.
    """
    wide = torch.float64 if torch.float64 in (grad_output.dtype, inputs.dtype) else torch.float32
    with without_autocast(grad_output.device.type):
        product = grad_output.to(wide).t() @ inputs.to(wide)
        here = pattern.to(product.device)
        return product.view(-1)[here.rows.to(torch.int64) * pattern.shape[1] + here.cols]


def sampled_weight_gradient(
    grad_output: torch.Tensor,
    inputs: torch.Tensor,
    pattern: Pattern,
    kernel: Kernel = "auto",
    threads: int | None = None,
) -> torch.Tensor:
    """``result[j] = sum_t grad_output[t, rows[j]] * inputs[t, cols[j]]``: a weight's gradient at k entries.

    ``grad_output`` is [T, outputs], ``inputs`` [T, inputs], float32 or bfloat16 (or one of each), contiguous
    or not. Returns float32[k] in the pattern's order, summed in float32. ``kernel`` is as in
    ``choose_kernel``; ``auto`` takes the dense product where numba is not installed, on other devices and in
    float64 (whose result is float64). ``threads`` (default: torch's) cuts the sum into parts: the same number
    gives the same bits.

    Raises FedmaskError for shapes that do not fit, and for ``sampled`` where it cannot run.
    """
    tokens = inputs.shape[0]
    if grad_output.shape[0] != tokens or pattern.shape != (grad_output.shape[1], inputs.shape[1]):
        found = f"{list(grad_output.shape)} and {list(inputs.shape)} for a weight of {pattern.shape}"
        raise FedmaskError(f"a weight gradient needs [T, outputs] and [T, inputs], found {found}")
    threads = torch.get_num_threads() if threads is None else threads
    chosen = choose_kernel(tokens, *pattern.shape, pattern.k, kernel, threads)
    if chosen == "sampled":
        why_not = _unsuited(grad_output) or _unsuited(inputs)
        native, why_not = (None, why_not) if why_not else _native()
        if native:
            result: torch.Tensor = native.sampled_gradient(grad_output, inputs, pattern, threads)
            return result
        if kernel == "sampled":
            raise FedmaskError(f"the sampled kernel cannot run: {why_not}; use kernel 'auto' or 'dense'")
    return dense_weight_gradient(grad_output, inputs, pattern)


def _unsuited(matrix: torch.Tensor) -> str:
    """Why the sampled kernel cannot read a matrix; empty if it can."""
    if matrix.device.type != "cpu":
        return f"it needs the CPU, found a matrix on {matrix.device}"
    return "it sums in float32, found float64" if matrix.dtype == torch.float64 else ""
