"""Other ways to fine-tune the same model, for comparison in the same harness.

Written by us from the papers, or used from their published package (``pip install 'fedmask[bench]'``).
"""

from __future__ import annotations

from experiments.competitors.base import Contender
from experiments.competitors.dense_mask import dense_with_mask
from experiments.competitors.packages import lora, shira
from experiments.competitors.plain import bitfit, floor, full
from experiments.competitors.sampled import sampled

__all__ = [
    "CONTENDERS",
    "Contender",
    "bitfit",
    "dense_with_mask",
    "floor",
    "full",
    "lora",
    "sampled",
    "shira",
]

CONTENDERS = {
    "floor": floor,
    "fedmask": sampled,
    "bitfit": bitfit,
    "lora": lora,
    "shira": shira,
    "dense-mask": dense_with_mask,
    "full": full,
}
"""Name -> a function that prepares a backbone. ``floor`` comes first: the others are divided by it."""
