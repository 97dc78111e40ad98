"""What an export writes beside the checkpoint: LoRA as a PEFT adapter, adapters that no weight can hold."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fedmask.trainables import Bottlenecks, CarriedMatrices, LoRA
from fedmask.tuner import Tuning

_PEFT = """
The folder `peft` holds the same backbone's LoRA as a PEFT adapter, for the pre-trained `{source}`:

```python
from peft import PeftModel
from transformers import AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{source}"), "peft")
```
"""

_ADAPTERS = """
The backbone's own tensors are the pre-trained ones. Its adapters are in `adapters.safetensors` and are put
behind the layers that they are named after:

```python
import torch
from safetensors.torch import load_file

adapters = load_file("adapters.safetensors")
f = {{"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}}["{activation}"]


def adapted(name):
    a = {{key: adapters[f"{{name}}.{{key}}"] for key in ("down.weight", "down.bias", "up.weight", "up.bias")}}

    def hook(layer, inputs, h):
        return h + f(h @ a["down.weight"].T + a["down.bias"]) @ a["up.weight"].T + a["up.bias"]

    return hook


for name in sorted({{key.rsplit(".", 2)[0] for key in adapters}}):
    {backbone}.get_submodule(name).register_forward_hook(adapted(name))
```
"""


def write_beside(tuning: Tuning, source: str, backbone: str, folder: Path) -> str:
    """Write files for what ``tuning`` (with its final values) holds besides weights; their part of the card.

    ``source``: the pre-trained model's name; ``backbone``: the backbone's name in the card's lines.
    """
    said = ""
    # With a residual in the weights the factors alone would be half of what was learned.
    whole = any(isinstance(trainable, CarriedMatrices) for trainable in tuning.trainables)
    for trainable in tuning.trainables:
        if isinstance(trainable, LoRA) and not whole:
            _write_peft(trainable, source, folder / "peft")
            said += _PEFT.format(source=source)
        if isinstance(trainable, Bottlenecks):
            _write_adapters(trainable, folder / "adapters.safetensors")
            said += _ADAPTERS.format(activation=trainable.activation, backbone=backbone)
    return said


def _write_peft(lora: LoRA, source: str, folder: Path) -> None:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": source,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(lora.turned),
        "inference_mode": True,
        "target_modules": lora.layers,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        f"base_model.model.{layer}.lora_{name}.weight": factor
        for i, layer in enumerate(lora.layers)
        for name, factor in zip("AB", lora.factors(i), strict=True)
    }
    _save(tensors, folder / "adapter_model.safetensors")


def _write_adapters(adapters: Bottlenecks, path: Path) -> None:
    tensors = {
        f"{layer}.{name}": tensor
        for i, layer in enumerate(adapters.layers)
        for name, tensor in adapters.parts(i).items()
    }
    _save(tensors, path)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, str(path))
