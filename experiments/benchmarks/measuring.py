"""What all benchmarks share: taking turns, medians, the machine, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def in_turns(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """For each name the median over turns of its time divided by that of ``base`` in the same turn.

    What slows the machine down for a while slows both, so this is steadier than a ratio of medians.
    """
    return {
        name: statistics.median(one / other for one, other in zip(times, seconds[base], strict=True))
        for name, times in seconds.items()
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": _has_amx(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _has_amx() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_bf16" in info.read_text(encoding="utf-8")


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


def write(path: Path | None, **document: Any) -> None:
    """Write a result with the machine it comes from, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **document}, indent=1) + "\n", encoding="utf-8")
