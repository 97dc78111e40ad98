"""What all benchmarks share: taking turns, medians, the machine, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

MOST_OTHERS = 0.02  # of one core's time: a call during which other processes had more is disturbed
CLOCK = 0.02  # two ticks of the system's clock, which counts what processes had
TRIES = 3


@dataclass(frozen=True)
class Call:
    """One call: its ``seconds``, and the processor time that ``others`` had meanwhile, in seconds."""

    seconds: float
    others: float

    @property
    def disturbed(self) -> bool:
        """Whether other processes had more than their share."""
        return self.others > MOST_OTHERS * self.seconds + CLOCK


class Turns(dict[str, list[float]]):
    """Seconds of each function's calls that count; ``others``: other processes' share of a core then."""

    def __init__(self, calls: Mapping[str, Sequence[Call]]) -> None:
        super().__init__({name: [call.seconds for call in found] for name, found in calls.items()})
        self.others = {
            name: sum(call.others for call in found) / sum(call.seconds for call in found)
            for name, found in calls.items()
        }


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    others: Callable[[], float] | None = None,
    tries: int = TRIES,
) -> Turns:
    """``repeats`` calls of each function, the functions taking turns; the first turn is not counted.

    Turns go on until each function has had enough calls during which other processes were quiet, at most
    ``tries * repeats`` turns; what is lacking then are the least disturbed of the others. The choice looks at
    other processes' time alone (``others``: their seconds so far), never at how long a call took.
    """
    others = others or _others_seconds
    calls: dict[str, list[Call]] = {name: [] for name in functions}
    for turn in range(tries * repeats + 1):
        for name, function in functions.items():
            before, start = others(), time.perf_counter()
            function()
            if turn:
                calls[name].append(Call(time.perf_counter() - start, others() - before))
        if min(sum(not call.disturbed for call in found) for found in calls.values()) >= repeats:
            break
    return Turns({name: _calmest(found, repeats) for name, found in calls.items()})


def _calmest(calls: Sequence[Call], count: int) -> list[Call]:
    """The first ``count`` undisturbed calls, filled up with the least disturbed of the others."""
    first = sorted(calls, key=lambda call: call.others / call.seconds if call.disturbed else 0.0)
    return first[:count]


def _others_seconds() -> float:
    """Processor seconds that other processes and machines have had so far; 0 where the system hides it."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _waiting, irq, soft, stolen = map(
        int, stat.read_text(encoding="utf-8").split(maxsplit=9)[1:9]
    )
    ticks = user + nice + system + irq + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """For each name the median of its times divided by the median of those of ``base``."""
    middle = statistics.median(seconds[base])
    return {name: statistics.median(times) / middle for name, times in seconds.items()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": _has("amx_bf16"),
        "avx512_bf16": _has("avx512_bf16"),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cpuinfo() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8") if info.exists() else ""


def _processor() -> str:
    names = [line.split(":")[1].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _has(instructions: str) -> bool:
    return instructions in _cpuinfo()


def parser(text: str | None, *, repeats: int, threads: int = 2) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    out = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--json", type=Path, help="file to write all numbers to")
    out.add_argument("--repeats", type=int, default=repeats, help=f"turns that are counted ({repeats})")
    out.add_argument("--threads", type=int, default=threads, help=f"PyTorch's threads ({threads})")
    return out


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people; the first column holds names, the others numbers."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=110).print(table)


def show_others(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line on how much other processes disturbed what the rows (each with its ``others``) say."""
    print(f"Other processes had at most {max(row['others'] for row in rows):.1%} of a core's time meanwhile.")


def write(path: Path | None, **document: Any) -> None:
    """Write a result with the machine it comes from, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **document}, indent=1) + "\n", encoding="utf-8")
