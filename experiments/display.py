"""What a person sees: progress (on stderr) while a run goes on, tables (on stdout) when it is over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


class RunProgress:
    """An observer (see ``server.observer``) that draws one bar for rounds and one for clients.

    Each finished round also leaves a line, so that a log file or a pipe, where bars make no sense,
    still shows how the run goes. Use as a context manager: the bars end with it, also on errors.
    """

    def __init__(self, metrics: Mapping[str, str], console: Console | None = None) -> None:
        self.metrics = dict(metrics)
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.rounds = self.progress.add_task("loading", total=None)
        self.clients = self.progress.add_task("clients", total=None)
        self.total, self.everyone, self.between = 0, 0, False

    def __enter__(self) -> RunProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.total:  # it ended while loading: nothing but the error's line is to be seen
            self.progress.update(self.rounds, visible=False)
            self.progress.update(self.clients, visible=False)
        self.progress.stop()

    def on_start(self, folder: Path, rounds: int, clients: int) -> None:
        """Say where the run writes."""
        self.total, self.everyone = rounds, clients
        self.progress.update(self.rounds, description="rounds", total=rounds)
        self.console.print(
            f"{clients} clients, {rounds} rounds, writing to {folder}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        """Start the clients' bar anew."""
        self._clients_again(len(clients) or self.everyone)  # before the first round all of them join
        if round and not clients:
            self.progress.update(self.rounds, completed=round)
            self.console.print(f"going on after round {round}", highlight=False)

    def on_reply(self, client: int) -> None:
        """One client more has answered."""
        if self.between:  # after the last round all clients score the final vector
            self._clients_again(self.everyone)
        self.progress.advance(self.clients)

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        """Leave the round's line and move the rounds' bar."""
        self.between = True
        self.progress.update(self.rounds, completed=row["round"])
        parts = [f"round {row['round']:>{len(str(self.total))}}/{self.total}"]
        for task, metric in self.metrics.items():
            value = row["dev"].get(task, {}).get(metric)
            if value is not None:
                parts.append(f"{task} {metric} {value:.3f}")
        parts.append(f"{row['seconds']:.1f} s")
        if row["rejected"]:
            count = len(row["rejected"])
            parts.append(f"{count} {'reply' if count == 1 else 'replies'} not used")
        self.console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)

    def _clients_again(self, total: int) -> None:
        self.progress.reset(self.clients, total=total)
        self.between = False

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Nothing: the tables follow."""


def print_json(value: object) -> None:
    """One JSON document on stdout and nothing else."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], *, left: int = 1
) -> None:
    """A plain table on stdout; the first ``left`` columns are text, the others are figures."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe or a file has no edge: digests stay whole
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: no markup in it
    console.print(title, style="bold", markup=False)
    console.print(table)
    console.print()
