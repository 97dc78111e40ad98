"""Going on with an interrupted run: the state saved after each round, and what of the folder still counts.

Files of numbers and JSON only, nothing pickled. The newest state and the one before are kept, so that a
crash while one is written, or a damaged file, costs a round and not the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedmask.channel import up_codec
from fedmask.config import RunConfig, from_dict
from fedmask.errors import CheckpointError, ConfigError, FedmaskError
from fedmask.layout import HEAD_PREFIX
from fedmask.ledger import Ledger
from fedmask.workspace import Workspace
from server.channel_state import channel_tensors, read_channel
from server.counted import Counted
from server.journal import rewrite_ledger, with_journal
from server.record import plain, read_json, sync, write_json, write_lines
from server.rounds import Row
from server.state import RunState

STATE = "state.safetensors"
PREVIOUS = "state.previous.safetensors"
# What may differ when a run goes on: none of it changes what a round computes.
FREE = ("name", "runs_dir", "rounds", "workers", "server.min_replies", "server.timeout",
        "server.join_timeout")  # fmt: skip
_FORMAT, _SHARED, _STRATEGY = "fedmask-state", "shared", "strategy/"
_INSTEAD = "start it again with --overwrite (on a SuperLink without --resume), or give another name"
log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Point:
    """Where a run goes on: after round ``state.round``.

    ``strategy``: see ``ServerStrategy.state``; ``rows``: the rounds' rows up to there; ``ledger_rows``: how
    many messages had been counted by then; ``record``: the folder's ``config.json``; ``file``: the state's.
    """

    state: RunState
    strategy: dict[str, np.ndarray]
    ledger_rows: int
    rows: list[Row]
    record: dict[str, Any]
    file: str

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises ``ConfigError`` unless ``record``, made now, finds the model and the rows of then."""
        for key in ("checkpoint_digest", "facts"):
            if plain(record[key]) != self.record.get(key):
                raise ConfigError(
                    f"--resume: the run's {key} in config.json are not those found now: the pre-trained model"
                    f" or the rows have changed; {_INSTEAD}"
                )

    @property
    def flower_runs(self) -> list[int]:
        """Flower's numbers of the processes that the run had so far, the last one last."""
        before = [one.get("flower_run_before") for one in self.record.get("resumed", [])]
        return [run for run in (*before, self.record.get("flower_run")) if isinstance(run, int)]

    def settle_precision(self, workspace: Workspace) -> dict[str, float]:
        """Let ``workspace`` use the run's first precision and kernel; nothing is measured again."""
        config = from_dict(self.record["config"])
        workspace.use_precision(config.precision)  # type: ignore[arg-type]
        if config.kernel != "auto":
            workspace.use_kernel(config.kernel)
        return {}

    def go_on(self, folder: Path, record: Mapping[str, Any], joining: Ledger) -> Ledger:
        """Cut the folder's files back to this point; the ledger to go on with. ``state`` notes who had begun.

        Messages of a round that did not end stay in the ledger as ``aborted``; those of ``joining`` again
        belong to no round (-1).
        """
        rows = with_journal(folder, list(Ledger.read_jsonl(folder / "ledger.jsonl")))
        aborted = [replace(row, status="aborted") for row in rows[self.ledger_rows :]]
        kept = [
            *rows[: self.ledger_rows],
            *aborted,
            *(replace(row, round=-1) for row in joining),
        ]
        write_lines(folder / "rounds.jsonl", self.rows)
        rewrite_ledger(folder, kept)
        if self.file != STATE:  # the damaged one must not become the one before
            os.replace(folder / self.file, folder / STATE)
        now = {"after_round": self.state.round, "engine": record["engine"], "versions": record["versions"]}
        now["flower_run_before"] = self.record.get("flower_run")
        begun = [row for row in aborted if row.kind == "train"]
        asked = frozenset(row.client for row in begun)
        self.state.counted = replace(self.state.counted, begun=asked)
        if note := self._too_far(max((row.round for row in begun), default=0)):
            log.warning("fedmask: %s", note)
            now["note"] = note
        resumed = {
            "config": record["config"],
            "flower_run": record.get("flower_run"),
            "resumed": [*self.record.get("resumed", []), now],
        }
        write_json(folder / "config.json", self.record | resumed)
        return Ledger.read_jsonl(folder / "ledger.jsonl")

    def _too_far(self, begun: int) -> str:
        """What it means that round ``begun`` was begun before: clients keep what one round began with.

        A state further back comes only of a damaged newer one.
        """
        config, next_round = from_dict(self.record["config"]), self.state.round + 1
        keeps = up_codec(config.up).keeps_state or config.server.sharing == "local-heads"
        if not keeps or begun <= next_round:
            return ""
        return (
            f"round {next_round} is done again although round {begun} had begun, and what clients of both"
            " carry (residuals of error feedback, heads of their own) is no longer what it was before round"
            f" {next_round}: the result may differ from that of a run without an interruption"
        )


def save_state(folder: Path, state: RunState, strategy: Mapping[str, np.ndarray], ledger_rows: int) -> None:
    """Write the state after a round; the one before is kept, older ones are gone.

    The round's lines in the other files must be on the disk by now: a state without them is of no use.
    """
    tensors = {_SHARED: state.shared}
    tensors |= {HEAD_PREFIX + task: head for task, head in state.heads.items()}
    tensors |= channel_tensors(state) | state.counted.tensors()
    tensors |= {_STRATEGY + name: values for name, values in strategy.items()}
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    metadata = {"format": _FORMAT, "version": "1", "round": str(state.round), "ledger_rows": str(ledger_rows)}
    metadata["sha256"] = _checksum(tensors, metadata)
    part = folder / (STATE + ".part")
    try:
        with part.open("wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)  # on a full disk it would stand in the way of what follows
        raise
    if (folder / STATE).exists():
        os.replace(folder / STATE, folder / PREVIOUS)
    os.replace(part, folder / STATE)
    sync(folder)


def forget_states(folder: Path) -> None:
    """Remove the states of a run that ended."""
    for name in (STATE, PREVIOUS, STATE + ".part"):
        (folder / name).unlink(missing_ok=True)


def interrupted(folder: Path, config: RunConfig) -> Point | None:
    """Where the run in ``folder`` goes on with ``config``. Changes nothing.

    None: it broke off before its first state was there, so there is nothing to lose and it begins again.
    Raises ``ConfigError`` for a run that is finished or was started with other settings (``FREE`` ones may
    differ), and when neither of the two states can be used.
    """
    if (folder / "summary.json").is_file():
        raise ConfigError(f"{folder}: the run is finished, so there is nothing to resume; {_INSTEAD}")
    record = read_json(folder / "config.json")
    _same_settings(folder, from_dict(record["config"]), config)
    if _not_begun(folder):
        log.warning("fedmask: %s: broke off before anything was done; it begins again", folder)
        return None
    problems = []
    for name in (STATE, PREVIOUS):
        try:
            point = _read(folder, name, record)
        except (FedmaskError, OSError) as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("fedmask: %s; going on from the state before", problems[0])
        if point.state.round > config.rounds:
            raise ConfigError(f"rounds: {point.state.round} rounds are done already, found {config.rounds}")
        return point
    raise ConfigError(f"{folder}: cannot be resumed ({'; '.join(problems)}); {_INSTEAD}")


def _not_begun(folder: Path) -> bool:
    """Whether there never was a state: one is written after round 0, before any other round begins."""
    if any((folder / name).exists() for name in (STATE, PREVIOUS)):
        return False
    rounds = folder / "rounds.jsonl"
    return not rounds.exists() or rounds.read_bytes().count(b"\n") <= 1


def _read(folder: Path, name: str, record: dict[str, Any]) -> Point:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{name}: no such file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{name}: damaged file ({error})") from error
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, "1"):
        raise CheckpointError(f"{name}: expected {_FORMAT} version 1")
    if metadata.pop("sha256", "") != _checksum(tensors, metadata):
        raise CheckpointError(f"{name}: damaged file (its checksum does not fit)")
    round, ledger_rows = int(metadata["round"]), int(metadata["ledger_rows"])
    heads = {task["name"]: tensors[HEAD_PREFIX + task["name"]] for task in record["config"]["tasks"]}
    strategy = {key.removeprefix(_STRATEGY): tensors[key] for key in tensors if key.startswith(_STRATEGY)}
    rows = list(_rows(folder / "rounds.jsonl"))[: round + 1]
    counted = len(Ledger.read_jsonl(folder / "ledger.jsonl"))
    if [row.get("round") for row in rows] != list(range(round + 1)) or counted < ledger_rows:
        raise CheckpointError(f"{name}: after round {round}, but rounds.jsonl or ledger.jsonl ends before")
    channel = read_channel(tensors, round)
    state = RunState(round, tensors[_SHARED], heads, *channel, counted=Counted.read(tensors))
    return Point(state, strategy, ledger_rows, rows, record, name)


def _rows(path: Path) -> Iterator[Row]:
    """The rows up to the first line that is none: an interrupted write may end inside a letter."""
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict):
            return
        yield row


def _same_settings(folder: Path, before: RunConfig, now: RunConfig) -> None:
    for key in ("precision", "kernel"):  # settled when the run began
        if getattr(now, key) == "auto":
            now = now.model_copy(update={key: getattr(before, key)})
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if key not in FREE and old.get(key) != new.get(key):
            raise ConfigError(
                f"--resume: {folder} was started with {key} = {old.get(key)!r}, found {new.get(key)!r}; only"
                f" {', '.join(FREE)} and the engine may differ"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> plain value."""
    if isinstance(value, dict):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{prefix}[{number}]", item) for number, item in enumerate(value)]
    else:
        return {prefix: value}
    return {key: found for name, item in pairs for key, found in _flat(item, name).items()}


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, tensors[name].dtype.str, tensors[name].shape]).encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
