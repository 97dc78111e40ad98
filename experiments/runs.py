"""Reading a run's folder: what the server wrote, as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmask.errors import ConfigError
from fedmask.ledger import Ledger

WIRE = "wire.json"


@dataclass(frozen=True)
class Run:
    """One run: ``config.json`` (settings and facts), one row a round, one row a message, the summary.

    ``wire``: a SuperLink's own counters of the run in bytes (``inbound``, ``outbound``); None elsewhere.
    """

    folder: Path
    record: dict[str, Any]
    rounds: list[dict[str, Any]]
    ledger: Ledger
    summary: dict[str, Any]
    wire: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The settings, as ``RunConfig.model_dump`` gives them."""
        return dict(self.record["config"])

    @property
    def facts(self) -> dict[str, Any]:
        """Sizes, layouts and shards: what the settings came to for this model and these tasks."""
        facts, own = dict(self.record["facts"]), self.record.get("own_rows", {})
        # What clients with data of their own said, which no facts of the server's can hold.
        facts["partitions"] = [
            part | dict(zip(("train_rows", "held_out_rows"), own.get(str(part["client"]), ()), strict=False))
            for part in facts["partitions"]
        ]
        return facts

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the name of its metric."""
        return {task["name"]: task["metric"] for task in self.config["tasks"]}


def read_run(folder: str | Path, *, finished: bool = True) -> Run:
    """The run in ``folder``. Raises ConfigError when it holds none, or one that did not end.

    ``finished`` False: one that is not over, or failed, will do; its summary is empty.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder}: expected the folder of a run, found none{_others(path)}")
    wanted = ["config.json", "ledger.jsonl", *["rounds.jsonl", "summary.json"] * finished]
    missing = [name for name in wanted if not (path / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder}: expected a finished run, found no {', '.join(missing)}: go on with it by fedmask run"
            f" --resume, or run it again with --overwrite"
        )

    def optional(name: str) -> dict[str, Any] | None:
        return _json(path / name) if (path / name).is_file() else None

    return Run(
        folder=path,
        record=_json(path / "config.json"),
        rounds=_lines(path / "rounds.jsonl") if (path / "rounds.jsonl").is_file() else [],
        ledger=Ledger.read_jsonl(path / "ledger.jsonl"),
        summary=optional("summary.json") or {},
        wire=optional(WIRE),
    )


def stored_settings(given: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The ``config.json`` of the run that ``given`` names, and ``given`` with that place spelt out.

    Raises ConfigError when there is no such run.
    """
    place = {"runs_dir": given.get("runs_dir") or "runs", "name": given.get("name") or "run"}
    folder = Path(place["runs_dir"]).expanduser() / place["name"]
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--resume: {folder}: expected a run, found none{_others(folder)}")
    return folder / "config.json", {**given, **place}


def _others(path: Path) -> str:
    names = sorted(found.parent.name for found in path.parent.glob("*/config.json"))
    return f" (runs in {path.parent}: {', '.join(names)})" if names else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON, found an error ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # In bytes: a line may end inside a letter, where a run that is not over was broken off.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: expected a JSON object a line ({error})") from None
    return rows
