"""Federations of 10 to 10,000 clients, and our streaming mean: ``python -m experiments.benchmarks.scale``.

Clients: a small model, at most 100 clients a round, one process and one thread; each number of clients in a
process of its own; then with two processes, and with clients that keep error feedback. Seconds from the start
of the run until all have joined, and a round; peak memory of the process, and by how much it grew from the
first round to the last.

Aggregation: updates of a million entries, one after the other, in turns with a copy of memory of the same
machine at the same time. An update moves 20 bytes an entry (4 read, 8 read and 8 written), a copy 16. Beside
it the peak memory of a whole round of our ``mean`` and of Flower's ``FedAvg``, which holds the replies.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.measuring import write

CLIENTS = (10, 100, 1_000, 10_000)
ENTRIES, REPLIES = 1_000_000, 1_000
HELD = {"mean": REPLIES, "fedavg": 200}  # replies of a whole round; FedAvg holds them all
_COPIED = 32_000_000  # float64 values: far beyond any cache


def peak_megabytes() -> float:
    """The most memory that this process has had (Linux counts in kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_clients(clients: int, workers: int, up: str) -> dict[str, Any]:
    """One run of three rounds; in a fresh process, because memory is measured."""
    import torch

    from experiments.benchmarks.small import small_run
    from experiments.engines import run_inprocess
    from server.observer import Silent

    class Watch(Silent):
        def __init__(self) -> None:
            self.began = time.perf_counter()
            self.marks: list[tuple[float, float]] = []

        def on_round_end(self, row: Mapping[str, Any]) -> None:
            self.marks.append((time.perf_counter() - self.began, peak_megabytes()))

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = small_run(Path(folder), clients, workers=workers, up=up, server=_server(clients))
        # What every run pays, whatever its size: a run of two clients first.
        run_inprocess(small_run(Path(folder), 2, rounds=1), client_evaluation=False)
        watch, base = Watch(), peak_megabytes()
        result = run_inprocess(config, watch, client_evaluation=False)
        total = time.perf_counter() - watch.began
        size = result.state.shared.size
    rounds = np.diff([seconds for seconds, _ in watch.marks])
    return {
        "clients": clients,
        "workers": workers,
        "up": up,
        "sampled": min(100, clients),
        "values": int(size),
        "joined_seconds": watch.marks[0][0],
        "round_seconds": float(np.median(rounds)),
        "total_seconds": total,
        "peak_megabytes": peak_megabytes(),
        "above_a_run_of_two_megabytes": peak_megabytes() - base,
        "grown_after_round_1_megabytes": watch.marks[-1][1] - watch.marks[1][1],
    }


def _server(clients: int) -> dict[str, Any]:
    return {"clients_per_round": min(100, clients), "strategy": "mean"}


def measure_aggregation(repeats: int) -> dict[str, Any]:
    """Gigabytes a second of the streaming mean, of decoding and adding, and of copying memory."""
    from fedmask.aggregation import add, fixed_sum
    from fedmask.codecs import pack_update, unpack_update
    from fedmask.layout import Layout, Segment

    rng = np.random.default_rng(1)
    updates = (1e-3 * rng.standard_normal((20, ENTRIES))).astype(np.float32)  # 80 MB, in turns
    layout, digest = Layout((Segment("mask", ENTRIES),)), "00" * 32
    packed = [pack_update(u, layout, codec="fp32", digest=digest, round=1) for u in updates]
    source, target = np.ones(_COPIED), np.full(_COPIED, 2.0)  # both in memory already
    seconds: dict[str, list[float]] = {"copy": [], "mean": [], "decode and mean": []}
    for _ in range(repeats):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds["copy"].append((time.perf_counter() - began) / (16 * _COPIED))
        state = fixed_sum(ENTRIES, 10 * REPLIES)
        began = time.perf_counter()
        for number in range(REPLIES):
            add(state, updates[number % len(updates)], 10)
        seconds["mean"].append((time.perf_counter() - began) / (20 * ENTRIES * REPLIES))
        state, some = fixed_sum(ENTRIES, 10 * REPLIES), REPLIES // 10
        began = time.perf_counter()
        for number in range(some):
            update = unpack_update(packed[number % len(packed)], layout=layout, digest=digest, round=1)
            add(state, update, 10)
        seconds["decode and mean"].append((time.perf_counter() - began) / (20 * ENTRIES * some))
    rates = {name: 1e-9 / statistics.median(found) for name, found in seconds.items()}
    return {
        "replies": REPLIES,
        "entries": ENTRIES,
        "seconds": 20e-9 * ENTRIES * REPLIES / rates["mean"],
        "gigabytes_per_second": rates,
        "share_of_copy": rates["mean"] / rates["copy"],
    }


def measure_held(strategy: str) -> dict[str, Any]:
    """Seconds and memory of one round's aggregation through a strategy, replies made as they are wanted."""
    from fedmask.config import ServerConfig
    from server.strategy import Contribution
    from server.streaming import make_strategy

    shared, heads = np.zeros(ENTRIES, np.float32), {"task": np.zeros(0, np.float32)}
    base = peak_megabytes()
    began = time.perf_counter()
    tally = make_strategy(ServerConfig(strategy=strategy)).start(1, shared, heads, 10 * HELD[strategy])
    for client in range(HELD[strategy]):
        tally.add(Contribution(client, "task", 10, np.full(ENTRIES, 1e-6 * client, np.float32)))
    tally.result()
    return {
        "strategy": strategy,
        "replies": HELD[strategy],
        "seconds": time.perf_counter() - began,
        "grown_megabytes": peak_megabytes() - base,
    }


def in_a_process(*arguments: str) -> dict[str, Any]:
    """What this module prints with these arguments, in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.benchmarks.scale", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the tables and write them with ``--json PATH``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--up", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, nargs="*", default=list(CLIENTS))
    parser.add_argument("--only-clients", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only-strategy", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_clients:
        print(json.dumps(measure_clients(options.only_clients, options.workers, options.up)))
        return
    if options.only_strategy:
        print(json.dumps(measure_held(options.only_strategy)))
        return
    # Beside the plain ones: two processes, and clients that keep a vector between rounds (error feedback).
    cases = [(n, "1", "fp32") for n in options.clients]
    cases += [(min(1_000, max(options.clients)), "2", "fp32"), (max(options.clients), "1", "int4+ef")]
    result: dict[str, Any] = {
        "clients": [
            in_a_process("--only-clients", str(n), "--workers", workers, "--up", up)
            for n, workers, up in cases
        ],
        "aggregation": measure_aggregation(options.repeats),
        "held": [in_a_process("--only-strategy", name) for name in HELD],
    }
    for title in ("clients", "held"):
        print(title)
        print("  " + "  ".join(result[title][0]))
        for row in result[title]:
            print("  " + "  ".join(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    print("aggregation", json.dumps(result["aggregation"]))
    if options.json:
        import torch

        torch.set_num_threads(1)  # as in the processes that measured
        write(options.json, **result)


if __name__ == "__main__":
    main()
