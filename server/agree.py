"""One mask from labelled rows for a whole run: found by the clients together, or by the server alone.

Either way it is sent packed to every client, and from then on the run is that of any shared mask. What
finding it took besides bytes (rows, seconds) is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedmask.codecs import pack_indices, unpack_indices
from fedmask.errors import ConfigError, FederationError, FedmaskError
from fedmask.flower import ARRAYS, CONFIG, MASK, QUERY_SCORES, SECONDS, RecordError, record_bytes
from fedmask.ledger import Ledger
from fedmask.masks import Mask, Rule, agree_by_scores, agree_by_votes
from fedmask.masks.votes import unpack_top_scores, unpack_votes
from fedmask.methods import TASK_SPECIFIC
from fedmask.workspace import Workspace
from server.exchange import Answer, Request, enter, exchange, most_bytes
from server.joining import Roster, send_mask
from server.record import sync

Facts = dict[str, Any]
MASK_FILE = "mask.bin"


def needs_agreement(workspace: Workspace) -> bool:
    """Whether one mask has to be found before the run's vectors have a length."""
    return workspace.config.method in TASK_SPECIFIC and not workspace.config.has_views


def find_mask(
    grid: Grid, workspace: Workspace, roster: Roster, ledger: Ledger, arrived: Callable[[int], None]
) -> Facts:
    """Find the mask, let ``workspace`` use it, and return what that took.

    ``arrived(client)`` is called once an answer. Raises ``FederationError`` when fewer than
    ``server.min_replies`` clients gave usable scores.
    """
    began, rule = time.monotonic(), workspace.rule
    if rule is None:
        raise FederationError("expected a method with a mask, found none")
    if workspace.config.placement == "server":
        mask = workspace.public_scores().mask(rule)
        facts: Facts = {"clients": 0, "seconds": time.monotonic() - began, "refused": []}
    else:
        mask, facts = _agree(grid, workspace, roster, ledger, arrived, rule)
    workspace.use_mask(mask.indices)
    return {"placement": workspace.config.placement, "rule": rule.name, **facts}


def keep_mask(workspace: Workspace, folder: Path) -> None:
    """Write the mask in use into the run's folder, packed: a run that goes on does not search again."""
    if workspace.mask is not None:
        space = workspace.space
        (folder / MASK_FILE).write_bytes(pack_indices(workspace.mask.indices, space.size, space.offsets))
        sync(folder / MASK_FILE)


def kept_mask(workspace: Workspace, folder: Path) -> None:
    """Let ``workspace`` use the mask that ``keep_mask`` wrote. Raises ``FedmaskError``."""
    try:
        data = (folder / MASK_FILE).read_bytes()
    except OSError as error:
        raise ConfigError(f"{folder / MASK_FILE}: cannot be read ({error.strerror})") from None
    workspace.use_mask(unpack_indices(data, workspace.space.size))


def distribute(grid: Grid, workspace: Workspace, roster: Roster, ledger: Ledger) -> None:
    """Send the mask in use to every client, packed."""
    send_mask(grid, workspace, ledger, roster, sorted(roster.nodes))


def _agree(
    grid: Grid,
    workspace: Workspace,
    roster: Roster,
    ledger: Ledger,
    arrived: Callable[[int], None],
    rule: Rule,
) -> tuple[Mask, Facts]:
    config = workspace.config
    read, agree = {
        "votes": (unpack_votes, agree_by_votes),
        "scores": (unpack_top_scores, agree_by_scores),
    }[config.agree_by]
    question = RecordDict({CONFIG: ConfigRecord({"kind": config.agree_by})})
    requests = [Request(node, client, question) for client, node in sorted(roster.nodes.items())]
    found: dict[int, bytes] = {}
    seconds = 0.0

    def came(answer: Answer) -> None:
        nonlocal seconds
        if answer.reply is not None:
            try:
                data, took = _read(answer.reply)
                read(data, workspace.space, rule)
            except FedmaskError as error:
                answer.fail("rejected", str(error))
            else:
                found[answer.client], seconds = data, seconds + took
                answer.reply = None
        arrived(answer.client)

    most = most_bytes(workspace.k)
    answers = exchange(grid, requests, QUERY_SCORES, config.server.timeout, came, most=most)
    enter(ledger, 0, "mask", answers)
    refused = [{"client": a.client, "reason": a.reason} for a in answers if a.status != "ok"]
    if len(found) < config.server.min_replies:
        reasons = "; ".join(f"client {one['client']}: {one['reason']}" for one in refused[:5])
        raise FederationError(
            f"mask: expected scores of at least {config.server.min_replies} clients (server.min_replies),"
            f" found {len(found)} ({reasons})"
        )
    mask = agree(found, workspace.space, rule)
    return mask, {"clients": len(found), "seconds": seconds, "refused": refused}


def _read(message: Message) -> tuple[bytes, float]:
    """A client's scores or votes, and the seconds that they took it."""
    arrays = message.content.array_records.get(ARRAYS)
    numbers = message.content.config_records.get(CONFIG)
    seconds = numbers.get(SECONDS) if numbers is not None else None
    if not isinstance(arrays, ArrayRecord) or set(message.content) != {ARRAYS, CONFIG}:
        raise RecordError(f"expected records {ARRAYS!r} and {CONFIG!r}, found {sorted(message.content)[:4]}")
    if not isinstance(seconds, float) or not 0 <= seconds < 1e9:
        raise RecordError(f"{SECONDS}: expected a number of seconds, found {seconds!r}")
    return record_bytes(arrays, MASK), seconds
