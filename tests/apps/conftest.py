"""A tiny random BERT, two tiny tasks, and configs over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmask.config import RunConfig, from_dict

WORDS = (
    "good",
    "bad",
    "fine",
    "poor",
    "ball",
    "game",
    "bank",
    "rate",
    "film",
    "song",
    "the",
    "a",
    "is",
    "was",
)


def make_model(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """A BERT of ``layers`` layers and 32 dimensions with a WordPiece vocabulary of a few words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
        with torch.no_grad():  # fresh biases are zero, which adapters on biases refuse
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.02)
        model.save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def make_task(path: Path, seed: int, labels: tuple[str, ...], rows: int = 240) -> Path:
    """A TSV file whose label depends on one of the words."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lines = ["text\tlabel"]
    for row in range(rows):
        label = row % len(labels)
        others = rng.choice(WORDS[len(labels) :], size=int(rng.integers(2, 7)))
        lines.append(f"{WORDS[label]} {' '.join(others)}\t{labels[label]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``mood.tsv`` (2 classes) and ``topic.tsv`` (3 classes)."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    make_task(folder / "mood.tsv", 1, ("no", "yes"))
    make_task(folder / "topic.tsv", 2, ("sports", "money", "art"))
    return folder


@pytest.fixture
def make_config(tiny: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``make_config(**changes)``: 5 clients (3 mood, 2 topic), 2 rounds; ``clients=(3, 2)`` changes that."""

    def build(clients: tuple[int, ...] = (3, 2), **changes: Any) -> RunConfig:
        tasks = [
            {"name": name, "source": str(tiny / f"{name}.tsv"), "text": ["text"], "label": "label",
             "clients": count}
            for name, count in zip(("mood", "topic"), clients, strict=False)
        ]  # fmt: skip
        values: dict[str, Any] = {
            "name": "tiny",
            "model": str(tiny / "model"),
            "density": 0.02,
            "rounds": 2,
            "workers": 1,
            "eval_rows": 40,
            "tasks": tasks,
            "partition": {"kind": "iid"},
            "train": {"steps": 2, "batch_size": 8, "max_tokens": 16},
            "runs_dir": str(tmp_path / "runs"),
        }
        return from_dict(values | changes)

    return build
