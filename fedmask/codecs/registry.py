"""The value codecs by name. A new one is a file with the contract of ``Codec`` and a line here.

A spec is ``name`` or ``name:option``, and behind either ``+ef`` for error feedback: ``fp16``, ``int4+ef``,
``int8:64``, ``topk:0.05/int8``. ``sign`` and ``topk`` have it unasked; ``topk:0.25+noef`` is top-k without,
where what is left out is lost (as in FLASC, arXiv 2406.05233).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedmask.codecs.base import Codec
from fedmask.codecs.errors import UnknownCodec
from fedmask.codecs.feedback import Feedback
from fedmask.codecs.huffman import Huffman
from fedmask.codecs.plain import Bf16, Fp16, Fp32
from fedmask.codecs.quantized import Quantized
from fedmask.codecs.sign import Sign
from fedmask.codecs.topk import TopK
from fedmask.errors import unknown

CODECS: dict[str, Callable[[str], Codec]] = {
    "fp32": Fp32,
    "fp16": Fp16,
    "bf16": Bf16,
    "int8": partial(Quantized, 8),
    "int4": partial(Quantized, 4),
    "int2": partial(Quantized, 2),
    "int8h": partial(Huffman, partial(Quantized, 8)),
    "int4h": partial(Huffman, partial(Quantized, 4)),
    "int2h": partial(Huffman, partial(Quantized, 2)),
    "sign": Sign,
    "topk": partial(TopK, lambda: CODECS),
}


def codec_for(spec: str) -> Codec:
    """The codec that ``spec`` names, with what a sender needs. Raises ``UnknownCodec``."""
    body, plus, suffix = spec.partition("+")
    if plus and suffix not in ("ef", "noef"):
        raise UnknownCodec(f"codec {spec!r}: expected nothing, 'ef' or 'noef' after '+', found {suffix!r}")
    codec = bare_codec(body)
    if suffix == "noef" and codec.name != "topk":
        raise UnknownCodec(f"codec {spec!r}: only 'topk' goes without feedback; write {body!r}")
    return Feedback(codec) if suffix == "ef" or (codec.biased and suffix != "noef") else codec


def bare_codec(body: str) -> Codec:
    """The codec of ``name`` or ``name:option`` without feedback, for who makes up for its losses."""
    name, _, option = body.partition(":")
    return _named(name)(option)


def decoder_for(name: str) -> Codec:
    """The codec of that name in an envelope; only its ``decode`` is of use. Raises ``UnknownCodec``."""
    return _named(name)("")


def _named(name: str) -> Callable[[str], Codec]:
    if name not in CODECS:
        raise UnknownCodec(unknown("codec", name, CODECS))
    return CODECS[name]
