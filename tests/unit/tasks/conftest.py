"""A small real tokenizer, and task files on disk."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedmask.config import TaskConfig

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def _tokenizer(*, types: bool) -> PreTrainedTokenizerFast:
    """WordPiece over single letters: every lower-case ASCII word is one token a letter."""
    pieces = [*SPECIAL, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    inner = Tokenizer(
        models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=names,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One that makes token types, as BERT's does."""
    return _tokenizer(types=True)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """One that makes no token types, as RoBERTa's does."""
    return _tokenizer(types=False)


@pytest.fixture
def task_file(tmp_path: Path):
    """Writes a file and gives the task that reads it (columns text and label, unless said otherwise)."""

    def write(name: str, content: str | bytes, **settings: object) -> TaskConfig:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        defaults: dict[str, object] = {"text": "text", "label": "label", "clients": 1}
        return TaskConfig(name="mood", source=str(path), **(defaults | settings))

    return write
