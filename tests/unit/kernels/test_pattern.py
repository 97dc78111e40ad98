"""Which output and input each flat index of a weight means, and what is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from fedmask.errors import FedmaskError
from fedmask.kernels import Pattern


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_linear_weights_are_outputs_by_inputs() -> None:
    pattern = Pattern.from_flat(np.array([1, 3, 5]), (2, 3))
    assert pattern.rows.tolist() == [0, 1, 1] and pattern.cols.tolist() == [1, 0, 2]
    assert pattern.shape == (2, 3) and pattern.k == 3
    assert pattern.rows.dtype == pattern.cols.dtype == torch.int32


def test_conv1d_weights_are_inputs_by_outputs() -> None:
    pattern = Pattern.from_flat(torch.tensor([1, 3, 5]), (2, 3), layout="conv1d")
    assert pattern.rows.tolist() == [1, 0, 2] and pattern.cols.tolist() == [0, 1, 1]
    assert pattern.shape == (3, 2)


def test_transposing_twice_changes_nothing() -> None:
    pattern = Pattern.from_flat(np.array([0, 2, 4]), (2, 3))
    again = pattern.transposed.transposed
    assert torch.equal(again.rows, pattern.rows) and torch.equal(again.cols, pattern.cols)
    assert again.shape == pattern.shape and pattern.transposed.shape == (3, 2)


def test_no_entries_and_no_size() -> None:
    assert Pattern.from_flat(np.array([], dtype=np.int64), (2, 3)).k == 0
    assert Pattern.from_flat(np.array([], dtype=np.int64), (0, 0), "conv1d").shape == (0, 0)


def test_indices_that_cannot_be_written_to_are_taken() -> None:
    indices = np.array([0, 5])
    indices.setflags(write=False)
    assert Pattern.from_flat(indices, (2, 3)).cols.tolist() == [0, 2]


def test_copies_of_a_model_share_the_pattern_and_files_keep_it() -> None:
    pattern = Pattern.from_flat(np.array([0, 5]), (2, 3))
    assert copy.deepcopy({"layer": pattern})["layer"] is pattern
    assert pattern.to("cpu") is pattern
    read = pickle.loads(pickle.dumps(pattern))
    assert torch.equal(read.rows, pattern.rows) and read.shape == pattern.shape


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (np.array([1, 1]), "repeated or unsorted"),
        (np.array([2, 1]), "repeated or unsorted"),
        (np.array([0, 6]), "in 0 to 5, found 0 to 6"),
        (np.array([-1, 2]), "in 0 to 5, found -1 to 2"),
        (np.array([0, 1], dtype=np.int32), "int64"),
        (np.array([[0, 1]]), "int64"),
    ],
)
def test_flat_indices_that_are_refused(indices: np.ndarray, words: str) -> None:
    with pytest.raises(FedmaskError, match=words):
        Pattern.from_flat(indices, (2, 3))


@pytest.mark.parametrize(
    ("rows", "cols", "words"),
    [
        (int32(0, 2), int32(0, 0), "rows must lie in 0 to 1, found 0 to 2"),
        (int32(0, 1), int32(0, -1), "cols must lie in 0 to 2, found -1 to 0"),
        (int32(0, 1, 1), int32(0, 1), "found 3 and 2"),
        (torch.tensor([0, 1]), int32(0, 1), "rows must be int32"),
        (int32(0, 1, 0), int32(1, 0, 2), "unsorted"),
        (int32(1, 1), int32(2, 2), "repeated"),
    ],
)
def test_pairs_that_are_refused(rows: torch.Tensor, cols: torch.Tensor, words: str) -> None:
    with pytest.raises(FedmaskError, match=words):
        Pattern(rows, cols, (2, 3))


def test_an_unknown_layout_is_named_with_the_nearest() -> None:
    with pytest.raises(FedmaskError, match="'conv'; the nearest is 'conv1d'"):
        Pattern.from_flat(np.array([0]), (2, 3), layout="conv")  # type: ignore[arg-type]
