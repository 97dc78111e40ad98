"""The errors that fedmask raises for what users and peers can get wrong.

Every message is one line: what was expected, what was found, what to do. The command line turns
any ``FedmaskError`` into that line and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedmaskError(ValueError):
    """Base of all errors that fedmask raises on purpose."""


class ConfigError(FedmaskError):
    """A setting, name or path that cannot be used."""


class DataError(FedmaskError):
    """Rows, columns, labels or shards that cannot be used."""


class CheckpointError(FedmaskError):
    """Weights that are not the ones expected (another checkpoint, a wrong digest, a damaged file)."""


class EnvelopeError(FedmaskError):
    """Bytes of a message that are refused; subclasses say why."""


class FederationError(FedmaskError):
    """A federation that cannot go on (too few usable replies, too few nodes)."""


def expect(what: str, value: object, kind: type, remedy: str) -> None:
    """ConfigError saying ``remedy`` unless ``value`` is a ``kind``: a wrong argument ends in one line."""
    if not isinstance(value, kind):
        raise ConfigError(f"{what}: expected a {kind.__name__}, found a {type(value).__name__}; {remedy}")


def unknown(what: str, found: str, options: Iterable[str]) -> str:
    """One line for an unknown name: ``unknown method 'paf'; nearest is 'pafi' (all: ...)``."""
    names = list(options)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return f"unknown {what} {found!r}{hint} (valid: {', '.join(names)})"
