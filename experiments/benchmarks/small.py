"""A small random model and tasks of random words: for benchmarks of the federation around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedmask.config import RunConfig, from_dict

WORDS = [f"word{number}" for number in range(200)]
LABELS = ("one", "two", "three", "four")


def save_model(folder: Path, *, hidden: int = 64, layers: int = 2) -> Path:
    """A BERT of about ``12 * layers * hidden ** 2`` weights with random values and a word for a token."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config)
        with torch.no_grad():  # fresh biases are zero, which adapters on biases refuse
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: int) -> Path:
    """A TSV file of ``rows`` short texts whose first word tells the label."""
    rng = np.random.default_rng(1)
    others = rng.choice(WORDS[len(LABELS) :], size=(rows, 8))
    lines = (f"{WORDS[i % 4]} {' '.join(row)}\t{LABELS[i % 4]}" for i, row in enumerate(others))
    path.write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def small_run(folder: Path, clients: int, *, rows_per_client: int = 6, **changes: Any) -> RunConfig:
    """A run over ``clients`` clients, at most 100 a round; model and rows are written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_model(folder / "model")
    # A fifth of the rows becomes dev and test.
    source = save_rows(folder / f"rows{clients}.tsv", max(200, int(clients * rows_per_client * 1.3)))
    values: dict[str, Any] = {
        "name": f"clients{clients}",
        "model": str(folder / "model"),
        "method": "pafi",
        "density": 0.05,
        "rounds": 3,
        "workers": 1,
        "eval_rows": 100,
        "overlap_batches": 0,
        "tasks": [
            {"name": "small", "source": str(source), "text": ["text"], "label": "label", "clients": clients}
        ],
        "partition": {"kind": "iid"},
        "train": {"steps": 1, "batch_size": 8, "max_tokens": 16},
        "server": {"clients_per_round": min(100, clients)},
        "runs_dir": str(folder / "runs"),
    }
    return from_dict(values | changes)
