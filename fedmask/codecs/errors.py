"""Why bytes were refused. Each is one line: what was expected, what was found, what to do."""

from __future__ import annotations

from fedmask.errors import EnvelopeError


class NotAnEnvelope(EnvelopeError):
    """The bytes do not begin with the envelope's magic."""


class UnknownVersion(EnvelopeError):
    """An envelope of a format version that this reader does not know."""


class Truncated(EnvelopeError):
    """Fewer bytes than the message says or needs."""


class WrongLength(EnvelopeError):
    """A number of bytes or values other than the one that was declared or agreed."""


class BadChecksum(EnvelopeError):
    """The bytes changed on their way."""


class UnknownCodec(EnvelopeError):
    """A codec that is not registered here."""


class WrongLayout(EnvelopeError):
    """Segments (names, order or sizes) other than the receiver's."""


class WrongDigest(EnvelopeError):
    """An update made on another mask."""


class StaleRound(EnvelopeError):
    """An update of another round."""


class NotFinite(EnvelopeError):
    """A NaN or an infinity among the values."""


class AbsurdScale(EnvelopeError):
    """A value far beyond any sound change of a weight."""


class OutOfRange(EnvelopeError):
    """A value that the chosen codec cannot carry."""


class Malformed(EnvelopeError):
    """Bytes that pass the checksum but do not follow the codec's own rules."""
