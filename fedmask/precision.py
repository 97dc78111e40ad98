"""In which precision the frozen backbone computes: float32, or bfloat16 around float32 trained values.

Masks, digests, references and exports always come from the stored float32 values. In bfloat16 the backbone's
tensors are rounded once; every trained entry is float32 and is rounded where it is written into the model;
heads stay float32. Whether bfloat16 is faster depends on the CPU: ``auto`` measures it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from fedmask.stored import keep_stored

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def cast(model: nn.Module, precision: Precision) -> nn.Module:
    """Round the parameters of ``model`` (float32) to ``precision``, in place; buffers stay as they are."""
    if precision == "bf16":
        with keep_stored(model):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
    return model
