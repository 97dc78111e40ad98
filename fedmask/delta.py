"""The small file that holds what was trained: k values and the recipe of their places.

A safetensors file: one float32 tensor a segment (changes from the checkpoint), text metadata. Nothing
is ever unpickled. A mask that no rule can derive again is stored with its packed indices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedmask.codecs import pack_indices, unpack_indices
from fedmask.errors import CheckpointError, ConfigError
from fedmask.layout import HEAD_PREFIX
from fedmask.masks import RULES, Mask, Recipe, derive_mask, mask_from_indices
from fedmask.space import backbone_parameters, checkpoint_digest, parameter_space
from fedmask.stored import lost_bits, stored_reader, unrounded

_FORMAT = "fedmask-delta"
_INDICES = "mask.indices"


@dataclass(frozen=True)
class Delta:
    """Segments (float32, flat) with what is needed to put them in place.

    ``names``: for segments of whole tensors, the tensors' names in order (in the backbone; for
    ``head`` in the whole model). ``checkpoint``: digest of the backbone that they change.
    """

    segments: Mapping[str, np.ndarray]
    checkpoint: str
    recipe: Recipe | None = None
    names: Mapping[str, list[str]] = field(default_factory=dict)
    indices: np.ndarray | None = None
    size: int = 0
    more: Mapping[str, str] = field(default_factory=dict)


def write_delta(
    path: str | Path,
    segments: Mapping[str, np.ndarray],
    *,
    checkpoint: str,
    mask: Mask | None = None,
    names: Mapping[str, list[str]] | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write a delta file. ``segments``: float32 changes; ``mask`` where one of them is ``mask``."""
    from safetensors.numpy import save_file

    tensors = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in segments.items()}
    recipe = mask.recipe() if mask is not None else None
    if mask is not None and mask.rule.name not in RULES:
        packed = pack_indices(mask.indices, mask.space.size)
        tensors[_INDICES] = np.frombuffer(packed, dtype=np.uint8)
    metadata = {
        "format": _FORMAT,
        "version": "1",
        "checkpoint": checkpoint,
        "recipe": recipe.to_json() if recipe is not None else "",
        "names": json.dumps(dict(names or {})),
        "space": str(mask.space.size) if mask is not None else "0",
        "more": json.dumps(dict(more or {})),
    }
    metadata["sha256"] = _checksum(tensors, metadata)
    save_file(tensors, str(path), metadata=metadata)


def read_delta(path: str | Path) -> Delta:
    """Read a delta file. CheckpointError if it is none, damaged, or of another version."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ConfigError(f"delta {path}: no such file; write one with fedmask.save_delta")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or metadata.get("version") != "1":
                raise CheckpointError(
                    f"delta {path}: expected {_FORMAT} version 1, found {metadata.get('format')} "
                    f"{metadata.get('version')}; write it with fedmask.save_delta of this release"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"delta {path}: damaged file ({error}); save it again") from error
    if metadata.pop("sha256", "") != _checksum(tensors, metadata):
        raise CheckpointError(f"delta {path}: damaged file (its checksum does not fit); save it again")
    size = int(metadata["space"])
    packed = tensors.pop(_INDICES, None)
    return Delta(
        segments=tensors,
        checkpoint=metadata["checkpoint"],
        recipe=Recipe.from_json(metadata["recipe"]) if metadata["recipe"] else None,
        names=json.loads(metadata["names"]),
        indices=unpack_indices(packed.tobytes(), size) if packed is not None else None,
        size=size,
        more=json.loads(metadata["more"]),
    )


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, tensors[name].dtype.str, tensors[name].shape]).encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def apply_delta(model: nn.Module, delta: Delta) -> nn.Module:
    """Add ``delta`` to ``model``'s stored weights, in place, and return it.

    Heads of a federation's tasks (``head/<task>``) are left out: ``fedmask export`` writes whole
    models. CheckpointError if the model is another checkpoint or lacks a tensor.
    """
    found = checkpoint_digest(model)
    if found != delta.checkpoint:
        raise CheckpointError(
            f"delta: made for the checkpoint {delta.checkpoint}, found {found}; "
            "load the same pre-trained model"
        )
    backbone = backbone_parameters(model)
    read = stored_reader(model, backbone)
    # Everything is checked before anything is written.
    places = _places(model, delta) if "mask" in delta.segments else {}
    whole: list[tuple[nn.Parameter, torch.Tensor | None, torch.Tensor]] = []
    for segment, values in delta.segments.items():
        if segment != "mask" and not segment.startswith(HEAD_PREFIX):
            named = dict(model.named_parameters()) if segment == "head" else backbone
            names = delta.names.get(segment, [])
            if not names:
                raise CheckpointError(
                    f"delta: segment {segment!r} holds no change of weights, such as factors; "
                    "write whole models with fedmask export"
                )
            parts = _whole(named, segment, names, torch.from_numpy(values))
            stored = stored_reader(model, named)
            whole += [
                (named[name], lost_bits(stored, name, named[name]), part)
                for name, part in zip(names, parts, strict=True)
            ]
    with torch.no_grad():
        # The mask first: where other segments change its entries too, sums round as they did in training.
        start = 0
        for name, index in places.items():
            piece = torch.from_numpy(delta.segments["mask"][start : start + len(index)])
            changed = read(name).reshape(-1)[index] + piece
            backbone[name].view(-1)[index] = changed.to(backbone[name].dtype)
            start += len(index)
        for parameter, lost, part in whole:
            base = unrounded(parameter, lost)
            parameter.copy_((base + part.view(parameter.shape)).to(parameter.dtype))
    return model


def _places(model: nn.Module, delta: Delta) -> dict[str, torch.Tensor]:
    """Flat indices of the masked entries by tensor, checked against the file."""
    if delta.recipe is None:
        raise CheckpointError("delta: masked values without a recipe; the file is damaged")
    rule = delta.recipe.rule
    if delta.indices is not None:
        mask = mask_from_indices(delta.indices, parameter_space(model, rule.eligible), rule)
    else:
        mask = derive_mask(model, rule)
    if mask.digest != delta.recipe.mask:
        raise CheckpointError(
            f"delta: made for the mask {delta.recipe.mask}, this model gives {mask.digest}; "
            "load the same pre-trained model with the same release of fedmask"
        )
    _check_size("mask", int(delta.segments["mask"].size), mask.k)
    return {name: torch.from_numpy(index) for name, index in mask.per_tensor().items()}


def _whole(
    parameters: Mapping[str, nn.Parameter], segment: str, names: list[str], change: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The flat part of the change of each tensor that a segment of whole tensors changes."""
    missing = [name for name in names if name not in parameters]
    if missing:
        raise CheckpointError(
            f"delta: segment {segment!r} changes {missing[0]}, which this model lacks; "
            "load the model class it was trained with"
        )
    sizes = [parameters[name].numel() for name in names]
    _check_size(segment, change.numel(), sum(sizes))
    return torch.split(change, sizes)


def _check_size(segment: str, found: int, expected: int) -> None:
    if found != expected:
        raise CheckpointError(
            f"delta: segment {segment!r}: expected {expected} values, found {found}; damaged file"
        )
