"""Texts as flat arrays of token ids: no Python object a token, and none a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedmask.tasks.columns import LABEL, TEXT, TEXT_PAIR

if TYPE_CHECKING:
    from datasets import Dataset

# Rows whose Python token lists exist at the same time.
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Tokenized:
    """n tokenized rows; the tokens of row i are ``tokens[offsets[i]:offsets[i + 1]]``.

    ``tokens`` int32 [total], ``offsets`` int64 [n + 1], ``token_types`` uint8 [total] or None for a
    tokenizer that makes none, ``labels`` int64 [n] class ids or float32 [n] values.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    token_types: npt.NDArray[np.uint8] | None
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, special tokens included; int64 [n]."""
        return np.diff(self.offsets)

    @property
    def bytes(self) -> int:
        """Memory of the arrays."""
        types = 0 if self.token_types is None else self.token_types.nbytes
        return self.tokens.nbytes + self.offsets.nbytes + types + self.labels.nbytes

    def select(self, rows: npt.NDArray[np.integer[Any]]) -> Tokenized:
        """The given rows (int [m], any order, repeats allowed) as copies."""
        where, lengths = self.positions(rows)
        types = None if self.token_types is None else self.token_types[where]
        return Tokenized(self.tokens[where], _offsets(lengths), types, self.labels[rows])

    def positions(
        self, rows: npt.NDArray[np.integer[Any]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the rows' tokens are: int64 [their total], row after row; and their lengths."""
        starts = self.offsets[rows]
        lengths = self.offsets[np.asarray(rows) + 1] - starts
        first = _offsets(lengths)[:-1]
        return np.arange(lengths.sum()) + np.repeat(starts - first, lengths), lengths


def tokenize(rows: Dataset, tokenizer: Any, max_tokens: int) -> Tokenized:
    """All rows of a task's split through a Hugging Face tokenizer, cut to ``max_tokens``.

    The limit counts special tokens; of a pair the longer text is cut first. To tokenize a part,
    select it first: ``tokenize(data.dev.select(chosen), ...)``.
    """
    return tokenize_rows(rows, np.arange(len(rows)), tokenizer, max_tokens)


def tokenize_rows(data: Dataset, rows: npt.NDArray[np.int64], tokenizer: Any, max_tokens: int) -> Tokenized:
    """The given rows (int64 [m]) of a split; the same as ``tokenize(data.select(rows), ...)``.

    Without the data set in between, whose making costs more than tokenizing a client's few rows.
    """
    paired = TEXT_PAIR in data.column_names
    columns = [TEXT, TEXT_PAIR, LABEL] if paired else [TEXT, LABEL]
    tokens, types, lengths, labels = [], [], [], []
    for start in range(0, len(rows), _CHUNK):
        chunk = _take(data, columns, rows[start : start + _CHUNK])
        encoded = tokenizer(
            chunk[TEXT],
            chunk[TEXT_PAIR] if paired else None,
            truncation=True,
            max_length=max_tokens,
            padding=False,
            return_attention_mask=False,
        )
        tokens.append(_flat(encoded["input_ids"], np.int32))
        lengths.append(np.fromiter(map(len, encoded["input_ids"]), np.int64))
        if "token_type_ids" in encoded:
            types.append(_flat(encoded["token_type_ids"], np.uint8))
        labels.append(np.asarray(chunk[LABEL]))
    dtype = np.float32 if data.features[LABEL].dtype.startswith("float") else np.int64
    found: npt.NDArray[Any] = np.concatenate(labels).astype(dtype) if labels else np.empty(0, dtype)
    return Tokenized(
        np.concatenate(tokens) if tokens else np.empty(0, np.int32),
        _offsets(np.concatenate(lengths) if lengths else np.empty(0, np.int64)),
        np.concatenate(types) if types else None,
        found,
    )


def _take(data: Dataset, columns: list[str], rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {name: values for name, values in data[rows].items() if name in columns}


def _flat(lists: Iterable[Iterable[int]], dtype: Any) -> npt.NDArray[Any]:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype)


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
