"""The down-link's state as arrays, for the file that a run goes on from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from fedmask.channel import Public
from fedmask.positions import ByHolders
from server.state import RunState

_VECTOR, _CHANGES, _ENDS = "public/", "changes/", "change-ends/"
_MASK, _TRAINED = "holders/mask/", "holders/trained/"
_CLIENTS, _VERSIONS = "held/clients", "held/versions"


def channel_tensors(state: RunState) -> dict[str, np.ndarray]:
    """``public``, ``held`` and ``holders`` of a state: float32, uint8 and int64 arrays, all flat, by name."""
    out: dict[str, np.ndarray] = {}
    for stream, public in state.public.items():
        out[_VECTOR + stream] = public.vector
        out[_CHANGES + stream] = np.frombuffer(b"".join(public.changes), np.uint8)
        out[_ENDS + stream] = np.cumsum([len(change) for change in public.changes], dtype=np.int64)
    if state.public:
        out[_CLIENTS] = np.array(list(state.held), np.int64)
        out[_VERSIONS] = np.array(list(state.held.values()), np.int64)
    for client, indices in state.holders.masks.items():
        out[f"{_MASK}{client}"] = indices
    for version, clients in state.holders.trained.items():
        out[f"{_TRAINED}{version}"] = np.array(clients, np.int64)
    return out


def read_channel(
    tensors: Mapping[str, np.ndarray], version: int
) -> tuple[dict[str, Public], dict[int, int], ByHolders]:
    """The inverse of ``channel_tensors`` (flat arrays by name) for the state after ``version`` rounds."""
    public = {}
    for name, vector in tensors.items():
        if name.startswith(_VECTOR):
            stream = name.removeprefix(_VECTOR)
            data, ends = tensors[_CHANGES + stream].tobytes(), tensors[_ENDS + stream].tolist()
            changes = tuple(data[start:end] for start, end in itertools.pairwise([0, *ends]))
            public[stream] = Public(version, vector, changes)
    if not public:
        return {}, {}, ByHolders()
    clients, versions = tensors[_CLIENTS].tolist(), tensors[_VERSIONS].tolist()
    return public, dict(zip(clients, versions, strict=True)), _holders(tensors)


def _holders(tensors: Mapping[str, np.ndarray]) -> ByHolders:
    masks = {
        int(name.removeprefix(_MASK)): value for name, value in tensors.items() if name.startswith(_MASK)
    }
    trained = {
        int(name.removeprefix(_TRAINED)): tuple(value.tolist())
        for name, value in tensors.items()
        if name.startswith(_TRAINED)
    }
    return ByHolders(masks, trained)
