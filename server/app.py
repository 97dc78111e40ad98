"""The ServerApp: one run from the settings to the finished folder."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmask.config import RunConfig
from fedmask.flower import config_of
from fedmask.ledger import Ledger
from fedmask.settle import settle_precision
from fedmask.workspace import get_workspace
from server.agree import distribute, find_mask, keep_mask, kept_mask, needs_agreement
from server.evaluation import central_scores
from server.facts import run_record
from server.joining import join, rejoin
from server.journal import Journal
from server.norms import far_out
from server.observer import Observer, Silent
from server.overlap import measured_unions
from server.record import FOLDER_LINE, Existing, RunFolder, sync, unfinished, vector_digest, writing
from server.resume import forget_states, interrupted, save_state
from server.rounds import Federation, Row, most_claims
from server.seats import lost_seats
from server.state import RunState
from server.streaming import make_strategy
from server.summary import costs, save_change
from server.unequal import refuse_strategy

__all__ = ["RunResult", "app", "make_server_app", "run_server"]

NODE_TIMEOUT = 300.0
log = logging.getLogger("flwr")


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its ``summary.json``, and the state that it ended with."""

    folder: Path
    summary: dict[str, Any]
    state: RunState


def make_server_app(
    config: RunConfig | None = None,
    observer: Observer | None = None,
    *,
    default: Callable[[], RunConfig] | None = None,
    engine: str = "superlink",
    existing: Existing = "refuse",
    client_evaluation: bool = True,
    node_timeout: float = NODE_TIMEOUT,
    on_result: Callable[[RunResult], None] | None = None,
) -> ServerApp:
    """A ServerApp for one run.

    ``config`` None: the run config carries it as JSON under ``config`` (``flwr run``), and ``default`` stands
    in for an empty one; ``resume = true`` there goes on with the newest unfinished run of the name.
    ``engine`` is recorded; on ``superlink`` nodes may claim partitions and come back. ``existing``: what an
    existing run folder means (see ``RunFolder``). ``client_evaluation``: whether the final vector is scored
    on the clients' held-out rows. ``node_timeout``: seconds to wait for all nodes. ``on_result`` is called
    with the finished run.
    """
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        settings = config if config is not None else config_of(context.run_config, default)
        resume = context.run_config.get("resume") is True
        if resume and existing == "number":
            settings = settings.model_copy(update={"name": unfinished(settings)})
        result = run_server(
            grid,
            settings,
            observer or Silent(),
            engine=engine,
            existing="resume" if resume else existing,
            client_evaluation=client_evaluation,
            node_timeout=node_timeout,
            run_id=context.run_id,
        )
        log.info("%s %s on %s", FOLDER_LINE, result.folder, socket.gethostname())
        if on_result is not None:
            on_result(result)

    return server


def run_server(
    grid: Grid,
    config: RunConfig,
    observer: Observer,
    *,
    engine: str,
    existing: Existing,
    client_evaluation: bool,
    node_timeout: float,
    run_id: int | None = None,
) -> RunResult:
    """The whole run over a grid. ``run_id``: Flower's number for it. Raises ``FedmaskError``.

    Nothing is written, and no older run removed, before model, rows and the first score are there and the
    clients have joined.
    """
    began = time.monotonic()
    folder = RunFolder(config, existing)
    point = interrupted(folder.path, config) if existing == "resume" else None
    strategy = make_strategy(config.server)
    refuse_strategy(config)
    workspace = get_workspace(config)
    measured = point.settle_precision(workspace) if point else settle_precision(workspace)
    ledger, roster, search = Ledger(), None, point.record.get("mask_search", {}) if point else {}
    claims = engine == "superlink"  # simulated nodes are numbered, and none of them comes back
    enlist = partial(
        join, grid, workspace, ledger, node_timeout=node_timeout, arrived=observer.on_reply, claims=claims,
        after=point.flower_runs if point and claims else (),
    )  # fmt: skip

    def announce() -> None:
        observer.on_start(folder.path, config.rounds, config.clients)
        observer.on_round_start(point.state.round if point else 0, ())

    if point and needs_agreement(workspace):
        kept_mask(workspace, folder.path)
    elif needs_agreement(workspace):  # before it is found, nobody knows how long the run's vectors are
        workspace.forget_mask()
        for task in workspace.tasks:  # what can be wrong with the rows is said first
            workspace.data(task)
        announce()
        roster = enlist()
        search = find_mask(grid, workspace, roster, ledger, observer.on_reply)
    state = point.state if point else RunState.start(workspace)
    size = state.shared.size + workspace.k if config.has_views else state.shared.size
    strategy.check(config.server.clients_per_round or config.clients, size)
    record = run_record(workspace, engine, measured) | {"mask_search": search, "flower_run": run_id}
    if point:
        point.check(record)
        strategy.load_state(point.strategy)
    if roster is None:
        announce()
    # Scored before joining: worker processes and nodes load their models meanwhile.
    dev = {} if point else central_scores(workspace, state.shared, state.heads, "dev", config.eval_rows)
    if roster is None:
        roster = enlist()
    else:
        distribute(grid, workspace, roster, ledger)
    with writing(folder.path):
        if point:
            ledger = point.go_on(folder.path, record, ledger)
        else:
            folder.create(record | {"own_rows": {str(client): rows for client, rows in roster.rows.items()}})
            if needs_agreement(workspace):
                keep_mask(workspace, folder.path)
        journal = Journal(folder.path, ledger)
    record = {}  # thousands of clients' label counts, which are in the file
    try:
        state.confirm(roster.held)
        most = most_claims(workspace, roster.rows)
        federation = Federation(workspace, grid, roster, strategy, ledger, observer, most, journal)
        rows = point.rows if point else []
        earlier = sum(row["seconds"] for row in rows)
        if not point:
            rows.append(federation.start_row(dev, began))
            if config.test_every_round:
                rows[0]["test"] = federation.scores(state, "test")
            _end_round(federation, state, rows[0], folder, journal)
        while state.round < config.rounds:
            if claims:
                lost = lost_seats(rows[-1]["rejected"])
                state.confirm(rejoin(grid, workspace, ledger, roster, state.round + 1, lost, journal))
                journal.settle()
                federation.most = most_claims(workspace, roster.rows)
            state, row = federation.train_round(state)
            rows.append(row)
            _end_round(federation, state, row, folder, journal)
        since = began - earlier
        summary = _finish(federation, state, rows, folder, since, client_evaluation, search, journal)
    except BaseException:
        journal.break_off()  # the ledger says who and in which round
        raise
    observer.on_end(summary)
    return RunResult(folder.path, summary, state)


def _end_round(
    federation: Federation, state: RunState, row: Row, folder: RunFolder, journal: Journal
) -> None:
    """Write what the round left; the state last, because it says that all the rest is there."""
    with writing(folder.path):
        folder.append_round(row)
        journal.settle()
        save_state(folder.path, state, federation.strategy.state(), len(federation.ledger))
    federation.observer.on_round_end(row)
    log.info("%s", _line(row, federation.config.rounds))


def _somebody_holds_out(config: RunConfig) -> bool:
    """Whether clients have rows to score the final vector on: else asking them is a download for nothing."""
    rules = [task.partition or config.partition for task in config.tasks]
    return any(rule.held_out > 0 and rule.held_out_max > 0 for rule in rules)


def _finish(
    federation: Federation,
    state: RunState,
    rows: Sequence[Row],
    folder: RunFolder,
    began: float,
    client_evaluation: bool,
    search: dict[str, Any],
    journal: Journal,
) -> dict[str, Any]:
    """Delta and summary of a run whose rounds are done. What only describes the run cannot lose it."""
    workspace, ledger = federation.workspace, federation.ledger
    with writing(folder.path):
        save_change(workspace, state, folder.path / "delta.safetensors")
        sync(folder.path / "delta.safetensors")  # the states go as soon as there is a summary
    test = federation.scores(state, "test")
    asks = client_evaluation and _somebody_holds_out(workspace.config)
    clients, unscored = federation.client_scores(state) if asks else ({}, [])
    journal.settle()
    schedule = [row["sampled"] for row in rows[1:]]
    if found := [row["mask_search"] for row in rows if "mask_search" in row]:
        search = {"placement": "client", "rule": workspace.no_mask.rule.name}
        search |= {key: sum(one[key] for one in found) for key in ("clients", "seconds")}
    summary: dict[str, Any] = {
        "test": test,
        "final_dev": rows[-1]["dev"],
        "clients": clients,
        "unscored": unscored,
        "vector_sha256": vector_digest(state.shared, state.heads),
        "rounds": state.round,
        "bytes": _totals(ledger),
        "steps": sum(row["steps"] for row in rows),
        "seconds": time.monotonic() - began,
        "mask_search": search,
        "costs": costs(workspace, schedule),
        "overlap": {},
        "notes": [],
    }
    with writing(folder.path):
        folder.write_summary(summary)  # complete; what follows needs much memory and only adds to it
    try:
        unions, overlap = measured_unions(workspace, schedule, state.holders.masks)
        summary |= {"overlap": overlap, "costs": costs(workspace, schedule, unions)}
    except Exception as error:
        summary["notes"].append(
            f"how far the clients' own masks overlap was not measured ({type(error).__name__}: {error})"
        )
    summary["seconds"] = time.monotonic() - began
    try:
        folder.write_summary(summary)
    except OSError as error:
        summary["notes"].append(f"the summary's last version was not written ({error.strerror})")
        log.warning("fedmask: %s: %s", folder.path, summary["notes"][-1])
    with contextlib.suppress(OSError):  # they are only in the way
        forget_states(folder.path)
    return summary


def _line(row: dict[str, Any], rounds: int) -> str:
    """A round in one line, for those who only see the log."""
    scores = [
        f"{task} {key} {value:.3f}" for task, found in row["dev"].items() for key, value in found.items()
    ]
    used = f"{len(row['replied'])} of {len(row['sampled'])} replies" if row["round"] else "before training"
    note = "".join(f"; {text}" for text in (row["note"], far_out(row["norms"])) if text)
    return f"fedmask: round {row['round']} of {rounds}, {used}; {', '.join(scores) or 'no dev rows'}{note}"


def _totals(ledger: Ledger) -> dict[str, Any]:
    """Payload and message bytes in all, and by kind and direction."""
    whole = {way: ledger.total(direction=way) for way in ("up", "down")}
    out: dict[str, Any] = {way: total.payload_bytes for way, total in whole.items()}
    out |= {f"{way}_message": total.message_bytes for way, total in whole.items()}
    out["kinds"] = {
        str(kind): {way: asdict(ledger.total(kind=kind, direction=way)) for way in ("up", "down")}
        for (kind,) in ledger.totals("kind")
    }
    return out


app = make_server_app(existing="number")
