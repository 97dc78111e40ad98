"""Dropout whose random numbers cost little: four elements of a tensor share one 64-bit number.

PyTorch draws one number an element from the Mersenne twister, which on a CPU takes longer than a layer's
matrix product in bfloat16. The numbers here come from NumPy's SFC64, seeded once a call from PyTorch's own
generator: so ``torch.manual_seed`` and ``torch.random.fork_rng`` decide the result, and a forward pass
that is repeated for gradient checkpointing meets the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_LEVELS = 1 << 16  # a probability is a whole number of 65536ths


def dropout(x: torch.Tensor, probability: float, training: bool = True) -> torch.Tensor:
    """``x`` (any shape) with elements set to zero with ``probability``, the others scaled to keep the mean.

    The probability is rounded to 1/65536. Not on a CPU: PyTorch's own function.
    """
    level = round(probability * _LEVELS)
    if not training or level == 0:
        return x
    if x.device.type != "cpu" or level == _LEVELS:
        return functional.dropout(x, probability)
    seed = int(torch.randint(1 << 62, ()))
    count = x.numel()
    drawn = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return x * _factors(drawn >= level, _LEVELS / (_LEVELS - level), x.dtype).view(x.shape)


def _factors(keep: np.ndarray, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``scale`` (rounded to ``dtype``) where ``keep`` (bool [n]), else zero."""
    if dtype == torch.bfloat16:  # NumPy has no such type: its bits are those of a number of two bytes
        bits = int(torch.tensor(scale, dtype=dtype).view(torch.int16))
        return torch.from_numpy(np.multiply(keep, bits, dtype=np.int16)).view(dtype)
    return torch.from_numpy(np.multiply(keep, scale, dtype=np.float32)).to(dtype)


class Dropout(nn.Module):
    """``dropout`` as a layer, in place of ``nn.Dropout``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (any shape) with elements dropped while training."""
        return dropout(x, self.p, self.training)
