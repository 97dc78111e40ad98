"""What Ray's actors run in the tests: the real app, with a note of who loaded and answered what."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray

from flwr.app import Context, Message

import fedmask.workspace
from clients.app import make_client_app
from fedmask.config import RunConfig


class NotingApp:
    """Called like a ClientApp. Notes go to ``notes`` in the runs folder: one line an event."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __call__(self, message: Message, context: Context) -> Message:
        def note(event: str) -> None:
            line = {"event": event, "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
            with (Path(self.config.runs_dir) / "notes").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

        load = fedmask.workspace.load_backbone
        if not hasattr(load, "noted"):  # once a process: Ray sends the app with every message

            def noted(name: str) -> Any:
                note("load")
                return load(name)

            noted.noted = True  # type: ignore[attr-defined]
            fedmask.workspace.load_backbone = noted
        note("message")
        return make_client_app(self.config)(message, context)


def noting_app(config: RunConfig) -> Any:
    """For ``make_app=``."""
    Path(config.runs_dir).mkdir(parents=True, exist_ok=True)
    return NotingApp(config)
