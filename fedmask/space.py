"""The ordered tensors of a backbone as one flat index space.

A mask is a set of flat indices over such a space. The space's digest covers the checkpoint's
values, so two parties with the same digest hold the same numbers at the same places.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fedmask.errors import ConfigError
from fedmask.stored import TensorReader, stored_reader

Eligible = Literal["linear", "linear+embeddings", "all"]
ELIGIBLE: tuple[Eligible, ...] = ("linear", "linear+embeddings", "all")


@dataclass(frozen=True)
class ParameterSpace:
    """Eligible tensors in the model's own order, laid end to end.

    ``names`` are relative to the backbone, so a model with a head and the bare backbone agree.
    ``offsets`` has one entry more than ``names``. ``excluded`` are flat ``[start, stop)`` ranges
    that no mask may hold (rows of padding tokens). ``checkpoint`` is the digest of the whole
    backbone's stored values, ``digest`` the digest of the checkpoint and the space together.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    excluded: tuple[tuple[int, int], ...]
    checkpoint: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps([self.checkpoint, self.names, self.shapes, self.excluded])
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest())

    @property
    def size(self) -> int:
        """Number of flat indices, excluded ones included."""
        return self.offsets[-1]

    @property
    def eligible_size(self) -> int:
        """N: number of entries that a mask may hold."""
        return sum(self.eligible_sizes)

    @property
    def eligible_sizes(self) -> list[int]:
        """Number of entries that a mask may hold, tensor by tensor."""
        sizes = [stop - start for start, stop in zip(self.offsets, self.offsets[1:], strict=False)]
        for start, stop in self.excluded:
            sizes[bisect_right(self.offsets, start) - 1] -= stop - start
        return sizes

    def split(self, indices: np.ndarray) -> list[np.ndarray]:
        """Cut sorted flat indices (int64) into one array a tensor, relative to that tensor."""
        cuts = np.searchsorted(indices, np.asarray(self.offsets[1:-1], dtype=np.int64))
        return [part - start for part, start in zip(np.split(indices, cuts), self.offsets[:-1], strict=True)]


def backbone_of(model: nn.Module) -> nn.Module:
    """The pre-trained part of ``model``: its ``base_model`` where there is one, else ``model``."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) else model


def backbone_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Backbone tensors by name, tied ones once; without pooler, output layer and our own state.

    The pooler counts as part of a classification head: some architectures have it only there.
    """
    base = backbone_of(model)
    output = _call(base, "get_output_embeddings")
    inputs = _call(base, "get_input_embeddings")
    kept = {id(p) for p in inputs.parameters()} if isinstance(inputs, nn.Module) else set()
    outside = {id(p) for p in output.parameters()} - kept if isinstance(output, nn.Module) else set()
    return {
        name: parameter
        for name, parameter in base.named_parameters()
        if name.split(".")[0] not in ("pooler", "fedmask") and id(parameter) not in outside
    }


def _call(module: nn.Module, method: str) -> Any:
    found = getattr(module, method, None)
    return found() if callable(found) else None


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers (``nn.Linear``, transformers' ``Conv1D``) inside the backbone's blocks, by name.

    A block is an element of an ``nn.ModuleList``: that is how encoders and decoders stack layers,
    while embeddings, poolers and heads stand outside of such lists.
    """
    base = backbone_of(model)
    lists = [name + "." for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in base.named_modules():
        if is_linear(module) and any(name.startswith(prefix) for prefix in lists):
            yield name, module


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer whose weight path fedmask knows."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' ``Conv1D`` (GPT-2's linear layer, weight ``[in, out]``)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def parameter_space(model: nn.Module, eligible: Eligible = "linear") -> ParameterSpace:
    """The space of ``model``'s eligible tensors.

    Raises ConfigError for an unknown set and for a model that has no such tensor.
    """
    return shape_space(model, eligible, checkpoint_digest)


def shape_space(
    model: nn.Module, eligible: Eligible = "linear", digest: Callable[[nn.Module], str] = lambda model: ""
) -> ParameterSpace:
    """``parameter_space`` from shapes alone: without ``digest`` the checkpoint's is empty."""
    if eligible not in ELIGIBLE:
        from fedmask.errors import unknown

        raise ConfigError(unknown("eligible set", str(eligible), ELIGIBLE))
    parameters = backbone_parameters(model)
    chosen = _eligible_names(model, parameters, eligible)
    if not chosen:
        raise ConfigError(
            f"no tensor of {type(model).__name__} is in the eligible set {eligible!r}: "
            "expected linear layers inside an nn.ModuleList; use eligible='all'"
        )
    shapes = tuple(tuple(parameters[name].shape) for name in chosen)
    sizes = [parameters[name].numel() for name in chosen]
    offsets = tuple(int(o) for o in np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
    return ParameterSpace(
        names=tuple(chosen),
        shapes=shapes,
        offsets=offsets,
        excluded=_padding_rows(model, dict(zip(chosen, offsets, strict=False))),
        checkpoint=digest(model),
    )


def _eligible_names(model: nn.Module, parameters: dict[str, nn.Parameter], eligible: Eligible) -> list[str]:
    if eligible == "all":
        return list(parameters)
    wanted = {id(module.weight) for _, module in linear_layers(model)}
    if eligible == "linear+embeddings":
        wanted |= {id(m.weight) for m in backbone_of(model).modules() if isinstance(m, nn.Embedding)}
    return [name for name, parameter in parameters.items() if id(parameter) in wanted]


def _padding_rows(model: nn.Module, starts: dict[str, int]) -> tuple[tuple[int, int], ...]:
    ranges = set()  # modules that share a weight exclude its row once
    names = {id(p): name for name, p in backbone_parameters(model).items()}
    for module in backbone_of(model).modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            name = names.get(id(module.weight))
            if name in starts:
                start = starts[name] + module.padding_idx * module.embedding_dim
                ranges.add((start, start + module.embedding_dim))
    return tuple(sorted(ranges))


def checkpoint_digest(model: nn.Module, reader: TensorReader | None = None) -> str:
    """SHA-256 (hex) over names, shapes and stored float32 values of all backbone tensors."""
    parameters = backbone_parameters(model)
    read = reader or stored_reader(model, parameters)

    def one(name: str) -> tuple[str, list[int], str]:
        tensor = read(name)
        digest = hashlib.sha256()
        for chunk in float32_chunks(tensor):
            digest.update(chunk.astype("<f4", copy=False).data)
        return name, list(tensor.shape), digest.hexdigest()

    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        rows = list(pool.map(one, parameters))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


CHUNK = 1 << 22


def float32_chunks(tensor: torch.Tensor) -> Iterator[np.ndarray]:
    """The tensor's values in row-major order as float32 arrays of at most ``CHUNK`` entries."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK].to(device="cpu", dtype=torch.float32).numpy()
