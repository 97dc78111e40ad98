"""The settings ``up`` and ``down``: a codec's spec each; down may end in ``+delta``.

``down = "fp16"``: the whole vector, every time. ``down = "int4+delta"``: its change since the version that
the client holds. What one change loses goes into the next, so error feedback comes with it; a quantized whole
vector is rounded stochastically instead, and ``sign`` and ``topk`` would be biased (``topk:0.25+noef`` says
that this is meant).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedmask.codecs import Codec, bare_codec, codec_for
from fedmask.errors import ConfigError, EnvelopeError
from fedmask.rng import rng_for

_CHANGE = "+delta"
_MANY = 1 << 18


@dataclass(frozen=True)
class Down:
    """``codec`` carries the change since an older version (``change``), or the whole vector."""

    codec: Codec
    change: bool


@lru_cache
def up_codec(spec: str) -> Codec:
    """What carries a client's change to the server. Raises ``ConfigError``."""
    if spec.endswith(_CHANGE):
        raise ConfigError(
            f"up: a client sends its change anyway, found {spec!r}; write {spec.removesuffix(_CHANGE)!r}"
        )
    try:
        return codec_for(spec)
    except EnvelopeError as error:
        raise ConfigError(f"up: {error}") from None


@lru_cache
def down_way(spec: str) -> Down:
    """What carries the server's vector to a client. Raises ``ConfigError``."""
    change = spec.endswith(_CHANGE)
    body = spec.removesuffix(_CHANGE)
    try:
        codec = codec_for(body)
        if change:
            return Down(bare_codec(body.partition("+")[0]), True)
    except EnvelopeError as error:
        raise ConfigError(f"down: {error}") from None
    if codec.keeps_state:
        raise ConfigError(
            f"down: {spec!r} loses what only later changes can make up for;"
            f" write {body.partition('+')[0] + _CHANGE!r}"
        )
    return Down(codec, False)


def change_way(spec: str) -> Down:
    """``spec`` with changes sent down, whether it says so or not. Raises ``ConfigError``."""
    way = down_way(spec)
    return way if way.change else down_way(spec.partition("+")[0] + _CHANGE)


@lru_cache
def value_bytes(spec: str) -> float:
    """Payload bytes an entry, scales and positions included, of ``up`` or ``down`` for a long vector."""
    codec = bare_codec(spec.partition("+")[0])
    values = rng_for(0, -1, -1, "value-bytes").standard_normal(_MANY).astype(np.float32)
    data, _ = codec.encode(values, None, None)
    return len(data) / _MANY
