"""Grids that misbehave, around the in-process one."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Error, Message

from clients.app import make_client_app
from experiments.inprocess import InProcessGrid
from experiments.workers import MakeApp
from fedmask.config import RunConfig
from server.app import RunResult, run_server
from server.observer import Silent

# (partition, round, the good reply) -> what arrives instead
Tamper = Callable[[int, int, Message], list[Message]]


class TamperedGrid(InProcessGrid):
    """Replaces training replies by whatever ``tamper`` makes of them."""

    def __init__(self, config: RunConfig, tamper: Tamper, make_app: MakeApp = make_client_app) -> None:
        super().__init__(config, 1, make_app)
        self.tamper = tamper
        self.asked: dict[str, tuple[int, int, str]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        names = list(super().push_messages(sent))
        for message in sent:
            config = message.content.config_records.get("config")
            number = config.get("round", 0) if config is not None else 0
            self.asked[message.metadata.message_id] = (
                self._partitions[message.metadata.dst_node_id],
                int(number),  # type: ignore[arg-type]
                message.metadata.message_type,
            )
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        out: list[Message] = []
        for reply in super().pull_messages(message_ids):
            client, number, kind = self.asked[reply.metadata.reply_to_message_id]
            out += self.tamper(client, number, reply) if kind == "train" else [reply]
        return out


def only(counted: Mapping[int, Collection[int]]) -> Tamper:
    """Loses each training reply but those of the clients in ``counted``, by round."""

    def tamper(client: int, number: int, reply: Message) -> list[Message]:
        if client in counted[number]:
            return [reply]
        lost = Message(Error(code=5, reason="lost"), reply_to=reply)
        lost.metadata.__dict__.update(reply.metadata.__dict__)
        return [lost]

    return tamper


def messages_that_count(
    ledger: Iterable[dict[str, Any]], counted: Mapping[int, Collection[int]]
) -> set[tuple[Any, ...]]:
    """The messages of training, with their bytes, of the clients in ``counted``, by round."""
    return {
        (row["round"], row["client"], row["direction"], row["payload_bytes"], row["message_bytes"])
        for row in ledger
        if row["kind"] == "train" and row["status"] == "ok" and row["client"] in counted.get(row["round"], ())
    }


class ShuffledGrid(InProcessGrid):
    """Answers everything, then hands the replies out in a random order."""

    def __init__(self, config: RunConfig, seed: int) -> None:
        super().__init__(config, 1)
        self.random = random.Random(seed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        names = list(message_ids)
        found: list[Message] = []
        while len(found) < len(names):
            found += super().pull_messages(names)
        self.random.shuffle(found)
        return found


def run_on(grid: InProcessGrid, **changes: Any) -> RunResult:
    """A run over any grid; an older run of the name is replaced."""
    settings: dict[str, Any] = {
        "engine": "test",
        "existing": "overwrite",
        "client_evaluation": False,
        "node_timeout": 5.0,
        "observer": Silent(),
    }
    return run_server(grid, grid.config, **(settings | changes))


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file of a run."""
    import json

    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
