"""The command ``fedmask run``: choose the engine, show progress, then the result and where it lies."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.display import RunProgress, print_json, print_table
from experiments.results import comparisons, measured_bytes, messages, quality, score, size, traffic, trained
from experiments.runs import Run, read_run
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, unknown

ENGINES = ("inprocess", "ray", "superlink")


@dataclass(frozen=True)
class Engine:
    """Where a run happens, with the options that only one engine understands.

    ``backend``: JSON for Flower's simulation backend (ray); ``connection`` (a name, or HOST:PORT with
    ``root_certificates``) and ``federation_config``: see ``flwr run`` (superlink); ``overwrite``: replace an
    older run (inprocess, ray), ``resume``: go on with one that was interrupted. Raises ConfigError.
    """

    name: str = "inprocess"
    backend: str | None = None
    connection: str | None = None
    federation_config: str | None = None
    overwrite: bool = False
    resume: bool = False
    root_certificates: Path | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ConfigError(f"--engine: {unknown('engine', self.name, ENGINES)}")
        for option, engine in (
            ("backend", "ray"),
            ("connection", "superlink"),
            ("federation_config", "superlink"),
            ("root_certificates", "superlink"),
        ):
            if getattr(self, option) is not None and self.name != engine:
                raise ConfigError(
                    f"--{option.replace('_', '-')} is for --engine {engine}, found --engine {self.name}"
                )
        if self.overwrite and self.resume:
            raise ConfigError(
                "--overwrite and --resume exclude each other: replace the older run, or go on with it"
            )
        if self.overwrite and self.name == "superlink":
            raise ConfigError(
                "--overwrite is not for --engine superlink: its host keeps older runs and numbers new ones"
            )

    def backend_config(self) -> dict[str, Any]:
        """``backend`` as a table. Raises ConfigError when it is no JSON object."""
        try:
            value = json.loads(self.backend or "{}")
        except ValueError as error:
            raise ConfigError(f"--backend: expected JSON, found {self.backend!r} ({error})") from None
        if not isinstance(value, dict):
            raise ConfigError(f"--backend: expected a JSON object, found {self.backend!r}")
        return value


def within_budget(config: RunConfig, budget: int | None, given: Mapping[str, Any]) -> RunConfig:
    """The settings that fit ``budget`` bytes, said on stderr. ``given``: options, of which two contradict."""
    if budget is None:
        return config
    for option in ("up", "down"):
        if given.get(option) is not None:
            raise ConfigError(f"--budget-bytes chooses --up and --down; leave out --{option}, or the budget")
    from experiments.budget import fit_budget
    from experiments.estimate import label_counts

    chosen, words = fit_budget(config, label_counts(config, None), budget)
    print(f"budget: {words}", file=sys.stderr)
    return chosen


def run_federation(config: RunConfig, engine: Engine, *, as_json: bool) -> None:
    """Run, write the report, and print the result. Raises FedmaskError."""
    backend = engine.backend_config()
    if engine.name == "superlink":
        _run_remote(config, engine, as_json=as_json)
        return
    # An existing run is refused before anything heavy is loaded.
    from server.record import Existing, RunFolder

    existing: Existing = "overwrite" if engine.overwrite else "resume" if engine.resume else "refuse"
    RunFolder(config, existing)
    from experiments.engines import run_inprocess, run_ray
    from experiments.report import report_of_complete

    with RunProgress({task.name: task.metric for task in config.tasks}) as progress:
        if engine.name == "ray":
            result = run_ray(config, progress, existing=existing, backend=backend)
        else:
            result = run_inprocess(config, progress, existing=existing)
    report = report_of_complete(result.folder)
    _show(read_run(result.folder), report, as_json=as_json)


def _run_remote(config: RunConfig, engine: Engine, *, as_json: bool) -> None:
    from rich.console import Console

    from experiments.superlink import run_superlink

    log = Console(stderr=True, highlight=False)
    options = ["--federation-config", engine.federation_config] if engine.federation_config else []
    remote = run_superlink(
        config,
        engine.connection,
        show=lambda line: log.print(line, markup=False, soft_wrap=True),
        options=options,
        certificates=engine.root_certificates,
        resume=engine.resume,
    )
    if remote.summary is not None:
        written = remote.folder / "report.md"
        _show(read_run(remote.folder), written if written.is_file() else None, as_json=as_json)
    elif as_json:
        print_json({"run_id": remote.run_id, "folder": str(remote.folder), "host": remote.host})
    else:
        print(f"Run {remote.run_id}: {remote.folder} on {remote.host} (report.md is there)")


def _show(run: Run, report: Path | None, *, as_json: bool) -> None:
    rows = comparisons(run)
    if as_json:
        print_json(
            {"folder": str(run.folder), "report": str(report) if report else None, "summary": run.summary,
             "quality": quality(run), "traffic": traffic(run), "comparisons": rows}
        )  # fmt: skip
        return
    print()
    print(f"{run.config['method']} on {run.config['model']}: {trained(run)}")
    print(f"{run.summary['rounds']} rounds, {run.summary['steps']} steps, {run.summary['seconds']:.0f} s\n")
    print_table(
        "Quality",
        ("task", "metric", "dev before", "dev end", "test", "personalized"),
        (
            (row["task"], row["metric"], *(score(row[key]) for key in ("before", "dev", "test", "personal")))
            for row in quality(run)
        ),
        left=2,
    )
    print_table(
        f"Payload: per client and round, and all {run.summary['rounds']} rounds of all clients",
        ("", "up", "down", "whole run", "times this run"),
        (
            (row["label"], size(row["up"]), size(row["down"]), size(row["total"]), f"{row['ratio']:.2f}")
            for row in rows
        ),
    )
    whole = messages(run)
    evaluation = run.ledger.total(kind="evaluate").payload_bytes
    if evaluation:
        print(f"Not in it: {size(evaluation)} of payload for the closing evaluation on the clients.")
    print(f"Whole Flower messages: {size(whole)} for {size(measured_bytes(run))} of payload.")
    if report:
        print(f"Report: {report}")
