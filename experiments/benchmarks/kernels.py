"""The sampled weight gradient against the dense product: ``python -m experiments.benchmarks.kernels``.

For each shape, density, number of tokens and threads, and precision, in turns:

- ``product``: ``grad_output^T inputs`` in the given precision, what full fine-tuning computes (and rounds
  to that precision);
- ``dense``: our reference, the product in float32 and the gather of the wanted entries;
- ``sampled``: the compiled kernel.

Times are medians of ``--repeats`` turns, after one that is not counted. Ratios above 1 favour ``sampled``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.measuring import in_turns, write
from fedmask.kernels import Pattern, available_kernels, choose_kernel, sampled_weight_gradient

SHAPES = ((384, 384), (1536, 384), (768, 768), (3072, 768), (1024, 4096))
DENSITIES = (0.001, 0.005, 0.02, 0.08)
TOKENS = (256, 640, 2048)
THREADS = (1, 2)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

Row = dict[str, float | int | str]


def random_pattern(outputs: int, inputs: int, density: float) -> Pattern:
    """The same ``round(density * size)`` entries of an [outputs, inputs] weight each time."""
    size = outputs * inputs
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: round(density * size)]
    return Pattern.from_flat(chosen.sort().values, (outputs, inputs))


def measure(
    shapes: list[tuple[int, int]],
    densities: list[float],
    tokens: list[int],
    threads: list[int],
    precisions: list[str],
    repeats: int,
) -> Iterator[Row]:
    """One row of times (milliseconds) and ratios for each combination."""
    for count, precision, (outputs, inputs), length in product(threads, precisions, shapes, tokens):
        torch.set_num_threads(count)
        generator = torch.Generator().manual_seed(length)
        grad = torch.randn(length, outputs, generator=generator).to(PRECISIONS[precision])
        x = torch.randn(length, inputs, generator=generator).to(PRECISIONS[precision])
        for density in densities:
            pattern = random_pattern(outputs, inputs, density)
            sampled = partial(sampled_weight_gradient, grad, x, pattern)
            seconds = in_turns(
                {
                    "product": partial(torch.matmul, grad.t(), x),
                    "dense": partial(sampled, "dense"),
                    "sampled": partial(sampled, "sampled"),
                },
                repeats,
                tries=1,
            )
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            minima = {name: min(times) for name, times in seconds.items()}
            yield {
                "outputs": outputs,
                "inputs": inputs,
                "density": density,
                "k": pattern.k,
                "tokens": length,
                "threads": count,
                "precision": precision,
                **{f"{name}_ms": 1e3 * value for name, value in medians.items()},
                "ratio_to_product": medians["product"] / medians["sampled"],
                "ratio_to_dense": medians["dense"] / medians["sampled"],
                "ratio_to_product_of_minima": minima["product"] / minima["sampled"],
                "auto": choose_kernel(length, outputs, inputs, pattern.k, "auto", count),
            }


_FIRST_CALL = """
import time, torch
start = time.perf_counter()
import numba
imported = time.perf_counter()
import fedmask.kernels.native
print(imported - start, time.perf_counter() - imported)
"""


def first_call() -> dict[str, float]:
    """Seconds of a new process before its first call: numba's import, then compiling or reading the cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
        results = []
        for _ in range(2):
            command = [sys.executable, "-c", _FIRST_CALL]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            results.append([float(word) for word in done.stdout.split()])
    (imported, compiled), (_, cached) = results
    return {"import_numba_seconds": imported, "compile_seconds": compiled, "cached_seconds": cached}


def table_of(rows: list[Row]) -> Table:
    """The rows as a table for people."""
    table = Table(title="Sampled weight gradient: milliseconds, and how many times faster than the others")
    names = ("precision", "threads", "weight", "tokens", "density", "product", "dense", "sampled")
    for name in (*names, "to product", "to dense", "auto"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(str(row["precision"]), str(row["threads"]), f"{row['outputs']}x{row['inputs']}"),
            *(str(row["tokens"]), f"{row['density']:.2%}"),
            *(f"{row[f'{name}_ms']:.2f}" for name in ("product", "dense", "sampled")),
            *(f"{row['ratio_to_product']:.1f}", f"{row['ratio_to_dense']:.1f}", str(row["auto"])),
        )
    return table


def _shape(text: str) -> tuple[int, int]:
    outputs, inputs = text.split("x")
    return int(outputs), int(inputs)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--repeats", type=int, default=7, help="turns that are counted (default 7)")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    options = parser.parse_args(arguments)
    if "sampled" not in available_kernels():
        parser.exit(2, "numba is not installed, so there is nothing to compare: pip install numba\n")
    start = first_call()
    grid = (options.shapes, options.densities, options.tokens, options.threads, options.precisions)
    rows = list(measure(*grid, repeats=options.repeats))
    Console(width=120).print(table_of(rows))
    print(", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in start.items()))
    write(options.json, settings={"repeats": options.repeats}, first_call=start, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
