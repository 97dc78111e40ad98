"""The weight gradient of sparse fine-tuning: k dot products, not a matrix; and the layer that uses it."""

from __future__ import annotations

from fedmask.kernels.embedding import SampledEmbedding, TableRows, is_plain_embedding
from fedmask.kernels.gradient import (
    SETTLED,
    Kernel,
    available_kernels,
    choose_kernel,
    dense_weight_gradient,
    sampled_weight_gradient,
)
from fedmask.kernels.linear import SampledLinear
from fedmask.kernels.pattern import Pattern, WeightLayout

__all__ = [
    "SETTLED",
    "Kernel",
    "Pattern",
    "SampledEmbedding",
    "SampledLinear",
    "TableRows",
    "WeightLayout",
    "available_kernels",
    "choose_kernel",
    "dense_weight_gradient",
    "is_plain_embedding",
    "sampled_weight_gradient",
]
