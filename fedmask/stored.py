"""The stored values of a model's tensors, whatever dtype the model was loaded in.

A mask must be the same for a party that loads a checkpoint in float32 and one that loads it in
bfloat16. So values are read from the checkpoint's file where the loaded ones have lost bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

TensorReader = Callable[[str], torch.Tensor]
_LOSSY = (torch.float16, torch.bfloat16)
_KEPT = "stored_values"
_OLD_NAMES = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


def stored_reader(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> TensorReader:
    """A function from a backbone tensor's name to its values as stored.

    Tensors in float32 are given as they are: they hold every stored bit. One in half precision is
    read from the model's safetensors files, and used if it still equals the loaded one after the
    same rounding (else the model has been trained since, and the given tensor counts).
    """
    base = getattr(model, "base_model", None)  # a model with a head of ours has no file of its own
    owner = base if isinstance(base, nn.Module) else model
    files = _tensor_files(owner) if any(is_half(p) for p in parameters.values()) else {}
    prefix = str(getattr(owner, "base_model_prefix", "") or "")

    def read(name: str) -> torch.Tensor:
        given = parameters[name].detach()
        if not is_half(given):
            return given
        kept = kept_stored(parameters[name])
        if kept is not None:
            return kept
        for key in _stored_names(name, prefix):
            if key in files:
                stored = _read(files[key], key)
                if stored.shape == given.shape and torch.equal(stored.to(given.dtype), given.cpu()):
                    return stored
        return given

    return read


def is_half(tensor: torch.Tensor) -> bool:
    """Whether the tensor's dtype holds less than float32 does."""
    return tensor.dtype in _LOSSY


def lost_bits(read: TensorReader, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """What ``tensor`` lacks to its stored values: float32 of its shape; None unless it is rounded."""
    return read(name).float() - tensor.detach().float() if is_half(tensor) else None


def unrounded(tensor: torch.Tensor, lost: torch.Tensor | None) -> torch.Tensor:
    """``tensor`` (any shape) with its lost bits: a small change must not be added to a rounded value."""
    return tensor if lost is None else tensor + lost


@contextmanager
def keep_stored(model: nn.Module) -> Iterator[None]:
    """Round ``model``'s parameters inside, and ``stored_reader`` still gives the values that they had.

    Values that the checkpoint's file holds are read from there again; the others are kept in memory.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameter.data for name, parameter in parameters.items()}
    yield
    read = stored_reader(model, parameters)
    for name, parameter in parameters.items():
        values = before.pop(name)
        if is_half(parameter) and not torch.equal(read(name).to(values.dtype), values):
            keep_as_stored(parameter, values)


def kept_stored(tensor: torch.Tensor) -> torch.Tensor | None:
    """The stored values (of its shape) kept with a rounded ``tensor``; None where a file has them."""
    kept: torch.Tensor | None = getattr(tensor, _KEPT, None)
    return kept


def keep_as_stored(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Keep ``values`` (of its shape) with ``tensor``: what it held before it was rounded."""
    setattr(tensor, _KEPT, values)


def _stored_names(name: str, prefix: str) -> list[str]:
    names = [name, f"{prefix}.{name}"]
    for new, old in _OLD_NAMES:
        names += [n.replace(new, old) for n in names if new in n]
    return names


def _read(path: Path, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(key)
    return tensor


def _tensor_files(model: nn.Module) -> dict[str, Path]:
    """Which safetensors file of the model's own checkpoint holds which tensor; empty if none is at hand."""
    index = _checkpoint_file(model, "model.safetensors.index.json")
    if index is not None:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        found = {shard: _checkpoint_file(model, shard) for shard in set(names.values())}
        return {key: path for key, shard in names.items() if (path := found[shard]) is not None}
    single = _checkpoint_file(model, "model.safetensors")
    if single is None:
        return {}
    from safetensors import safe_open

    with safe_open(str(single), framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _checkpoint_file(model: nn.Module, name: str) -> Path | None:
    source = str(getattr(model, "name_or_path", "") or "")
    if not source:
        return None
    folder = Path(source)
    if folder.is_dir():
        path = folder / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    config: Any = getattr(model, "config", None)
    try:
        found = cached_file(
            source,
            name,
            revision=getattr(config, "_commit_hash", None),
            local_files_only=True,  # the model was loaded from there, so the file is in the cache
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no name that a hub could have, such as a folder that is gone
        return None
    return Path(found) if found else None
