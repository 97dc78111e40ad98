"""What a federation costs around its training steps: ``python -m experiments.benchmarks.overhead``.

A round of 10 clients with 20 steps each (MiniLM-L6, the bundled tweets), one client at a time on one thread:

- ``bare``: the same steps in a plain PyTorch loop, with the mean of the changes at the end;
- ``inprocess``: the whole Flower path: messages, bytes, checks, ledger, aggregation, a dev row scored;
- ``ray``: the same apps on Flower's simulation runtime, one actor;
- ``quickstart``: Flower's quickstart way (full fine-tuning, full ``state_dict``, Ray), by the seconds of its
  own steps: full fine-tuning has slower steps, which is not what is measured here.

``bare`` and ``inprocess`` take turns; the first turn of each, and the first round of each engine, in which
models are loaded, are not counted. Medians of rounds during which other processes were quiet.
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
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from experiments.benchmarks.measuring import TRIES, write
from experiments.benchmarks.measuring import in_turns as take_turns

CLIENTS, STEPS, BATCH, TOKENS = 10, 20, 4, 32


def settings(folder: str, rounds: int) -> Any:
    """The run that all ways do."""
    from fedmask.config import from_dict

    return from_dict(
        {
            "name": "overhead",
            "method": "pafi",
            "rounds": rounds,
            "workers": 1,
            "threads": 1,
            "eval_rows": 1,
            "overlap_batches": 0,
            "tasks": [{"name": "tweets", "clients": CLIENTS}],
            "partition": {"kind": "iid", "held_out": 0.0},
            "train": {"steps": STEPS, "batch_size": BATCH, "max_tokens": TOKENS, "dropout": 0.0},
            "server": {"strategy": "mean"},
            "runs_dir": folder,
        }
    )


def bare_round(workspace: Any, vector: np.ndarray, number: int) -> np.ndarray:
    """All clients' steps without a federation; the vector (float32 ``[layout.size]``) after the round."""
    from fedmask.rng import rng_for
    from fedmask.tasks import batches, collate
    from fedmask.training import Stream, tuned

    config, changes = workspace.config, []
    model = workspace.model("tweets")
    for client in range(CLIENTS):
        data = workspace.shard(client).train
        with tuned(model, vector, Stream(config.seed, number, client)) as tuning:
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=config.train.lr, weight_decay=0.0, fused=True)
            model.train()
            for rows in batches(data, BATCH, rng_for(config.seed, number, client, "batches"))[:STEPS]:
                inputs = collate(data, rows, workspace.backbone.pad_id)
                labels = inputs.pop("labels")
                optimizer.zero_grad()
                functional.cross_entropy(model(**inputs), labels).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            model.eval()
            changes.append(tuning.vector().numpy() - vector)
    return vector + np.mean(changes, axis=0, dtype=np.float32)


def in_turns(repeats: int) -> dict[str, list[float]]:
    """Seconds of rounds, bare and through the in-process engine, in turns."""
    from experiments.inprocess import InProcessGrid
    from fedmask.ledger import Ledger
    from fedmask.workspace import get_workspace
    from server.joining import join
    from server.observer import Silent
    from server.rounds import Federation, most_claims
    from server.state import RunState
    from server.streaming import make_strategy

    torch.set_num_threads(1)
    config = settings("unused", TRIES * repeats + 1)
    workspace, ledger, grid = get_workspace(config), Ledger(), InProcessGrid(config)
    roster = join(grid, workspace, ledger, node_timeout=60.0, arrived=lambda _client: None)
    strategy = make_strategy(config.server)
    federation = Federation(workspace, grid, roster, strategy, ledger, Silent(), most_claims(workspace))
    state = RunState.start(workspace)
    vector = np.concatenate([state.shared, state.heads["tweets"]])
    number = 0

    def bare() -> None:
        nonlocal vector, number
        number += 1
        vector = bare_round(workspace, vector, number)

    def inprocess() -> None:
        nonlocal state
        state, _ = federation.train_round(state)

    seconds = take_turns({"bare": bare, "inprocess": inprocess}, repeats)
    return {**seconds, "others": list(seconds.others.values())}


def on_ray(rounds: int) -> dict[str, list[float]]:
    """Seconds of rounds on Ray."""
    from experiments.engines import run_ray

    with tempfile.TemporaryDirectory() as folder:
        result = run_ray(settings(folder, rounds + 1), client_evaluation=False)
        lines = (result.folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return {"ray": [float(json.loads(line)["seconds"]) for line in lines[2:]]}


def quickstart(rounds: int) -> dict[str, list[float]]:
    """Seconds of rounds of Flower's quickstart way, and of its steps alone."""
    from experiments.competitors.quickstart import run_quickstart

    found = run_quickstart(settings("unused", rounds + 1))[1:]
    return {
        "quickstart": [row["round_seconds"] for row in found],
        "quickstart steps": [row["steps_seconds"] for row in found],
    }


WAYS = {"turns": in_turns, "ray": on_ray, "quickstart": quickstart}


def in_a_process(way: str, repeats: int) -> dict[str, list[float]]:
    """One of ``WAYS`` in a process of its own, so that none inherits another's memory and threads."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.benchmarks.overhead", "--only", way]
    done = subprocess.run(
        [*command, "--repeats", str(repeats)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table and write it with ``--json PATH``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine-repeats", type=int, default=5, help="counted rounds on Ray")
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(WAYS[options.only](options.repeats)))
        return
    seconds = in_a_process("turns", options.repeats)
    if not options.without_ray:
        seconds |= in_a_process("ray", options.engine_repeats)
        seconds |= in_a_process("quickstart", options.engine_repeats)
    others = max(seconds.pop("others"))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {"inprocess": medians["inprocess"] / medians["bare"]}
    if "ray" in medians:
        ratios["ray"] = medians["ray"] / medians["bare"]
        own = zip(seconds["quickstart"], seconds["quickstart steps"], strict=True)
        ratios["quickstart"] = statistics.median(whole / steps for whole, steps in own)
    print(f"{CLIENTS} clients x {STEPS} steps of {BATCH} rows; others had {others:.1%} of a core")
    for name, median in medians.items():
        ratio = f"  x {ratios[name]:.3f}" if name in ratios else ""
        print(f"  {name:17} {median:8.3f} s{ratio}")
    if options.json:
        torch.set_num_threads(1)  # as in the processes that measured
        settings_used = {"clients": CLIENTS, "steps": STEPS, "batch": BATCH, "tokens": TOKENS}
        write(
            options.json,
            settings=settings_used,
            others=others,
            seconds=seconds,
            medians=medians,
            ratios=ratios,
        )


if __name__ == "__main__":
    main()
