"""Whether a container's service answers: ``python -m experiments.healthy URL [CA]``. Exit code 0 if it does.

``https://``, ``http://``: any answer below 400; ``tcp://``: a connection. Standard library only, because it
runs every few seconds.
"""

import contextlib
import socket
import ssl
import sys
import urllib.parse
import urllib.request


def healthy(url: str, authority: str | None = None, seconds: float = 4.0) -> bool:
    """Whether ``url`` answers within ``seconds``; ``authority``: the file of the CA's certificate."""
    where = urllib.parse.urlsplit(url)
    with contextlib.suppress(OSError, ValueError):
        if where.scheme == "tcp":
            with socket.create_connection((where.hostname or "", where.port or 0), seconds):
                return True
        context = ssl.create_default_context(cafile=authority) if authority else None
        with urllib.request.urlopen(url, timeout=seconds, context=context) as answer:
            return bool(answer.status < 400)
    return False


if __name__ == "__main__":
    sys.exit(0 if healthy(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None) else 1)
