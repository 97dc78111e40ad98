"""Updates and mask indices <-> bytes: value codecs, the versioned envelope, packed indices.

numpy, struct and zlib only; nothing is unpickled. Every refusal is a subclass of ``EnvelopeError``.
"""

from fedmask.codecs.base import Codec, State
from fedmask.codecs.envelope import (
    MAX_ABS,
    Header,
    encode_update,
    pack_update,
    payload_bytes,
    read_header,
    unpack_update,
)
from fedmask.codecs.errors import (
    AbsurdScale,
    BadChecksum,
    Malformed,
    NotAnEnvelope,
    NotFinite,
    OutOfRange,
    StaleRound,
    Truncated,
    UnknownCodec,
    UnknownVersion,
    WrongDigest,
    WrongLayout,
    WrongLength,
)
from fedmask.codecs.indices import index_entropy_bytes, pack_indices, unpack_indices
from fedmask.codecs.registry import CODECS, bare_codec, codec_for

__all__ = [
    "CODECS",
    "MAX_ABS",
    "AbsurdScale",
    "BadChecksum",
    "Codec",
    "Header",
    "Malformed",
    "NotAnEnvelope",
    "NotFinite",
    "OutOfRange",
    "StaleRound",
    "State",
    "Truncated",
    "UnknownCodec",
    "UnknownVersion",
    "WrongDigest",
    "WrongLayout",
    "WrongLength",
    "bare_codec",
    "codec_for",
    "encode_update",
    "index_entropy_bytes",
    "pack_indices",
    "pack_update",
    "payload_bytes",
    "read_header",
    "unpack_indices",
    "unpack_update",
]
