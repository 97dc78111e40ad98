"""Shapes without weights: those of known models, and the very layouts of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from fedmask.bundled import bundled_model_path
from fedmask.config import RunConfig, from_dict
from fedmask.errors import ConfigError
from fedmask.known_models import KNOWN, known_config
from fedmask.methods import METHODS, TASK_SPECIFIC
from fedmask.shapes import read_shapes, task_layout
from fedmask.workspace import Workspace
from tests.support import save_two_tasks


def settings(model: str, **changes: object) -> RunConfig:
    return from_dict({"model": model, "tasks": [{"name": "task", "clients": 1}], **changes})


@pytest.mark.parametrize(
    ("model", "backbone", "eligible"),
    [
        ("minilm", 22_565_376, 10_616_832),
        ("roberta-base", 124_055_040, 84_934_656),
        ("FacebookAI/roberta-large", 354_310_144, 301_989_888),
        ("bert-base-uncased", 108_891_648, 84_934_656),
        ("distilbert-base-uncased", 66_362_880, 42_467_328),
        ("gpt2", 124_439_808, 84_934_656),
    ],
)
def test_sizes_of_known_models(model: str, backbone: int, eligible: int) -> None:
    shapes = read_shapes(settings(model))
    assert shapes.backbone_size == backbone
    assert shapes.space is not None and shapes.space.eligible_size == eligible
    assert shapes.k == round(0.005 * eligible)
    assert all(p.is_meta for p in shapes.model.parameters())  # nothing was allocated


def test_the_built_in_numbers_are_the_published_ones() -> None:
    published = json.loads((bundled_model_path() / "config.json").read_text())
    assert {key: published[key] for key in KNOWN["minilm"]} == KNOWN["minilm"]
    for name, numbers in KNOWN.items():
        assert known_config(f"someone/{name}") == numbers
        config = AutoConfig.for_model(**numbers).to_dict()
        assert all(config[key] == value for key, value in numbers.items()), name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_tasks(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_s_own_layouts_without_its_weights(method: str, tiny: Path) -> None:
    for head in ("mean", "hf"):
        tasks = [
            {
                "name": name,
                "source": str(tiny / f"{name}.tsv"),
                "text": "text",
                "label": "label",
                "clients": 1,
            }
            for name in ("mood", "topic")
        ]
        config = from_dict(
            {
                "model": str(tiny / "model"),
                "method": method,
                "density": 0.02,
                "head": head,
                "tasks": tasks,
                "train": {"max_tokens": 16},
            }
        )
        workspace, shapes = Workspace(config), read_shapes(config)
        if method in TASK_SPECIFIC:  # its mask comes from rows: any of its size will do
            workspace.use_mask(np.arange(shapes.k))
        for task, labels in (("mood", 2), ("topic", 3)):
            assert task_layout(shapes, task, labels, config.head) == workspace.layout(task)
        assert shapes.backbone_size == workspace.backbone_size
        assert shapes.k == (workspace.mask.k if workspace.mask else 0)


def test_a_model_that_nobody_knows_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'robertalarge'.*the nearest is 'roberta-large'"):
        read_shapes(settings("robertalarge"))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        read_shapes(settings(str(tmp_path)))
