"""Which partition a node holds: numbered by who runs it, or claimed.

A node whose config has a ``partition-id`` holds that one. Any other node keeps the one that it had in this
run (the folder FEDMASK_STATE remembers it, so a restarted node gets its own again), else takes what the
server offers with the join message.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Literal

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ConfigRecord, Context

from fedmask.config import RunConfig
from fedmask.errors import ConfigError
from fedmask.flower import NOT_JOINED, SEAT, TAKE, RecordError

How = Literal["numbered", "kept", "offered"]
_RUNS_KEPT = 64


def claim_seat(context: Context, config: RunConfig, offer: ConfigRecord) -> tuple[int, How] | None:
    """The partition that this node holds from now on, and how it came to it; None: there is none for it.

    Raises ``ConfigError`` for a partition-id that is no number.
    """
    numbered = _numbered(context, config)
    if numbered is not None:
        return numbered, "numbered"
    told, kept = _number(offer.get(TAKE)), _kept(config)
    if told is None and kept is not None and kept < config.clients:
        _keep_in_state(context, kept)
        return kept, "kept"
    seat = told if told is not None else _number(offer.get(SEAT))
    if seat is None:
        return None
    _keep_in_state(context, seat)
    _keep_on_disk(config, seat)
    return seat, "offered"


def seat_of(context: Context, config: RunConfig) -> int:
    """The partition of a node that has joined. Raises ``RecordError`` for one that has not."""
    numbered = _numbered(context, config)
    if numbered is not None:
        return numbered
    state = context.state.get(SEAT)
    found = _number(state.get(SEAT)) if isinstance(state, ConfigRecord) else None
    if found is None:  # the SuperNode was started again, and what Flower kept for it is gone
        raise RecordError(f"{NOT_JOINED}: it has no partition yet")
    return found


def _numbered(context: Context, config: RunConfig) -> int | None:
    found = context.node_config.get("partition-id")
    if found is None:
        return None
    number = _number(found)
    if number is None:
        raise ConfigError(
            f"this node's partition-id: expected 0 to {config.clients - 1}, found {found!r}; start its"
            f" SuperNode with --node-config 'partition-id=0 num-partitions={config.clients}', or without one"
            " to be given a partition"
        )
    return number


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _keep_in_state(context: Context, seat: int) -> None:
    context.state[SEAT] = ConfigRecord({SEAT: seat})


def _file() -> Path | None:
    folder = os.environ.get("FEDMASK_STATE")
    if not folder:
        return None
    node = os.environ.get("FEDMASK_NODE") or socket.gethostname()
    return Path(folder) / "seats" / (re.sub(r"[^A-Za-z0-9.-]", "_", node) + ".json")


def _seats(file: Path) -> dict[str, int]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: the server offers one
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: seat for name, seat in pairs if _number(seat) is not None}


def _kept(config: RunConfig) -> int | None:
    file = _file()
    return _seats(file).get(config.name) if file else None


def _keep_on_disk(config: RunConfig, seat: int) -> None:
    file = _file()
    if file is None:
        return
    seats = _seats(file)
    seats.pop(config.name, None)
    seats[config.name] = seat
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(dict(list(seats.items())[-_RUNS_KEPT:])), encoding="utf-8")
    os.replace(part, file)
