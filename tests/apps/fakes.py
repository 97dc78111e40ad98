"""A client that answers at once: joining is real, training is a pseudo-random change."""

from __future__ import annotations

import numpy as np

from flwr.app import Context, Message

from clients.app import make_client_app
from fedmask.codecs import pack_update, unpack_update
from fedmask.config import RunConfig
from fedmask.flower import ARRAYS, record_bytes, reply_content
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
        layout, digest = workspace.layout(workspace.task_of(client)), workspace.digest
        number = int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]
        data = record_bytes(message.content.array_records[ARRAYS])
        vector = unpack_update(data, layout=layout, digest=digest, round=number)
        noise = rng_for(1, number, client, "fake").standard_normal(layout.size)
        change = (0.01 * noise - 0.1 * vector).astype(np.float32)
        envelope = pack_update(change, layout, codec=self.config.values, digest=digest, round=number)
        metrics = {"num-examples": 10 + client, "train-loss": 0.5, "steps": 2.0, "held-out": 4.0,
                   "global-score": 0.5, "personal-score": 0.6}  # fmt: skip
        return Message(reply_content(envelope, metrics), reply_to=message)


def quick_app(config: RunConfig) -> QuickApp:
    """For ``make_app=``."""
    return QuickApp(config)
