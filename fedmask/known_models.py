"""The sizes of well-known models, as their published config.json state them: no hub is asked for these.

Only what decides the shapes of their tensors; enough to count bytes, not to load weights.
"""

from __future__ import annotations

from typing import Any


def _encoder(width: int, layers: int, **more: Any) -> dict[str, Any]:
    """A BERT-shaped model: heads of 64, feed-forward layers of four times the width."""
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
            "intermediate_size": 4 * width, **more}  # fmt: skip


def _bert(width: int, layers: int, words: int = 30522, **more: Any) -> dict[str, Any]:
    return {"model_type": "bert", **_encoder(width, layers), "vocab_size": words, **more}


def _roberta(width: int, layers: int, words: int = 50265, kind: str = "roberta") -> dict[str, Any]:
    sizes = {"vocab_size": words, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
    return {"model_type": kind, **_encoder(width, layers), **sizes}


def _gpt2(width: int, layers: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": width // 64}


_MINILM = _bert(384, 6, num_attention_heads=12)

KNOWN: dict[str, dict[str, Any]] = {
    "minilm": _MINILM,
    "all-MiniLM-L6-v2": _MINILM,
    "all-MiniLM-L12-v2": _bert(384, 12, num_attention_heads=12),
    "bert-base-uncased": _bert(768, 12),
    "bert-base-cased": _bert(768, 12, 28996),
    "bert-base-multilingual-cased": _bert(768, 12, 119547),
    "bert-large-uncased": _bert(1024, 24),
    "bert-large-cased": _bert(1024, 24, 28996),
    "distilbert-base-uncased": {"model_type": "distilbert", "dim": 768, "n_layers": 6, "hidden_dim": 3072},
    "roberta-base": _roberta(768, 12),
    "roberta-large": _roberta(1024, 24),
    "distilroberta-base": _roberta(768, 6),
    "xlm-roberta-base": _roberta(768, 12, 250002, "xlm-roberta"),
    "xlm-roberta-large": _roberta(1024, 24, 250002, "xlm-roberta"),
    "gpt2": _gpt2(768, 12),
    "gpt2-medium": _gpt2(1024, 24),
    "gpt2-large": _gpt2(1280, 36),
}


def known_config(name: str) -> dict[str, Any] | None:
    """The config of ``roberta-large`` or ``FacebookAI/roberta-large``; None for a name that is not here."""
    return KNOWN.get(name.rsplit("/", 1)[-1])
