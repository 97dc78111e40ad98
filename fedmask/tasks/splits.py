"""The fixed rule that puts a row into train, dev or test: a hash of its text, nothing else.

No seed, no order and no library takes part, so the split is the same everywhere and for ever, and
equal texts always land in the same split. About 80 % of rows are train, 10 % dev and 10 % test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "dev", "test"]
# Unit separator: it keeps ("ab", "c") and ("a", "bc") apart.
_JOINT = "\x1f"


def split_of(text: str, text_pair: str | None = None) -> Split:
    """The split of one row: the first 8 bytes of SHA-256(text), big-endian, modulo 10.

    8 is dev, 9 is test, the rest train. A pair is hashed as its two texts joined by U+001F.
    """
    whole = text if text_pair is None else text + _JOINT + text_pair
    bucket = int.from_bytes(hashlib.sha256(whole.encode()).digest()[:8], "big") % 10
    return "dev" if bucket == 8 else "test" if bucket == 9 else "train"


def half_of(text: str, text_pair: str | None = None) -> int:
    """0 or 1 by the last bit of the same hash, for files of which one half is dev and the other is test."""
    whole = text if text_pair is None else text + _JOINT + text_pair
    return hashlib.sha256(whole.encode()).digest()[-1] % 2


def carve(
    texts: Sequence[str], pairs: Sequence[str] | None, wanted: Sequence[Split]
) -> dict[Split, list[int]]:
    """Row numbers of ``train`` and of each split in ``wanted``; every row exactly once.

    Rows of a split that is not wanted stay in train.
    """
    rows: dict[Split, list[int]] = {"train": [], **{split: [] for split in wanted}}
    for row, text in enumerate(texts):
        split = split_of(text, None if pairs is None else pairs[row])
        rows[split if split in rows else "train"].append(row)
    return rows
