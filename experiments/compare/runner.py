"""One run of a study: the federation on this process's engine, and what it came to as one JSON file."""

from __future__ import annotations

import shutil
import subprocess
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from clients.app import make_client_app
from experiments.compare.clock import Clock, TimedApp, reset_peak_memory
from experiments.compare.plan import Cell
from experiments.compare.reuse import sent_values, trained_values, workspace_for
from experiments.engines import run_inprocess
from experiments.results import counted, measured_bytes, messages
from experiments.runs import Run, read_run
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError
from fedmask.ledger import Ledger
from server.record import Existing, is_run, machine, versions, write_json
from server.resume import interrupted


@dataclass(frozen=True)
class Task:
    """What a worker process is told: the cell, its run, its settings in the study's words, where to write."""

    study: str
    cell: Cell
    config: RunConfig
    settings: Mapping[str, Any]
    fingerprint: str
    target: Path


def run_cell(task: Task) -> dict[str, Any]:
    """Run, write the result to ``task.target`` in one step, and return it. An error becomes a result too.

    A run that was broken off goes on after its last round. KeyboardInterrupt passes through. What the
    machine refuses (a full disk) says nothing about the variant: it raises ``FederationError``, no result
    is written, and the run's folder stays.
    """
    began = time.monotonic()
    head = {
        "study": task.study,
        "variant": task.cell.variant,
        "lr": task.cell.lr,
        "seed": task.cell.seed,
        "fingerprint": task.fingerprint,
        "settings": dict(task.settings),
        "versions": versions() | _commit(),
        "machine": machine(),
    }
    folder = Path(task.config.runs_dir) / task.config.name
    try:
        result = head | {"status": "ok"} | _run(task.config, folder)
    except Exception as error:  # one variant's failure must not end a night's work
        if (refused := _refused(error)) is not None:
            raise _stopped(task, refused) from error
        lines = traceback.format_exception_only(error)
        result = head | {"status": "failed", "error": " ".join("".join(lines).split())[:500]}
    result["seconds"] = time.monotonic() - began
    try:
        task.target.parent.mkdir(parents=True, exist_ok=True)
        write_json(task.target, result)
    except OSError as error:
        raise _stopped(task, error) from error
    shutil.rmtree(folder, ignore_errors=True)  # a full fine-tuning's change is as large as the model
    return result


def _refused(error: BaseException) -> BaseException | None:
    """What the machine refused, where that is why a run ended (``server.record.writing`` wraps it)."""
    if isinstance(error, OSError):
        return error
    cause = error.__cause__ if isinstance(error, FederationError) else None
    return cause if isinstance(cause, OSError | SafetensorError) else None


def _stopped(task: Task, error: BaseException) -> FederationError:
    return FederationError(
        f"run {task.cell.key}: {error}; nothing is recorded of it: mend this and start the study again, the"
        f" run goes on after its last round ({Path(task.config.runs_dir) / task.config.name})"
    )


def _run(config: RunConfig, folder: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the scores too: two runs at a time must not fight for the cores
    try:
        workspace = workspace_for(config)
        clock = Clock(folder)
        reset_peak_memory()
        run_inprocess(
            config,
            clock,
            existing=_existing(config, folder),
            client_evaluation=False,
            make_app=lambda settings: TimedApp(make_client_app(settings), clock),
        )
    finally:
        torch.set_num_threads(threads)
    return measured(read_run(folder), clock) | {
        "sent_values": sent_values(workspace),
        "trained_values": trained_values(workspace),
        "stored_bytes": (folder / "delta.safetensors").stat().st_size,
        "config": _portable(config),
    }


@lru_cache
def _commit() -> dict[str, str]:
    """The checkout's commit, ``+`` behind it where files differ; nothing for an installed copy."""
    here, found = Path(__file__).parent, []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return {}
        if done.returncode:
            return {}
        found.append(done.stdout.strip())
    return {"commit": found[0] + ("+" if found[1] else "")}


def _existing(config: RunConfig, folder: Path) -> Existing:
    """Go on with a broken run where its state can be used; else begin again."""
    if not is_run(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return "refuse"
    try:
        interrupted(folder, config)
    except (ConfigError, OSError, ValueError, KeyError):
        return "overwrite"
    return "resume"


def measured(run: Run, clock: Clock) -> dict[str, Any]:
    """What a finished run's folder says, in the words of a result."""
    ledger = Ledger(row for row in run.ledger if counted(row))
    pairs = max(1, len(ledger.totals("round", "client", kind="train", direction="up")))
    sums = {way: ledger.total(kind="train", direction=way) for way in ("up", "down")}
    clients = max(1, len(run.facts["partitions"]))
    masks = {way: ledger.total(kind="mask", direction=way).payload_bytes for way in ("up", "down")}
    positions = clock.positions
    told = {} if positions is None else {"positions": positions}
    return told | {
        "backbone_size": run.facts["backbone_size"],
        "overlap": _overlap(run),
        "head_values": {
            task: sum(size for name, size in parts if name.startswith("head/"))
            for task, parts in run.facts["layout"].items()
        },
        "bytes": {
            "up_per_client_round": sums["up"].payload_bytes / pairs,
            "down_per_client_round": sums["down"].payload_bytes / pairs,
            "mask_up_per_client": masks["up"] / clients,
            "mask_down_per_client": masks["down"] / clients,
            "payload": measured_bytes(run),
            "message": messages(run),
        },
        "curve": _curve(run),
        "steps": run.summary["steps"],
        "client_seconds": clock.client_seconds,
        "peak_memory_bytes": clock.peak_memory_bytes,
        "resumed": bool(run.record.get("resumed")),
    }


def _overlap(run: Run) -> dict[str, Any]:
    """How the union of the clients' own masks grows, where they had any; else nothing."""
    found = run.summary.get("overlap") or {}
    if "growth" not in found or found["batches"]:
        return {}
    return {key: found[key] for key in ("rule", "k", "orders", "mean_jaccard", "growth")}


def _curve(run: Run) -> list[dict[str, Any]]:
    """One point a round: scores by task, and the bytes of all clients so far, both directions."""
    payload: dict[int, int] = {}
    message: dict[int, int] = {}
    for sent in run.ledger:
        if sent.kind != "evaluate" and sent.status != "aborted" and sent.round >= 0:
            payload[sent.round] = payload.get(sent.round, 0) + sent.payload_bytes
            message[sent.round] = message.get(sent.round, 0) + sent.message_bytes
    out, total, whole = [], 0, 0
    for row in run.rounds:
        total += payload.get(row["round"], 0)
        whole += message.get(row["round"], 0)
        out.append(
            {
                "round": row["round"],
                "validation": {task: row["dev"][task][metric] for task, metric in run.metrics.items()},
                "reported": {task: row["test"][task][metric] for task, metric in run.metrics.items()},
                "validation_loss": {task: row["dev"][task]["loss"] for task in run.metrics},
                "payload_bytes": total,
                "message_bytes": whole,
            }
        )
    return out


def _portable(config: RunConfig) -> dict[str, Any]:
    """The run's settings without the folders of this machine."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"name", "runs_dir"})
    for task in values["tasks"]:
        task.update({key: Path(task[key]).name for key in ("source", "dev", "test") if task[key]})
    return values
