"""The ClientApp: reads a message, lets the workspace do the work, answers.

Four kinds of messages: ``query.join`` (here is the mask's recipe, which partition are you?),
``query.mask`` (here is the mask itself), ``train`` and ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import torch

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import union
from clients.heads import keep_own_head, with_own_head
from clients.kept import recall, remember
from clients.link import held_version, packed_change, received, round_of
from clients.seat import claim_seat, seat_of
from clients.specific import own_scores
from fedmask.channel import Behind
from fedmask.codecs import WrongDigest, unpack_indices
from fedmask.config import RunConfig
from fedmask.errors import CheckpointError, DataError, unknown
from fedmask.flower import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    HELD,
    KERNEL,
    MASK,
    NOT_JOINED,
    PRECISION,
    RECIPE,
    ROWS,
    SEAT,
    RecordError,
    behind_content,
    bytes_record,
    config_of,
    record_bytes,
    reply_content,
)
from fedmask.kernels import SETTLED
from fedmask.masks import Recipe, mask_size
from fedmask.precision import PRECISIONS, Precision
from fedmask.tasks.own import own_data
from fedmask.workspace import Workspace, get_workspace

__all__ = ["app", "make_client_app"]

T = TypeVar("T")


def make_client_app(
    config: RunConfig | None = None, default: Callable[[], RunConfig] | None = None
) -> ClientApp:
    """A ClientApp for one run.

    ``config`` None: each message's run config carries it as JSON (``flwr run``), and ``default`` stands
    in for an empty one. The app keeps nothing between messages: a SuperNode starts a process per message.
    """
    app = ClientApp()

    def settings_of(context: Context) -> RunConfig:
        return config if config is not None else config_of(context.run_config, default)

    def enter(context: Context) -> tuple[Workspace, int]:
        settings = settings_of(context)
        # The number of threads decides the gradients' last bits, so it is set here, on every engine.
        torch.set_num_threads(settings.threads)
        workspace = get_workspace(settings)
        workspace.use_precision(_precision(context, settings))
        workspace.use_kernel(_kernel(context, workspace))
        workspace.use_own_data(own_data(context.node_config))
        _use_stored_mask(workspace, context)
        partition = seat_of(context, settings)
        recall(context, partition)
        workspace.prepare(partition)
        return workspace, partition

    @app.query("join")
    def join(message: Message, context: Context) -> Message:
        settings = settings_of(context)
        seat = claim_seat(context, settings, _one(message.content, CONFIG, ConfigRecord))
        if seat is None or seat[0] >= settings.clients:
            answer = ConfigRecord({"partition": seat[0] if seat else settings.clients, "status": "spare"})
            return Message(RecordDict({CONFIG: answer}), reply_to=message)
        recall(context, seat[0], _one(message.content, CONFIG, ConfigRecord))
        _keep_choices(context, settings, message.content)
        try:
            workspace, partition = enter(context)
            reason = workspace.cannot_train()
            if reason:
                return Message(_confirmation(workspace, partition, "unable", reason), reply_to=message)
            rows = _own_rows(workspace, partition)
        except DataError as error:
            refusal = _confirmation(get_workspace(settings), seat[0], "unable", str(error))
            return Message(refusal, reply_to=message)
        said = _join(workspace, partition, message.content)
        if rows:
            said[CONFIG] = ConfigRecord({**said.config_records[CONFIG], ROWS: rows})
        if held := held_version(context):
            said[CONFIG] = ConfigRecord({**said.config_records[CONFIG], HELD: held})
        if seat[1] != "numbered":
            said[CONFIG] = ConfigRecord({**said.config_records[CONFIG], SEAT: seat[1]})
        return Message(said, reply_to=message)

    @app.query("mask")
    def mask(message: Message, context: Context) -> Message:
        workspace, partition = enter(context)
        data = record_bytes(_one(message.content, ARRAYS, ArrayRecord), MASK)
        _receive_mask(workspace, data)
        # Kept in the node's state because nothing of a process lives on between a SuperNode's messages.
        context.state[MASK] = bytes_record(data, MASK)
        context.state[CONFIG] = ConfigRecord({MASK: workspace.digest})
        return Message(_confirmation(workspace, partition, "ok"), reply_to=message)

    @app.query("scores")
    def scores(message: Message, context: Context) -> Message:
        workspace, partition = enter(context)
        kind = str(_one(message.content, CONFIG, ConfigRecord).get("kind"))
        return Message(own_scores(workspace, partition, kind), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        workspace, partition = enter(context)
        round = round_of(message.content)
        try:
            if workspace.config.has_views:
                answer = union.trained(workspace, context, partition, message.content, round)
                remember(context, partition)
                return Message(answer, reply_to=message)
            vector = _vector(workspace, context, partition, message.content, round - 1)
        except Behind as behind:
            return Message(behind_content(behind.held), reply_to=message)
        start = with_own_head(workspace, context, partition, vector, round)
        update = workspace.local_update(partition, round, start)
        change = keep_own_head(context, round, start, update.change, vector.size)
        envelope = packed_change(workspace, context, partition, message.content, change)
        remember(context, partition)
        metrics = {EXAMPLES: update.examples, **update.metrics}
        return Message(reply_content(envelope, metrics), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        workspace, partition = enter(context)
        task, rows = workspace.task_of(partition), workspace.shard(partition).held_out
        version = round_of(message.content)
        try:
            if workspace.config.has_views:
                found = union.scored(workspace, context, partition, message.content, version)
            else:
                vector = _vector(workspace, context, partition, message.content, version)
                vector = with_own_head(workspace, context, partition, vector, version + 1)
                found = workspace.evaluate(task, vector, rows) if len(rows) else {}
        except Behind as behind:
            return Message(behind_content(behind.held), reply_to=message)
        # "score" is the task's metric, under one name for all tasks as in the training replies.
        named = {"global-loss" if key == "loss" else "global-score": value for key, value in found.items()}
        return Message(reply_content(None, {EXAMPLES: len(rows), **named}), reply_to=message)

    return app


def _own_rows(workspace: Workspace, partition: int) -> list[int]:
    """How many rows of its own the client trains on and holds out; empty where the server knows it."""
    if not workspace.is_own(partition):
        return []
    shard = workspace.shard(partition)
    return [len(shard.train), len(shard.held_out)]


def _vector(
    workspace: Workspace, context: Context, partition: int, content: RecordDict, version: int
) -> np.ndarray:
    """What the server sent. ``RecordError`` where it is of a mask that this client must be sent (again)."""
    if workspace.rule is not None and workspace.mask is None:
        raise RecordError(f"{NOT_JOINED}: expected the run's mask before any vector, found none")
    frame = record_bytes(_one(content, ARRAYS, ArrayRecord))
    try:
        return received(workspace, context, partition, frame, version)
    except WrongDigest as error:
        if MASK in context.state:
            raise
        # It derives another mask than the server, and the one that it was sent went with its state.
        raise RecordError(f"{NOT_JOINED}: {error}") from error


def _join(workspace: Workspace, partition: int, content: RecordDict) -> RecordDict:
    """Whether this client holds what the run tunes. The server compares the digests itself, too."""
    offered = str(_one(content, CONFIG, ConfigRecord).get(RECIPE, ""))
    if not offered:
        return _confirmation(workspace, partition, "ok")
    recipe = Recipe.from_json(offered)
    try:
        recipe.check_checkpoint(workspace.checkpoint_digest)
    except CheckpointError as error:
        return _confirmation(workspace, partition, "refused", str(error))
    same = workspace.mask is not None and workspace.mask.digest == recipe.mask
    return _confirmation(workspace, partition, "ok" if same else "other-mask")


def _confirmation(workspace: Workspace, partition: int, status: str, reason: str = "") -> RecordDict:
    answer: dict[str, ConfigRecordValues] = {
        "partition": partition,
        "status": status,
        "digest": workspace.digest,
        "checkpoint": workspace.checkpoint_digest,
    }
    if reason:
        answer["reason"] = reason
    return RecordDict({CONFIG: ConfigRecord(answer)})


def _receive_mask(workspace: Workspace, data: bytes) -> None:
    """Take over a packed mask."""
    if workspace.rule is None:
        raise CheckpointError(f"method {workspace.config.method!r} has no mask to replace")
    count = mask_size(workspace.rule.density, workspace.space.eligible_size)
    workspace.use_mask(unpack_indices(data, workspace.space.size, count=count))


def _keep_choices(context: Context, config: RunConfig, content: RecordDict) -> None:
    """Keep the server's choices in the node's state, unless this node would make the same by itself: each
    message may meet a new process, and a client at rest should cost nothing."""
    offer = _one(content, CONFIG, ConfigRecord)
    precision, kernel = (str(offer.get(key)) for key in (PRECISION, KERNEL))
    for name, chosen, known in ((PRECISION, precision, PRECISIONS), (KERNEL, kernel, SETTLED)):
        if chosen not in known:
            raise RecordError(unknown(name, chosen, known))
    own = precision == config.precision and kernel == get_workspace(config).own_kernel
    if not own or PRECISION in context.state:
        context.state[PRECISION] = ConfigRecord({PRECISION: precision, KERNEL: kernel})


def _kernel(context: Context, workspace: Workspace) -> str:
    """The kernel that the server chose in this run; nothing is kept where this node would choose the same."""
    kept = context.state.get(PRECISION)
    return str(kept[KERNEL]) if isinstance(kept, ConfigRecord) else workspace.own_kernel


def _precision(context: Context, config: RunConfig) -> Precision:
    """The precision that the server chose in this run."""
    kept = context.state.get(PRECISION)
    chosen = kept.get(PRECISION) if isinstance(kept, ConfigRecord) else config.precision
    if chosen == "auto":
        raise RecordError(
            f"{NOT_JOINED}: expected a join message with the precision before any other, found none"
        )
    return cast(Precision, chosen)


def _use_stored_mask(workspace: Workspace, context: Context) -> None:
    """Take over the mask that an earlier message brought, unless this process uses it already."""
    record, known = context.state.get(MASK), context.state.get(CONFIG)
    if not isinstance(record, ArrayRecord):
        return
    if not isinstance(known, ConfigRecord) or known.get(MASK) != workspace.digest:
        _receive_mask(workspace, record_bytes(record, MASK))


def _one(content: RecordDict, name: str, kind: type[T]) -> T:
    record = content.get(name)
    if not isinstance(record, kind):
        raise RecordError(f"expected a {kind.__name__} called {name!r}, found {sorted(content)[:4]}")
    return record


app = make_client_app()
