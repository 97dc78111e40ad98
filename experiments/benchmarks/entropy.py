"""What entropy coding of quantized changes saves: ``python -m experiments.benchmarks.entropy``.

The changes are real: the demo's federation for some rounds, in bf16 and plainly averaged; what its clients
send up and what comes down, client by client and round by round. Each is quantized as the codecs do, and the
codes are coded by our Huffman code, by zlib, and by zstandard and constriction's range coder where these
packages are (the ``bench`` extra). Sizes are relative to the plain codec's; ``entropy`` is the bound of a
code that knows each change's own counts and takes its values one by one.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.measuring import show, write

BITS = (8, 4, 2)
WAYS = ("entropy", "ours", "zlib", "zstandard", "constriction")
DEMO = Path(__file__).parents[1] / "studies" / "demo.toml"


def changes(rounds: int) -> dict[str, list[np.ndarray]]:
    """The changes (float32) that clients send ``up`` in a run of the demo, and those that come ``down``."""
    from experiments.options import read_settings
    from fedmask.config import from_dict
    from fedmask.workspace import get_workspace

    workspace = get_workspace(from_dict({**read_settings(DEMO), "name": "entropy", "rounds": rounds}))
    workspace.use_precision("bf16")
    clients = range(sum(task.clients for task in workspace.config.tasks))
    found: dict[str, list[np.ndarray]] = {"up": [], "down": []}
    at = {task: np.zeros(workspace.layout(task).size, np.float32) for task in workspace.tasks}
    for number in range(1, rounds + 1):
        sums: dict[str, Any] = {}
        for client in clients:
            task = workspace.task_of(client)
            update = workspace.local_update(client, number, at[task])
            found["up"].append(update.change)
            size = workspace.layout(task).shared_size
            for key, part in (("", update.change[:size]), (task, update.change[size:])):
                total, rows = sums.get(key, (0.0, 0))
                sums[key] = total + update.examples * part.astype(np.float64), rows + update.examples
        means = {key: (total / rows).astype(np.float32) for key, (total, rows) in sums.items()}
        for task in at:
            found["down"].append(np.concatenate([means[""], means[task]]))
            at[task] = at[task] + found["down"][-1]
    return found


def sizes(change: np.ndarray, bits: int) -> dict[str, float]:
    """Bytes of one change (float32 ``[n]``) in the plain codec (``plain``) and in each of ``WAYS``."""
    from fedmask.codecs import bare_codec
    from fedmask.codecs.blocks import unframe

    plain, _ = bare_codec(f"int{bits}").encode(change, None, np.random.default_rng(1))
    coded, _ = bare_codec(f"int{bits}h").encode(change, None, np.random.default_rng(1))
    _, blocks = unframe("int", memoryview(plain), change.size, bits)
    codes = blocks.reshape(-1)[: change.size]
    beside = len(plain) - -(-change.size * bits // 8)  # the blocks' scales, which no way codes
    counts = np.bincount(codes, minlength=2**bits)
    shares = counts[counts > 0] / change.size
    found = {
        "plain": len(plain),
        "entropy": beside - change.size * float(shares @ np.log2(shares)) / 8,
        "ours": len(coded),
        "zlib": len(zlib.compress(plain, 9)),
    }
    if zstandard := _package("zstandard"):
        found["zstandard"] = len(zstandard.ZstdCompressor(level=3).compress(plain))
    if constriction := _package("constriction"):
        coder = constriction.stream.queue.RangeEncoder()
        model = constriction.stream.model.Categorical((counts + 1e-9) / change.size, perfect=False)
        coder.encode(codes.astype(np.int32), model)
        # The receiver needs the counts too: two bytes a code.
        found["constriction"] = coder.get_compressed().nbytes + beside + 2 * len(counts)
    return found


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def main(arguments: list[str] | None = None) -> int:
    """Train, code, print a table, write JSON if asked to."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="file to write all numbers to")
    options.add_argument("--rounds", type=int, default=4)
    given = options.parse_args(arguments)
    torch.set_num_threads(1)  # nothing is timed, and on a busy machine two threads wait for each other
    rows = []
    for way, found in changes(given.rounds).items():
        for bits in BITS:
            each = [sizes(change, bits) for change in found]
            total = {key: sum(one[key] for one in each) for key in each[0]}
            shares: dict[str, float | None] = {key: total[key] / total["plain"] for key in total}
            rows.append(
                {"way": way, "codec": f"int{bits}", "changes": len(found), "plain_bytes": total["plain"]}
                | {key: shares.get(key) for key in WAYS}
            )
    show(
        "Bytes against the plain codec's",
        ("changes", "codec", *WAYS),
        [(row["way"], row["codec"], *(_figure(row[key]) for key in WAYS)) for row in rows],
    )
    write(given.json, settings={"rounds": given.rounds}, entropy=rows)
    return 0


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
