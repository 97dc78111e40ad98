"""What a message to a client costs where each one starts a process, part by part:
``python -m experiments.benchmarks.message``.

A fresh process does what a SuperNode's client process does for one training message of the demo's first
client, and reports the seconds of each part; medians over the repeats. Before that, one message's whole way
from the server app and back, through a real SuperLink and SuperNode (see ``linked``), and their peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from experiments.benchmarks import linked
from experiments.benchmarks.measuring import write

PARTS = """
import json, sys, time
start = began = time.perf_counter()
parts = {}
def done(name):
    global start
    now = time.perf_counter()
    parts[name] = now - start
    start = now
import flwr.clientapp
done("import flwr")
import torch
done("import torch")
import experiments.flower_app
done("import the app")
from experiments.options import build_config
from fedmask.workspace import get_workspace
torch.set_num_threads(1)
workspace = get_workspace(build_config(None, {"steps": 1}))
workspace.use_precision("fp32")
done("settings")
workspace.prepare(0)
done("kept rows")
workspace.backbone
done("load the backbone")
workspace.checkpoint_digest
workspace.mask
done("digest and mask")
task = workspace.task_of(0)
workspace.data(task)
done("read the task")
workspace.shard(0)
done("tokenize the shard")
size = workspace.layout(task).size
done("build the model")
import numpy as np
workspace.local_update(0, 1, np.zeros(size, np.float32))
done("one step, and both scores")
parts["all"] = time.perf_counter() - began
print(json.dumps(parts))
"""


def measure(repeats: int, cache: str) -> dict[str, float]:
    """Medians in seconds by part, over ``repeats`` processes; one before them fills the file cache.

    ``cache``: the folder of kept rows (FEDMASK_CACHE), empty for none.
    """
    found: list[dict[str, float]] = []
    env = {**os.environ, "FEDMASK_CACHE": cache}
    for number in range(repeats + 1):
        done = subprocess.run(
            [sys.executable, "-c", PARTS], capture_output=True, text=True, check=True, env=env
        )
        if number:
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return {part: statistics.median(one[part] for one in found) for part in found[0]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Linux tells when a process was created, and its peak memory.
        linux = sys.platform == "linux"
        way = linked.measure(Path(folder) / "linked", given.repeats) if linux else None
        seconds = {"without": measure(given.repeats, ""), "with": measure(given.repeats, folder)}
    print(f"{'':28} {'nothing kept':>14} {'rows kept':>12}")
    for part, value in seconds["without"].items():
        print(f"{part:28} {value:12.2f} s {seconds['with'][part]:10.2f} s")
    if way is not None:
        print("\nThe way of a message through a SuperLink")
        for part, value in way["seconds"].items():
            print(f"{part:44} {value:10.2f} s")
        print("\nPeak memory")
        for program, value in way["memory"].items():
            print(f"{program:44} {value:9.0f} MB")
    if given.json:
        torch.set_num_threads(1)  # as in the processes that measured
        write(given.json, settings={"repeats": given.repeats}, seconds=seconds, linked=way)


if __name__ == "__main__":
    main()
