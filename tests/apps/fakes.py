"""A client that answers at once: joining is real, training is a pseudo-random change."""

from __future__ import annotations

import numpy as np

from flwr.app import Context, Message

from clients.app import make_client_app
from clients.link import packed_change, received
from fedmask.channel import Behind
from fedmask.config import RunConfig
from fedmask.flower import ARRAYS, behind_content, record_bytes, reply_content
from fedmask.rng import rng_for
from fedmask.workspace import get_workspace


class QuickApp:
    """Called like a ClientApp. ``change`` depends on client, round and the received vector."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.real = make_client_app(config)

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train":
            return self.real(message, context)
        workspace, client = get_workspace(self.config), int(context.node_config["partition-id"])
        number = int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]
        data = record_bytes(message.content.array_records[ARRAYS])
        try:
            vector = received(workspace, context, client, data, number - 1)
        except Behind as behind:
            return Message(behind_content(behind.held), reply_to=message)
        noise = rng_for(1, number, client, "fake").standard_normal(vector.size)
        change = (0.01 * noise - 0.1 * vector).astype(np.float32)
        envelope = packed_change(workspace, context, client, message.content, change)
        train, held_out = map(len, workspace.split(client))
        metrics = {
            "num-examples": min(10 + client, train),
            "train-loss": 0.5,
            "steps": 1.0,
            "held-out": float(min(4, held_out)),
            "global-score": 0.5,
            "personal-score": 0.6,
        }
        return Message(reply_content(envelope, metrics), reply_to=message)


def quick_app(config: RunConfig) -> QuickApp:
    """For ``make_app=``."""
    return QuickApp(config)
