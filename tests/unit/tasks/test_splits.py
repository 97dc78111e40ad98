"""The hash rule of the splits."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from fedmask.tasks import split_of
from fedmask.tasks.splits import carve


def test_the_rule_by_hand() -> None:
    # SHA-256("") starts e3b0c44298fc1c14 and SHA-256("abc") starts ba7816bf8f01cfea.
    assert 0xE3B0C44298FC1C14 == 16_406_829_232_824_261_652  # ends in 2: train
    assert 0xBA7816BF8F01CFEA == 13_436_514_500_253_700_074  # ends in 4: train
    assert split_of("") == split_of("abc") == "train"


def test_known_rows_stay_where_they_are() -> None:
    found = {split: [n for n in range(40) if split_of(f"text {n}") == split] for split in ("dev", "test")}
    assert found == {"dev": [0, 4, 5, 7, 30], "test": [8, 10, 26, 32, 36]}


def test_pairs_are_hashed_with_a_joint() -> None:
    digest = hashlib.sha256(b"left\x1fright").digest()
    bucket = int.from_bytes(digest[:8], "big") % 10
    assert split_of("left", "right") == {8: "dev", 9: "test"}.get(bucket, "train")


@given(st.lists(st.text(max_size=5), max_size=60), st.sampled_from([("dev", "test"), ("dev",), ("test",)]))
def test_carving_covers_each_row_once_and_keeps_equal_texts_together(
    texts: list[str], wanted: tuple[str, ...]
) -> None:
    parts = carve(texts, None, wanted)
    assert set(parts) == {"train", *wanted}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(texts)))
    where = {split: {texts[row] for row in rows} for split, rows in parts.items()}
    for split in wanted:
        assert not where[split] & where["train"]
        assert all(split_of(text) == split for text in where[split])
