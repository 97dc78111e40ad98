"""Start a SuperNode with a key that no other one of this machine uses: ``python -m clients.node OPTIONS``.

The options are those of ``flower-supernode``. FEDMASK_KEYS names a folder of private keys: the process claims
one by a lock that lasts as long as itself, the one that it had before if that is free. FEDMASK_STATE, a
folder that may be shared, holds the locks and what the node remembers. FEDMASK_NODE is the node's name (the
host's, if nothing is said). Programs that the node starts for messages say at once that they are there (see
``clients.early``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from pathlib import Path


def claim_key(keys: Path, locks: Path, node: str) -> tuple[Path, int]:
    """A private key of the folder ``keys`` and the open lock on it, which other processes may not inherit.

    The lock's file holds the name of who had it last. Raises ``SystemExit`` when all keys are taken.
    """
    locks.mkdir(parents=True, exist_ok=True)
    found = sorted(
        (path for path in keys.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)
    )
    owners = {path: _owner(locks / f"{path.name}.lock") for path in found}
    rank = {node: 0, "": 1}  # one's own, then those that nobody had, then anybody's that is free
    for path in sorted(found, key=lambda path: rank.get(owners[path], 2)):
        lock = os.open(locks / f"{path.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(lock, 0)
            os.pwrite(lock, node.encode(), 0)
            return path, lock
        os.close(lock)
    raise SystemExit(
        f"{keys}: all of its {len(found)} keys are taken; make more (CLIENTS in .env says how many)"
    )


def _owner(lock: Path) -> str:
    with contextlib.suppress(OSError):
        return lock.read_text(encoding="utf-8", errors="replace")
    return ""


def main(options: list[str]) -> None:
    """Claim a key, and become the SuperNode."""
    node = os.environ.setdefault("FEDMASK_NODE", socket.gethostname())
    early = str(Path(__file__).resolve().parent / "bin")
    os.environ["PATH"] = os.pathsep.join([early, os.environ.get("PATH", os.defpath)])
    keys = os.environ.get("FEDMASK_KEYS")
    command = ["flower-supernode", *options]
    if keys:
        state = Path(os.environ.get("FEDMASK_STATE", "."))
        path, lock = claim_key(Path(keys), state / "keys", node)
        os.set_inheritable(lock, True)  # over exec; the SuperNode's children close it
        command += ["--auth-supernode-private-key", str(path)]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
