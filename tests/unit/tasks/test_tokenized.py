"""Tokens, batches and padded tensors."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmask.errors import ConfigError
from fedmask.tasks import Tokenized, batches, collate, tokenize

WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=6)
TEXT = st.lists(WORD, min_size=1, max_size=5).map(" ".join)
# The tokenizer is one for the session: it keeps nothing between examples.
LAW = settings(deadline=None, max_examples=40)


def dataset(texts: list[str], pairs: list[str] | None = None, dtype: str = "int64") -> Dataset:
    columns: dict[str, list[Any]] = {"text": texts} | ({"text_pair": pairs} if pairs else {})
    columns["label"] = [number % 3 for number in range(len(texts))]
    columns["site"] = [None] * len(texts)
    types = {name: Value("string") for name in columns} | {"label": Value(dtype)}
    return Dataset.from_dict(columns, Features(types))


@LAW
@given(st.lists(TEXT, min_size=1, max_size=12))
def test_tokens_decode_to_the_text(tokenizer: Any, texts: list[str]) -> None:
    data = tokenize(dataset(texts), tokenizer, 512)
    for row, text in enumerate(texts):
        tokens = data.tokens[data.offsets[row] : data.offsets[row + 1]]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@LAW
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=10), st.integers(4, 20), st.booleans(), st.data())
def test_tensors_equal_the_tokenizers_own(
    tokenizer: Any,
    plain_tokenizer: Any,
    rows: list[tuple[str, str]],
    limit: int,
    types: bool,
    draw: st.DataObject,
) -> None:
    own = tokenizer if types else plain_tokenizer
    texts, pairs = [list(side) for side in zip(*rows, strict=True)]
    data = tokenize(dataset(texts, pairs), own, limit)
    chosen = np.array(draw.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)))
    expected = own(
        [texts[row] for row in chosen], [pairs[row] for row in chosen],
        truncation=True, max_length=limit, padding=True, return_tensors="pt",
    )  # fmt: skip
    found = collate(data, chosen, own.pad_token_id)
    assert set(found) == {*expected, "labels"} and ("token_type_ids" in found) == types
    for name, values in expected.items():
        assert torch.equal(found[name], values) and found[name].dtype == torch.int64
    assert found["labels"].tolist() == [row % 3 for row in chosen]


@LAW
@given(st.lists(TEXT, min_size=1, max_size=10), st.data())
def test_select_takes_rows_as_they_are(tokenizer: Any, texts: list[str], draw: st.DataObject) -> None:
    whole = tokenize(dataset(texts), tokenizer, 32)
    chosen = draw.draw(st.lists(st.integers(0, len(texts) - 1), max_size=8))
    part = whole.select(np.array(chosen, dtype=np.int64))
    assert same(part, tokenize(dataset(texts).select(chosen), tokenizer, 32))


def same(one: Tokenized, other: Tokenized) -> bool:
    fields = ("tokens", "offsets", "labels", "lengths")
    # No rows, no token types to see.
    types = not len(one) or np.array_equal(one.token_types, other.token_types)  # type: ignore[arg-type]
    return types and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


def test_the_arrays_of_two_rows(tokenizer: Any) -> None:
    data = tokenize(dataset(["ab", "c"], ["d", "ef"]), tokenizer, 16)
    cls, sep = 2, 3
    letter, rest = (lambda c: 4 + ord(c) - 97), (lambda c: 30 + ord(c) - 97)
    first = [cls, letter("a"), rest("b"), sep, letter("d"), sep]
    assert data.tokens.tolist() == [*first, cls, letter("c"), sep, letter("e"), rest("f"), sep]
    assert data.offsets.tolist() == [0, 6, 12] and data.lengths.tolist() == [6, 6] and len(data) == 2
    assert data.token_types is not None and data.token_types.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    kinds = (data.tokens.dtype, data.offsets.dtype, data.token_types.dtype, data.labels.dtype)
    assert kinds == (np.int32, np.int64, np.uint8, np.int64)


def test_long_texts_are_cut_and_values_are_float32(tokenizer: Any) -> None:
    data = tokenize(dataset(["a " * 100, "b"], dtype="float64"), tokenizer, 8)
    assert data.lengths.tolist() == [8, 3]
    assert data.labels.dtype == np.float32
    assert collate(data, np.array([1]), 0)["labels"].dtype == torch.float32


def test_more_rows_than_one_chunk(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dataset([f"{'a' * (n % 7 + 1)}" for n in range(25)])
    whole = tokenize(rows, tokenizer, 16)
    monkeypatch.setattr("fedmask.tasks.tokenized._CHUNK", 4)
    assert same(tokenize(rows, tokenizer, 16), whole)


def test_no_rows(tokenizer: Any) -> None:
    data = tokenize(dataset([]), tokenizer, 16)
    assert len(data) == 0 and data.offsets.tolist() == [0] and data.labels.dtype == np.int64
    assert batches(data, 4, None) == []


def of_lengths(lengths: list[int]) -> Tokenized:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Tokenized(np.zeros(offsets[-1], np.int32), offsets, None, np.zeros(len(lengths), np.int64))


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 8), st.none() | st.integers(0, 5))
def test_batches_hold_every_row_once_and_similar_lengths(
    lengths: list[int], size: int, seed: int | None
) -> None:
    def draw() -> list[np.ndarray]:
        return batches(of_lengths(lengths), size, None if seed is None else np.random.default_rng(seed))

    found = draw()
    assert Counter(row for batch in found for row in batch.tolist()) == Counter(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in found)
    assert len(found) == -(-len(lengths) // size)
    # Grouped by length: put in order, one batch ends where the next begins.
    ranges = sorted(
        (min(lengths[row] for row in batch), max(lengths[row] for row in batch)) for batch in found
    )
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(ranges))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in draw()]
    if seed is None:
        order = [row for batch in found for row in batch.tolist()]
        assert order == sorted(range(len(lengths)), key=lambda row: (lengths[row], row))


def test_batches_differ_between_epochs() -> None:
    data, rng = of_lengths([1] * 50 + [2] * 50), np.random.default_rng(1)
    first, second = batches(data, 10, rng), batches(data, 10, rng)
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in second]
    # Rows of equal length meet others in the next epoch, and the order of the batches is new.
    assert {frozenset(batch.tolist()) for batch in first} != {frozenset(batch.tolist()) for batch in second}
    lengths = [data.lengths[batch[0]] for batch in first]
    assert lengths != sorted(lengths)


def test_bad_batch_size() -> None:
    with pytest.raises(ConfigError, match="batch_size: expected a number at least 1, found 0"):
        batches(of_lengths([1]), 0, None)
