"""The value codecs by name. A new one is a file with the contract of ``Codec`` and a line here."""

from __future__ import annotations

from collections.abc import Callable

from fedmask.codecs.base import Codec
from fedmask.codecs.errors import UnknownCodec
from fedmask.codecs.plain import Fp16, Fp32
from fedmask.errors import unknown

CODECS: dict[str, Callable[[str], Codec]] = {
    "fp32": Fp32,
    "fp16": Fp16,
}


def codec_for(spec: str) -> Codec:
    """The codec that ``spec`` names: ``fp16``, or with an option after a colon. Raises ``UnknownCodec``."""
    name, _, option = spec.partition(":")
    if name not in CODECS:
        raise UnknownCodec(unknown("codec", name, CODECS))
    return CODECS[name](option)
