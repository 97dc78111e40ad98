"""Which entries of one weight matrix are trained, as (output, input) pairs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedmask.errors import FedmaskError, unknown

WeightLayout = Literal["linear", "conv1d"]
"""How a weight is stored: ``linear`` is [outputs, inputs] (``nn.Linear``), ``conv1d`` is [inputs, outputs]
(``transformers.pytorch_utils.Conv1D``)."""

_LAYOUTS = ("linear", "conv1d")


def check_layout(layout: str) -> None:
    """Refuse the name of a weight layout that is neither ``linear`` nor ``conv1d``."""
    if layout not in _LAYOUTS:
        raise FedmaskError(unknown("weight layout", layout, _LAYOUTS))


@dataclass(frozen=True, eq=False)
class Pattern:
    """The k trained entries of a weight with ``shape[0]`` outputs and ``shape[1]`` inputs.

    ``rows`` int32[k] is each entry's output, ``cols`` int32[k] its input. The pairs lie in strictly
    increasing order, by (row, col) or by (col, row), which is the order in which gradients are returned; so
    no entry can occur twice. Fast kernels read memory at these numbers unchecked: they are checked here.

    Raises FedmaskError for other dtypes or lengths, for numbers outside the shape, and for any other order.
    """

    rows: torch.Tensor
    cols: torch.Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        for name, indices, size in (("rows", self.rows, self.shape[0]), ("cols", self.cols, self.shape[1])):
            if indices.dtype != torch.int32 or indices.dim() != 1:
                found = f"{indices.dtype}{list(indices.shape)}"
                raise FedmaskError(
                    f"a pattern's {name} must be int32[k], found {found}; build it with from_flat"
                )
            if len(indices) and (indices.min() < 0 or indices.max() >= size):
                found = f"{int(indices.min())} to {int(indices.max())}"
                raise FedmaskError(
                    f"a pattern's {name} must lie in 0 to {size - 1}, found {found}; check the shape"
                )
        if len(self.rows) != len(self.cols):
            found = f"{len(self.rows)} and {len(self.cols)}"
            raise FedmaskError(
                f"a pattern needs as many rows as cols, found {found}; build it with from_flat"
            )
        # Contiguous, because the kernels walk them as plain arrays; a no-op for what from_flat builds.
        object.__setattr__(self, "rows", self.rows.contiguous())
        object.__setattr__(self, "cols", self.cols.contiguous())
        by_rows, by_cols = (self.rows, self.cols, self.shape[1]), (self.cols, self.rows, self.shape[0])
        if not (_increasing(*by_rows) or _increasing(*by_cols)):
            raise FedmaskError(
                "a pattern's entries must be strictly increasing, found a repeated or unsorted one; "
                "sort the flat indices and drop repeats"
            )

    @classmethod
    def from_flat(
        cls,
        indices: torch.Tensor | NDArray[np.int64],
        shape: tuple[int, int],
        layout: WeightLayout = "linear",
    ) -> Pattern:
        """The pattern of sorted flat ``indices`` int64[k] into a weight of ``shape``.

        The shape is the stored weight's own: [outputs, inputs] for ``linear``, [inputs, outputs] for
        ``conv1d``. Raises FedmaskError for indices outside the weight, unsorted or repeated, and for an
        unknown layout.
        """
        check_layout(layout)
        flat = indices.numpy(force=True) if isinstance(indices, torch.Tensor) else np.asarray(indices)
        if flat.dtype != np.int64 or flat.ndim != 1:
            found = f"{flat.dtype}{list(flat.shape)}"
            raise FedmaskError(f"flat indices must be int64[k], found {found}; convert them first")
        size = shape[0] * shape[1]
        if len(flat) and (flat.min() < 0 or flat.max() >= size):
            found = f"{int(flat.min())} to {int(flat.max())}"
            raise FedmaskError(f"flat indices must lie in 0 to {size - 1}, found {found}; check the shape")
        width = max(shape[1], 1)
        major, minor = np.divmod(flat, width)
        by_rows = cls(_int32(major), _int32(minor), shape)
        return by_rows if layout == "linear" else by_rows.transposed

    @property
    def k(self) -> int:
        """The number of trained entries."""
        return self.rows.shape[0]

    @property
    def transposed(self) -> Pattern:
        """The same entries in the same order with outputs and inputs swapped; shares the index arrays."""
        return Pattern(self.cols, self.rows, (self.shape[1], self.shape[0]))

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern on another device (itself where nothing moves)."""
        if self.rows.device == torch.device(device):
            return self
        moved = copy.copy(self)  # not made anew: checked once is enough, and on a GPU checking means waiting
        object.__setattr__(moved, "rows", self.rows.to(device))
        object.__setattr__(moved, "cols", self.cols.to(device))
        return moved

    def __deepcopy__(self, memo: dict[int, object]) -> Pattern:
        # Never written after it is made, so copies of a model share it.
        return self


def _int32(numbers: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.int32))


def _increasing(major: torch.Tensor, minor: torch.Tensor, width: int) -> bool:
    flat = major.to(torch.int64) * width + minor
    return bool((flat[1:] > flat[:-1]).all())
