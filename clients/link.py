"""Receiving and sending vectors: ``fedmask.channel``, with what a client keeps in Flower's ``context.state``.

A SuperNode runs each message in a new process, so nothing else lives on; and where that state is lost (a
restarted SuperNode) the client is told all again, and carries no residual.
"""

from __future__ import annotations

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, Context, RecordDict

from fedmask.channel import Received, Residual, Terms, down_way, receive, up_codec
from fedmask.codecs import encode_update
from fedmask.flower import CONFIG, COUNTED, RecordError, bytes_record, record_bytes
from fedmask.rng import rng_for
from fedmask.workspace import Workspace

# Two records: the received vector is the same for all clients that hold its version, and is stored as one.
RECEIVED, RESIDUAL, NOTES = "received", "residual", "notes"
_BEFORE, _AFTER = "before", "after"


def received(workspace: Workspace, context: Context, client: int, frame: bytes, version: int) -> np.ndarray:
    """The server's vector of ``version``, float32 ``[n]``, remembered where later changes build on it.

    Raises ``Behind`` when ``frame`` holds changes of a vector that this client does not have.
    """
    keeps = down_way(workspace.config.down).change
    # A node that was started again may derive another mask than the one that it had been sent before.
    keeps_mask = _notes(context).get("mask", workspace.digest) == workspace.digest
    held = (held_vector(context) if keeps and keeps_mask else None) or _nothing(workspace, client)
    found = receive(
        frame,
        held,
        version,
        lambda at: workspace.change_terms(client, at),
        workspace.down_terms(client, version),
    )
    if keeps:
        keep_vector(context, found)
        _note(context, {"mask": workspace.digest})
    return found.vector


def held_version(context: Context) -> int:
    """The version of the received vector that is kept; 0, the pre-trained model, is known to all."""
    if not isinstance(context.state.get(RECEIVED), ArrayRecord):
        return 0
    return _noted(context, "version")


def packed_change(
    workspace: Workspace, context: Context, client: int, content: RecordDict, change: np.ndarray
) -> bytes:
    """The envelope of a client's change, float32 ``[n]``; what error feedback carries on is remembered.

    ``content``: of the message that it answers, with the round and, where a reply was not used, the last one
    that counted. What the server alone changes stands first in the change, and is not sent.
    """
    terms = workspace.up_terms(client, round_of(content))
    own = change[change.size - terms.layout.size :]
    return encoded(workspace, context, client, content, own, terms)


def encoded(
    workspace: Workspace,
    context: Context,
    client: int,
    content: RecordDict,
    change: np.ndarray,
    terms: Terms,
) -> bytes:
    """The same for values, float32 ``[n]``, that mean what ``terms`` say."""
    codec, round = up_codec(workspace.config.up), round_of(content)
    before = _residual(context, terms, round, _number(content, COUNTED)) if codec.keeps_state else None
    envelope, after = encode_update(
        change,
        terms.layout,
        codec=codec,
        digest=terms.digest,
        round=round,
        state=before,
        generator=rng_for(workspace.config.seed, round, client, "codec"),
    )
    if codec.keeps_state and after is not None:
        kept = Residual.of(round, before, after)
        context.state[RESIDUAL] = ArrayRecord(
            {
                name: bytes_record(part, name)[name]
                for name, part in ((_BEFORE, kept.before), (_AFTER, kept.after))
            }
        )
        _note(context, {"round": round, "digest": terms.digest})
    return envelope


def held_vector(context: Context) -> Received | None:
    """What was received last and is kept; None for nothing."""
    record = context.state.get(RECEIVED)
    if not isinstance(record, ArrayRecord):
        return None
    return Received(_noted(context, "version"), np.frombuffer(record_bytes(record, RECEIVED), "<f4"))


def keep_vector(context: Context, found: Received) -> None:
    """Remember what was received."""
    context.state[RECEIVED] = bytes_record(found.vector.tobytes(), RECEIVED)
    _note(context, {"version": found.version})


def _nothing(workspace: Workspace, client: int) -> Received:
    return Received(0, np.zeros(workspace.down_terms(client, 0).layout.size, np.float32))


def round_of(content: RecordDict) -> int:
    """The round that a message belongs to. Raises ``RecordError``."""
    found = _number(content, "round")
    if found is None:
        raise RecordError("round: expected a whole number, found none")
    return found


def _number(content: RecordDict, key: str) -> int | None:
    said = content.get(CONFIG)
    found = said.get(key) if isinstance(said, ConfigRecord) else None
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise RecordError(f"{key}: expected a whole number, found {found!r}")
    return found


def _residual(context: Context, terms: Terms, round: int, counted: int | None) -> np.ndarray | None:
    """The residual to begin with: none of another mask, whose entries are others."""
    record, notes = context.state.get(RESIDUAL), context.state.get(NOTES)
    if not isinstance(record, ArrayRecord) or not isinstance(notes, ConfigRecord):
        return None
    if notes.get("digest") != terms.digest:
        return None
    before, after = (record_bytes(ArrayRecord({name: record[name]}), name) for name in (_BEFORE, _AFTER))
    found = Residual(_noted(context, "round"), before, after).at_start_of(round, counted)
    return found if found is None or found.size == terms.layout.size else None


def _notes(context: Context) -> dict[str, ConfigRecordValues]:
    notes = context.state.get(NOTES)
    return dict(notes) if isinstance(notes, ConfigRecord) else {}


def _note(context: Context, more: dict[str, int | str]) -> None:
    context.state[NOTES] = ConfigRecord({**_notes(context), **more})


def _noted(context: Context, key: str) -> int:
    found = _notes(context).get(key)
    if not isinstance(found, int):
        raise RecordError(f"this client's state: expected a whole number as {key!r}, found {found!r}")
    return found
