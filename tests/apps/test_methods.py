"""Two rounds of every method through the Flower apps: what travels, what is kept, what is exported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from experiments.engines import run_inprocess
from fedmask.config import RunConfig
from fedmask.delta import read_delta
from fedmask.export import export_run, open_run, vector_of
from fedmask.methods import METHODS
from fedmask.training import Stream, tuned
from tests.apps.grids import read_rows
from tests.support import outputs

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize("method", METHODS)
def test_two_rounds(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = make_config(
        clients=(2, 1), method=method, name=method.replace("+", "-"), adapter={"bottleneck": 4},
        train={"steps": 2, "batch_size": 8, "max_tokens": 16, "weight_decay": 0.01},
    )  # fmt: skip
    result = run_inprocess(config)
    rows = read_rows(result.folder, "rounds")
    assert [row["replied"] for row in rows] == [[], [0, 1, 2], [0, 1, 2]]
    facts = json.loads((result.folder / "config.json").read_text())["facts"]

    # Every value that is trained travels, both ways, in every round, and nothing else does. Of flasc a
    # quarter, with positions: at most log2 C(n, n / 4), which is below n / 9 bytes.
    sizes = {task: sum(size for _, size in layout) for task, layout in facts["layout"].items()}
    total = sum(sizes[task] for task in ("mood", "mood", "topic"))
    least, most = (total, total + total // 9) if method == "flasc" else (4 * total, 4 * total)
    for row in rows[1:]:
        assert least <= row["bytes"]["up"] <= most + 3 * 300
        if method != "fedex-lora":  # see test_products
            assert least <= row["bytes"]["down"] <= most + 3 * 300

    # Something of every segment has moved.
    delta = read_delta(result.folder / "delta.safetensors")
    for name, changes in delta.segments.items():
        assert np.isfinite(changes).all() and np.any(changes), name

    # The exported checkpoint is the tuned model, and the backbone behind it is untouched.
    workspace, _ = open_run(result.folder)
    pristine = {name: tensor.clone() for name, tensor in workspace.backbone.model.state_dict().items()}
    with tuned(workspace.model("mood"), vector_of(workspace, "mood", delta), Stream(1, -1, -1)):
        seen = outputs(workspace.model("mood").base_model)
    (mood, _) = export_run(result.folder, tmp_path / "exported")
    exported = AutoModel.from_pretrained(mood)
    if method == "adapter":
        lines = (mood / "README.md").read_text().split("behind the layers")[1].split("```python")[1]
        monkeypatch.chdir(mood)
        exec(lines.split("```")[0], {"model": exported})
    assert torch.allclose(outputs(exported), seen, atol=1e-5)
    if METHODS[method].dense in ("lora", "ffa-lora"):
        with warnings.catch_warnings():  # an old name that peft asks transformers for
            warnings.simplefilter("ignore", FutureWarning)
            peft = PeftModel.from_pretrained(AutoModel.from_pretrained(config.model), mood / "peft")
        assert torch.allclose(outputs(peft), seen, atol=1e-5)
    for name, tensor in workspace.backbone.model.state_dict().items():
        assert torch.equal(tensor, pristine[name])
