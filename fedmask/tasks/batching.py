"""Batches of rows of similar length, and their padded tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedmask.errors import ConfigError
from fedmask.tasks.tokenized import Tokenized

if TYPE_CHECKING:
    import torch


def batches(data: Tokenized, batch_size: int, rng: np.random.Generator | None) -> list[npt.NDArray[np.int64]]:
    """One epoch: row numbers (int64, at most ``batch_size`` each) in which every row is once.

    Rows are sorted by length, then cut. With ``rng``, rows of equal length come in random order and
    so do the batches; without, order is by length, then row: the same at each call. One batch, the
    one of the longest rows, may be smaller. Raises ConfigError for a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected a number at least 1, found {batch_size}")
    ties = np.arange(len(data)) if rng is None else rng.permutation(len(data))
    order = np.lexsort((ties, data.lengths))
    found = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if rng is None:
        return found
    return [found[number] for number in rng.permutation(len(found))]


def collate(data: Tokenized, rows: npt.NDArray[np.integer[Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """The model's inputs for m rows, padded on the right to the longest of them (L tokens).

    ``input_ids``, ``attention_mask`` and, if the tokenizer makes them, ``token_type_ids``: int64
    [m, L]; ``labels``: int64 or float32 [m].
    """
    import torch

    where, lengths = data.positions(rows)
    filled = np.arange(lengths.max(initial=0)) < lengths[:, None]
    tokens = np.full(filled.shape, pad_id, np.int64)
    tokens[filled] = data.tokens[where]
    inputs = {"input_ids": tokens, "attention_mask": filled.astype(np.int64)}
    if data.token_types is not None:
        types = np.zeros(filled.shape, np.int64)
        types[filled] = data.token_types[where]
        inputs["token_type_ids"] = types
    inputs["labels"] = data.labels[rows]
    return {name: torch.from_numpy(values) for name, values in inputs.items()}
