"""A client's part where the trained entries differ between rounds or clients.

It keeps the run's change at all entries that it has heard of, trains its own of them and sends those alone.
What it keeps is in Flower's ``context.state``; where that is lost it says so and is told all again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from clients.link import encoded, held_vector, keep_vector
from clients.specific import own_mask
from fedmask.channel import Behind, Received, Terms, receive
from fedmask.codecs import pack_indices
from fedmask.errors import CheckpointError
from fedmask.flower import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    INDICES,
    PLACES,
    SECONDS,
    RecordError,
    bytes_record,
    record_bytes,
    reply_content,
)
from fedmask.masks import Mask
from fedmask.positions import Positions, Told, read_positions, told_positions
from fedmask.unions import SparseChange
from fedmask.views import View, view_of
from fedmask.workspace import Workspace

OWN, UNION = "own-mask", "union"


@dataclass(frozen=True, eq=False)
class Known:
    """``vector`` float32: values at ``indices`` (int64), then what is trained besides, then the head."""

    indices: np.ndarray
    vector: np.ndarray
    positions: Positions

    @property
    def change(self) -> SparseChange:
        """The run's change at the known entries."""
        return SparseChange(self.indices, self.vector[: self.indices.size])

    @property
    def beside(self) -> np.ndarray:
        """All other values: float32, flat."""
        return self.vector[self.indices.size :]


def trained(
    workspace: Workspace, context: Context, client: int, content: RecordDict, round: int
) -> RecordDict:
    """The answer to a ``train`` message. Raises ``Behind`` and ``FedmaskError``."""
    moving = workspace.config.mask_schedule != "fixed"
    found = None if moving else _own(workspace, context, client)
    known = _receive(workspace, context, client, content, round - 1, found[0] if found else None)
    mask = found[0] if found else workspace.schedule.mask(round)
    view = view_of(known.change, mask)
    update = workspace.local_update(client, round, view.read(known.change, known.beside), view)
    terms = workspace.union_terms(client, known.positions).trained(mask)
    envelope = encoded(workspace, context, client, content, view.sent(update.change), terms)
    answer = reply_content(envelope, {EXAMPLES: update.examples, **update.metrics})
    if found and not _told(workspace, content).own:  # the server does not know the mask yet
        space = workspace.space
        packed = pack_indices(mask.indices, space.size, space.offsets)
        answer[CONFIG] = ConfigRecord({INDICES: packed, SECONDS: found[1]})
    return answer


def scored(
    workspace: Workspace, context: Context, client: int, content: RecordDict, version: int
) -> dict[str, float]:
    """Loss and metric of the run's state on this client's held-out rows; nothing without rows."""
    moving = workspace.config.mask_schedule != "fixed"
    mask = None if moving else _own(workspace, context, client)[0]
    known = _receive(workspace, context, client, content, version, mask)
    rows, view = workspace.shard(client).held_out, View(workspace.no_mask, known.indices)
    if not len(rows):
        return {}
    return workspace.evaluate(workspace.task_of(client), known.vector, rows, view)


def _receive(
    workspace: Workspace, context: Context, client: int, content: RecordDict, version: int, own: Mask | None
) -> Known:
    beside = workspace.layout(workspace.task_of(client))
    nothing = np.zeros(beside.size, np.float32)
    held = held_vector(context) or Received(0, nothing)
    if held.version > version:  # the run went back to an earlier state: what is held is of no use to it
        held = Received(0, nothing)
    positions = workspace.positions if own is None else _positions(workspace, context, content, held, own)
    terms = workspace.union_terms(client, positions)

    def change(at: int) -> Terms:
        try:
            return terms.change(at)
        except KeyError:
            raise RecordError(f"expected the positions of version {at} with its change, found none") from None

    arrays = content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord):
        raise RecordError(f"expected an ArrayRecord called {ARRAYS!r}, found {sorted(content)[:4]}")
    found = receive(record_bytes(arrays), held, version, change, terms.whole(version))
    keep_vector(context, found)
    indices = positions.known(version)
    if own is not None:
        context.state[UNION] = bytes_record(indices.astype("<i8").tobytes(), UNION)
    if found.vector.size != indices.size + nothing.size:
        raise CheckpointError(
            f"expected {indices.size} values of the union and {nothing.size} more, found {found.vector.size}"
        )
    return Known(indices, found.vector, positions)


def _positions(
    workspace: Workspace, context: Context, content: RecordDict, held: Received, own: Mask
) -> Positions:
    told = _told(workspace, content)
    record = context.state.get(UNION)
    known = np.empty(0, np.int64)
    if isinstance(record, ArrayRecord) and held.version:
        known = np.frombuffer(record_bytes(record, UNION), "<i8").astype(np.int64)
    if not told.held <= held.version <= told.version or (held.version and not known.size):
        at = held.version if known.size else 0
        raise Behind(at, f"positions: expected to hold version {told.held}, found {at}")
    return told_positions(told, held.version, known, own.indices)


def _told(workspace: Workspace, content: RecordDict) -> Told:
    config = content.get(CONFIG)
    data = config.get(PLACES) if isinstance(config, ConfigRecord) else None
    if not isinstance(data, bytes):
        raise RecordError(f"{PLACES}: expected the positions of the union, found none")
    return read_positions(data, workspace.space)


def _own(workspace: Workspace, context: Context, client: int) -> tuple[Mask, float]:
    """This client's own mask, found once, and the seconds that it took (0 when it was kept)."""
    record, rule = context.state.get(OWN), workspace.rule
    if isinstance(record, ArrayRecord) and rule is not None:
        indices = np.frombuffer(record_bytes(record, OWN), "<i8").astype(np.int64)
        return Mask(indices, workspace.space, rule), 0.0
    mask, seconds = own_mask(workspace, client)
    context.state[OWN] = bytes_record(mask.indices.astype("<i8").tobytes(), OWN)
    return mask, seconds
