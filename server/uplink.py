"""What a client's reply lives on: the run's mask, the round's, or the client's own, which it brings once."""

from __future__ import annotations

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ConfigRecord, Message

from fedmask.channel import Terms
from fedmask.codecs import unpack_indices
from fedmask.flower import CONFIG, INDICES, SECONDS, RecordError
from fedmask.masks import Mask, mask_from_indices
from fedmask.workspace import Workspace
from server.state import RunState


def own_mask(
    message: Message, workspace: Workspace, state: RunState, client: int
) -> tuple[Mask | None, dict[str, float] | None]:
    """The mask of a client that has one of its own, and what came with it if the reply brings it.

    (None, None) in a run whose masks all parties know. Raises ``EnvelopeError`` or ``CheckpointError`` for
    bytes that are no mask of the run's size.
    """
    rule = workspace.rule
    if not workspace.config.has_views or workspace.config.mask_schedule != "fixed" or rule is None:
        return None, None
    known = state.holders.masks.get(client)
    if known is not None:
        return Mask(known, workspace.space, rule), None
    record = message.content.get(CONFIG)
    data = record.get(INDICES) if isinstance(record, ConfigRecord) else None
    seconds = record.get(SECONDS) if isinstance(record, ConfigRecord) else None
    if not isinstance(data, bytes):
        raise RecordError("expected the client's mask with its first update, found none")
    if not isinstance(seconds, float) or not 0 <= seconds < 1e9:
        raise RecordError(f"{SECONDS}: expected a number of seconds, found {seconds!r}")
    indices = unpack_indices(data, workspace.space.size, count=workspace.k)
    return mask_from_indices(indices, workspace.space, rule), {SECONDS: seconds}


def up_terms(workspace: Workspace, state: RunState, client: int, own: Mask | None) -> Terms:
    """What the values of a client's reply to the round after ``state`` must mean."""
    if not workspace.config.has_views:
        return workspace.up_terms(client, state.round + 1)
    mask = own if own is not None else workspace.schedule.mask(state.round + 1)
    return workspace.union_terms(client, state.positions(workspace)).trained(mask)
