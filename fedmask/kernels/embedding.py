"""An embedding on a frozen table of which k entries are trained: the gradient by the rows that were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class TableRows:
    """The trained entries of a table [rows, width], row by row.

    Row r's are those numbered ``starts[r]`` to ``starts[r + 1]`` (int64 [rows + 1]); ``cols`` int64[k] says
    where in its row each lies.
    """

    starts: torch.Tensor
    cols: torch.Tensor

    @classmethod
    def from_flat(cls, indices: NDArray[np.int64], shape: Sequence[int]) -> TableRows:
        """Of sorted flat ``indices`` int64[k] into a table of ``shape``."""
        rows, cols = np.divmod(indices, shape[1])
        starts = np.searchsorted(rows, np.arange(shape[0] + 1))
        return cls(torch.from_numpy(starts), torch.from_numpy(cols))

    def to(self, device: torch.device) -> TableRows:
        """The same on another device (itself where nothing moves)."""
        if self.cols.device == device:
            return self
        return TableRows(self.starts.to(device), self.cols.to(device))

    def __deepcopy__(self, memo: dict[int, object]) -> TableRows:
        return self  # never written after it is made, so copies of a model share it


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether a module reads rows and does nothing else: no norms kept, no gradients scaled."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def rows_gradient(
    grad_output: torch.Tensor, ids: torch.Tensor, rows: TableRows, padding: int | None
) -> torch.Tensor:
    """``result[j] = sum of grad_output[t, cols[j]]`` over the tokens t that read entry j's row.

    ``grad_output`` is [T, width], ``ids`` int64[T]; tokens ``padding`` read without learning. Returns
    float32[k]. Time and memory go with the entries in the rows that were read, never with the table.
    """
    rows = rows.to(grad_output.device)
    first = rows.starts[ids]
    counts = rows.starts[ids + 1] - first
    if padding is not None:
        counts = counts * (ids != padding)
    tokens = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
    # Entry by entry of each token's row: its number is the row's first and its place in the row.
    place = torch.arange(len(tokens), device=ids.device) - (counts.cumsum(0) - counts)[tokens]
    entries = first[tokens] + place
    found = torch.zeros(len(rows.cols), device=grad_output.device)
    return found.index_add_(0, entries, grad_output[tokens, rows.cols[entries]].float())


class SampledEmbedding(torch.autograd.Function):
    """``table[ids]`` whose backward pass computes the gradient of the table's trained entries only.

    Call ``SampledEmbedding.apply(ids, table, values, rows, padding)``: ``ids`` of any shape, ``table``
    [rows, width] already holding ``values`` (float32[k], not read here) at the entries that ``rows`` names.
    Returns [*ids, width]. Saved for the backward pass: ``ids``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids: torch.Tensor,
        table: torch.Tensor,
        values: torch.Tensor,
        rows: TableRows,
        padding: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding = rows, padding
        return functional.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        return None, None, rows_gradient(grad, ids.reshape(-1).long(), ctx.rows, ctx.padding), None, None
