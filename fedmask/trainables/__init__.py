"""What a client trains, each part filling one segment of the flat vector."""

from __future__ import annotations

from fedmask.trainables.adapters import (
    ACTIVATIONS,
    BiasAdapters,
    MaskedWeightAdapters,
    WeightAdapters,
    biases,
    feed_forward_biases,
    feed_forward_layers,
)
from fedmask.trainables.base import Draw, Slot, Trainable, slots_of
from fedmask.trainables.bottleneck import Bottlenecks
from fedmask.trainables.carried import CarriedEntries
from fedmask.trainables.dense import DenseTensors
from fedmask.trainables.lora import LoRA, target_layers
from fedmask.trainables.masked import MaskedEntries
from fedmask.trainables.residual import CarriedMatrices
from fedmask.trainables.whole import WholeTensors

__all__ = [
    "ACTIVATIONS",
    "BiasAdapters",
    "Bottlenecks",
    "CarriedEntries",
    "CarriedMatrices",
    "DenseTensors",
    "Draw",
    "LoRA",
    "MaskedEntries",
    "MaskedWeightAdapters",
    "Slot",
    "Trainable",
    "WeightAdapters",
    "WholeTensors",
    "biases",
    "feed_forward_biases",
    "feed_forward_layers",
    "slots_of",
    "target_layers",
]
