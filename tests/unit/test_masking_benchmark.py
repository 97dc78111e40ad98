"""A mask takes little memory on top of the model; the time it takes is measured, never tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks.masking import MODELS, main


def test_memory_on_top_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own; on the smallest size, where buffers of a fixed size weigh most."""
    assert main(["--sizes", "22M", "--threads", "1", "--json", str(tmp_path / "masks.json")]) == 0
    (row,) = json.loads((tmp_path / "masks.json").read_text())["masks"]
    assert row["k"] == 53_084 and row["backbone_entries"] == 22_565_376
    assert 0 < row["extra_mb"] < 0.5 * row["model_mb"]
    assert "22M" in capsys.readouterr().out


def test_the_largest_size_is_that_of_roberta_large() -> None:
    import torch
    from transformers import BertConfig, BertModel

    from fedmask.space import backbone_parameters

    with torch.device("meta"):
        model = BertModel(BertConfig(**MODELS["355M"]), add_pooling_layer=False)
    assert sum(p.numel() for p in backbone_parameters(model).values()) == 354_310_144
