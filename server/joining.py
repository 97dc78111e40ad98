"""Who takes part: waiting for nodes, learning which partition each holds, agreeing on the mask."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedmask.codecs import pack_indices
from fedmask.errors import EnvelopeError, FederationError
from fedmask.flower import (
    AFTER,
    ARRAYS,
    KERNEL,
    MASK,
    PRECISION,
    QUERY_JOIN,
    QUERY_MASK,
    RECIPE,
    bytes_record,
)
from fedmask.ledger import Ledger
from fedmask.methods import TASK_SPECIFIC
from fedmask.workspace import Workspace
from server.exchange import Answer, Note, Request, enter, exchange, no_note
from server.journal import Journal
from server.replies import Joined, read_join
from server.seats import claimed, numbered_first, seat_offers, told_offers, whom_to_ask

# A node that comes back answers soon or not at all: the others wait for it.
REJOIN_SECONDS = 120.0
_LISTS = 4000  # characters of a refusal with the task's labels and the client's, which can be many
log = logging.getLogger("flwr")


@dataclass
class Roster:
    """``nodes``: partition -> node id of the clients that take part; ``failed``: the others, with reasons;
    ``seen``: the ids of all nodes that were asked; ``mute``: of those that did not answer, the round before
    which they are not asked again, and for how many rounds they were not; ``after``: Flower's numbers of the
    runs that this one goes on from.

    ``rows``: partition -> the rows that a client with data of its own says it has (trained on, held out).
    ``held``: partition -> the version that the client holds of what an earlier process of this run sent.
    """

    nodes: dict[int, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    rows: dict[int, tuple[int, int]] = field(default_factory=dict)
    failed: list[dict[str, int | str]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    mute: dict[int, tuple[int, int]] = field(default_factory=dict)
    after: tuple[int, ...] = ()

    def note_mute(self, round: int, answers: list[Answer]) -> None:
        """Let nodes that did not answer rest for 2 rounds, then 4, 8, ...: each time costs a wait."""
        for answer in answers:
            if answer.message_id:
                rest = 2 * self.mute.get(answer.request.node, (0, 1))[1]
                self.mute[answer.request.node] = round + rest, rest


def wait_for_nodes(grid: Grid, wanted: int, timeout: float) -> list[int]:
    """The ids of all nodes, sorted, as soon as ``wanted`` are there.

    Flower's strategies size their sample before the nodes have arrived. Raises ``FederationError``
    after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    pause, told = 0.02, time.monotonic()
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= wanted:
            return nodes
        now = time.monotonic()
        if now >= deadline:
            raise FederationError(
                f"expected {wanted} nodes, found {len(nodes)} after {timeout:g} s: start the missing"
                f" SuperNodes, or simulate enough of them with --federation-config 'num-supernodes={wanted}'"
            )
        if now - told >= 5.0:
            log.info("waiting for nodes: %d of %d are here", len(nodes), wanted)
            told = now
        time.sleep(min(pause, deadline - now))
        pause = min(2 * pause, 1.0)


def join(
    grid: Grid,
    workspace: Workspace,
    ledger: Ledger,
    *,
    node_timeout: float,
    arrived: Callable[[int], None],
    claims: bool = False,
    after: Sequence[int] = (),
) -> Roster:
    """Offer recipe, precision and kernel to every node, learn its partition, send the mask where needed.

    ``arrived(client)`` is called once an answer. ``claims``: nodes may be without a number and are then
    offered a seat (see ``server.seats``). ``after``: see ``Roster``. Raises ``FederationError`` when a client
    holds another checkpoint, when two nodes claim one partition, or when fewer than ``server.min_replies``
    are left.
    """
    config = workspace.config
    offered = _offered(workspace, after)
    nodes = wait_for_nodes(grid, config.clients, node_timeout)
    offers = seat_offers(nodes, range(config.clients) if claims else (), offered)
    answers = exchange(
        grid,
        [Request(node, -1, offer) for node, offer in offers.items()],
        QUERY_JOIN,
        config.server.join_timeout,
        lambda answer: arrived(answer.client),
    )
    roster = Roster(seen=set(nodes), after=tuple(after))
    roster.note_mute(0, answers)
    needing, standing = _seat(workspace, answers, roster)
    enter(ledger, 0, "mask", answers)
    free = [seat for seat in range(config.clients) if seat not in roster.nodes]
    if claims and (again := told_offers(standing, free, offered)):
        requests = [Request(node, -1, offer) for node, offer in again.items()]
        answers = exchange(grid, requests, QUERY_JOIN, config.server.join_timeout)
        needing += _seat(workspace, answers, roster)[0]
        enter(ledger, 0, "mask", answers)
    _refuse_gaps(config.clients, answers, roster)
    if needing:
        send_mask(grid, workspace, ledger, roster, needing)
    if len(roster.nodes) < config.server.min_replies:
        reasons = "; ".join(f"client {one['client']}: {one['reason']}" for one in roster.failed[:5])
        raise FederationError(
            f"expected at least {config.server.min_replies} clients (server.min_replies),"
            f" {len(roster.nodes)} joined ({reasons})"
        )
    return roster


def rejoin(
    grid: Grid,
    workspace: Workspace,
    ledger: Ledger,
    roster: Roster,
    round: int,
    lost: set[int],
    journal: Journal | None = None,
) -> dict[int, int]:
    """Before ``round``: let nodes that came (back) meanwhile take their seats; the versions that these hold.

    Never ends the run.

    ``lost``: clients that answered that they do not know the run. A node that holds the seat of another one
    is that one, started again: it takes the place.
    """
    config = workspace.config
    online = set(grid.get_node_ids())
    ask, free = whom_to_ask(online, roster.nodes, roster.seen, lost, config.clients)
    ask = [node for node in ask if roster.mute.get(node, (0, 1))[0] <= round]
    if not ask:
        return {}
    roster.seen.update(ask)
    offered = _offered(workspace, roster.after)
    held = {node: seat for seat, node in roster.nodes.items()}
    again = {node: held[node] for node in ask if node in held}
    others = [node for node in ask if node not in again]
    offers = seat_offers(others, [seat for seat in free if seat not in again.values()], offered)
    for node, seat in again.items():
        offers |= told_offers([node], [seat], offered)
    requests = [Request(node, -1, offer) for node, offer in offers.items()]
    seconds, note = min(config.server.timeout, REJOIN_SECONDS), _note(journal, round)
    answers = exchange(grid, requests, QUERY_JOIN, seconds, note=note)
    roster.note_mute(round, answers)
    found, needing = Roster(), []
    for answer in numbered_first(answers):
        try:
            needing += _seat(workspace, [answer], found)[0]
        except FederationError as error:  # another checkpoint, or a seat that is taken: it stays out
            answer.fail("rejected", str(error))
            log.warning("fedmask: %s", error)
    enter(ledger, round, "mask", answers)
    roster.nodes |= found.nodes
    roster.held |= found.held
    roster.rows |= found.rows
    for seat, node in sorted(found.nodes.items()):
        log.info("fedmask: client %d is back (node %d)", seat, node)
    if needing:
        send_mask(grid, workspace, ledger, roster, needing, round, journal)
    return found.held


def _note(journal: Journal | None, round: int) -> Note:
    return partial(journal.note, round, "mask") if journal else no_note


def _offered(workspace: Workspace, after: Sequence[int]) -> dict[str, str | list[str]]:
    recipe = workspace.recipe() if workspace.config.method not in TASK_SPECIFIC else None
    offered: dict[str, str | list[str]] = {RECIPE: recipe.to_json() if recipe else ""}
    offered |= {PRECISION: workspace.precision, KERNEL: workspace.kernel}
    return offered | ({AFTER: [str(run) for run in after]} if after else {})


def _seat(workspace: Workspace, answers: list[Answer], roster: Roster) -> tuple[list[int], list[int]]:
    """Fill the roster from the answers: partitions that need the packed mask, and nodes without a seat."""
    needing, standing = [], []
    for answer in numbered_first(answers):
        said = _read(answer)
        if said is None:
            # Only an answer tells a node's partition, so all that is known here is the node.
            reason = f"node {answer.request.node}: {answer.reason}"
            roster.failed.append({"client": answer.client, "reason": reason})
            continue
        if said.partition < 0 or (said.partition >= workspace.config.clients and said.status != "spare"):
            answer.fail("rejected", f"no client has the partition {said.partition}")
            roster.failed.append({"client": -1, "reason": f"node {answer.request.node}: {answer.reason}"})
            continue
        if said.status == "spare":
            standing += [answer.request.node] if said.partition == workspace.config.clients else []
            continue
        answer.client = said.partition
        if said.status == "unable":
            answer.fail("rejected", said.reason, _LISTS)
            roster.failed.append({"client": said.partition, "reason": answer.reason})
            continue
        if said.checkpoint != workspace.checkpoint_digest or said.status == "refused":
            raise FederationError(
                f"client {said.partition} refuses: this federation tunes the checkpoint"
                f" {workspace.checkpoint_digest}, the client holds {said.checkpoint}; use the same"
                " pre-trained weights on every machine"
            )
        if workspace.is_own(said.partition):
            most = workspace.config.task_of(said.partition).most_rows
            if said.rows is None or sum(said.rows) > most:
                answer.fail("rejected", f"expected at most {most} rows (tasks.most_rows), found {said.rows}")
                roster.failed.append({"client": said.partition, "reason": answer.reason})
                continue
        if said.partition in roster.nodes and claimed(answer):
            standing.append(answer.request.node)
            continue
        if said.partition in roster.nodes:
            raise FederationError(
                f"two nodes hold partition {said.partition} (ids {roster.nodes[said.partition]} and"
                f" {answer.request.node}): give each SuperNode a partition-id of its own"
            )
        roster.nodes[said.partition] = answer.request.node
        roster.held[said.partition] = said.held
        if said.rows is not None:
            roster.rows[said.partition] = said.rows
        if workspace.mask is not None and (
            workspace.config.mask_transport == "packed"
            or said.digest != workspace.digest
            or workspace.config.method in TASK_SPECIFIC  # found in an earlier process of this run
        ):
            needing.append(said.partition)
    return needing, standing


def _refuse_gaps(wanted: int, answers: list[Answer], roster: Roster) -> None:
    # A node that failed could have held a missing partition; without failures the numbering is wrong.
    missing = [partition for partition in range(wanted) if partition not in roster.nodes]
    if missing and not roster.failed:
        raise FederationError(
            f"{len(answers)} nodes answered, but none holds partition {missing[0]}: number the SuperNodes'"
            f" partition-id from 0 to {wanted - 1}"
        )


def send_mask(
    grid: Grid,
    workspace: Workspace,
    ledger: Ledger,
    roster: Roster,
    clients: list[int],
    round: int = 0,
    journal: Journal | None = None,
) -> None:
    """Send the packed mask to some partitions before ``round``; who does not confirm it leaves the roster."""
    mask = workspace.mask
    if mask is None:
        return
    packed = pack_indices(np.asarray(mask.indices), mask.space.size, boundaries=mask.space.offsets)
    content = RecordDict({ARRAYS: bytes_record(packed, MASK)})
    requests = [Request(roster.nodes[client], client, content) for client in sorted(clients)]
    server = workspace.config.server
    seconds = server.timeout if round else server.join_timeout
    answers = exchange(grid, requests, QUERY_MASK, seconds, note=_note(journal, round))
    for answer in answers:
        said = _read(answer)
        if said is not None and (said.digest, said.partition) != (mask.digest, answer.client):
            answer.fail("rejected", f"confirmed the mask {said.digest[:16]}, not {mask.digest[:16]}")
        if answer.reply is None:
            roster.nodes.pop(answer.client)
            roster.failed.append({"client": answer.client, "reason": answer.reason})
    enter(ledger, round, "mask", answers)


def _read(answer: Answer) -> Joined | None:
    if answer.reply is None:
        return None
    try:
        return read_join(answer.reply)
    except EnvelopeError as error:
        answer.fail("rejected", str(error))
        return None
