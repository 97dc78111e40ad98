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
from server.app import RunResult
from tests.apps.grids import read_rows


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


def expected(config: RunConfig, counted: list[list[int]]) -> np.ndarray:
    """Shared values and all heads after rounds in which the ``counted`` clients' replies were averaged.

    In NumPy alone, from what ``QuickApp`` says: tasks weigh the same, rows within a task.
    """
    workspace = get_workspace(config)
    sizes = {task: workspace.layout(task).size for task in workspace.tasks}
    heads = {task: workspace.layout(task).segments[-1].size for task in workspace.tasks}
    vectors = {task: np.zeros(size, np.float32) for task, size in sizes.items()}
    for round, clients in enumerate(counted, start=1):
        of_task: dict[str, list[int]] = {}
        for client in clients:
            of_task.setdefault(workspace.task_of(client), []).append(client)
        changes = {
            client: 0.01 * rng_for(1, round, client, "fake").standard_normal(vectors[task].size)
            - 0.1 * vectors[task]
            for task, members in of_task.items()
            for client in members
        }
        means = {
            task: np.average([changes[c] for c in members], axis=0, weights=[10 + c for c in members])
            for task, members in of_task.items()
        }
        shared = np.mean([mean[: sizes[task] - heads[task]] for task, mean in means.items()], axis=0)
        for task, vector in vectors.items():
            cut = vector.size - heads[task]
            vector[:cut] += shared
            if task in means:
                vector[cut:] += means[task][cut:]
    first = next(iter(vectors.values()))
    parts = [first[: first.size - heads[workspace.tasks[0]]]]
    return np.concatenate([*parts, *(vectors[task][-heads[task] :] for task in workspace.tasks)])


def assert_mean_of_what_counted(result: RunResult, config: RunConfig) -> None:
    counted = [row["replied"] for row in read_rows(result.folder, "rounds")[1:]]
    found = np.concatenate([result.state.shared, *(result.state.heads[t] for t in result.state.heads)])
    np.testing.assert_allclose(found, expected(config, counted), rtol=1e-4, atol=1e-6)
