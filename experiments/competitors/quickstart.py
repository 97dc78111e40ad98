"""Federated fine-tuning the way Flower's quickstarts show it: every message carries the whole model.

A model per message, its full ``state_dict`` down and up, ``FedAvg``, the simulation runtime. Only the rows
and their batches come from fedmask, so that the steps are the same ones.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedmask.config import RunConfig
from fedmask.models import model_source
from fedmask.rng import rng_for
from fedmask.tasks import batches, collate
from fedmask.workspace import get_workspace


def new_model(config: RunConfig, labels: int) -> Any:
    """The architecture's own classifier, as every message of a quickstart loads it."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        model_source(config.model), num_labels=labels, use_safetensors=True
    )


def client_app(config: RunConfig) -> ClientApp:
    """Trains the whole model for ``train.steps`` steps; reports the seconds that the steps alone took."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(config.threads)
        workspace, client = get_workspace(config), int(context.node_config["partition-id"])
        task = workspace.task_of(client)
        model = new_model(config, len(workspace.data(task).labels))
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        data = workspace.shard(client).train
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        rows = batches(data, config.train.batch_size, rng_for(config.seed, 1, client, "batches"))
        model.train()
        began = time.perf_counter()
        for part in rows[: config.train.steps]:
            optimizer.zero_grad()
            model(**collate(data, part, workspace.backbone.pad_id)).loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - began
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": len(data), "seconds": seconds}),
            }
        )
        return Message(content, reply_to=message)

    return app


def run_quickstart(config: RunConfig) -> list[dict[str, float]]:
    """A run on Ray with one client at a time; for each round its seconds and those of the steps alone."""
    from flwr.simulation import run_simulation

    found: list[dict[str, float]] = []
    marks = [0.0]

    def mean_of_seconds(contents: list[RecordDict], _weight: str) -> MetricRecord:
        metrics = [content.metric_records["metrics"] for content in contents]
        spent = sum(float(one["seconds"]) for one in metrics)  # type: ignore[arg-type, misc]
        found.append({"round_seconds": time.perf_counter() - marks[-1], "steps_seconds": spent})
        marks.append(time.perf_counter())
        return MetricRecord({"seconds": spent})

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        workspace = get_workspace(config)
        model = new_model(config, len(workspace.data(workspace.tasks[0]).labels))
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=config.clients,
            min_available_nodes=config.clients,
            train_metrics_aggr_fn=mean_of_seconds,
        )
        marks[-1] = time.perf_counter()
        strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=config.rounds)

    run_simulation(
        server_app=server,
        client_app=client_app(config),
        num_supernodes=config.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 1, "log_to_driver": False},
        },
    )
    return found
