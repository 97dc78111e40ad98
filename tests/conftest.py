"""Settings for all tests, and the folder of a run that no training made."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any test imports a library that reads them: tests never leave the machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# OpenMP's threads spin while they wait. Those of two test processes on two busy cores kept each other waiting
# for ten times as long as the tests take; so they sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import settings

# The same examples in every run, however slow the machine, and no file of them that two processes share.
# ``--hypothesis-profile default`` looks for new ones.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """A test that sets PyTorch's number of threads sets it for itself alone."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """runs/made: 3 clients (2 tweets, 1 bbc), 2 rounds, one reply rejected."""
    folder = tmp_path / "runs" / "made"
    folder.mkdir(parents=True)
    record, rounds, ledger, summary = made_run()
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "summary.json").write_text(json.dumps(summary))
    for name, rows in (("rounds", rounds), ("ledger", ledger)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made_run() -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The four files of a run as plain values: config.json, rounds.jsonl, ledger.jsonl, summary.json."""
    from fedmask.config import from_dict

    config = from_dict(
        {
            "name": "made",
            "rounds": 2,
            "tasks": [{"name": "tweets", "clients": 2}, {"name": "bbc", "clients": 1, "metric": "f1"}],
        }
    )
    partitions = [
        {"client": 0, "task": "tweets", "train_rows": 90, "held_out_rows": 10,
         "labels": {"negative": 60, "neutral": 30}},
        {"client": 1, "task": "tweets", "train_rows": 45, "held_out_rows": 5,
         "labels": {"neutral": 20, "positive": 25}},
        {"client": 2, "task": "bbc", "train_rows": 40, "held_out_rows": 4,
         "labels": {"business": 10, "sports": 20, "tech": 10}},
    ]  # fmt: skip
    layout = {
        "tweets": [["mask", 100], ["bias", 20], ["head/tweets", 6]],
        "bbc": [["mask", 100], ["bias", 20], ["head/bbc", 9]],
    }
    record = {
        "config": config.model_dump(mode="json"),
        "versions": {"fedmask": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        "machine": {"system": "Linux", "cores": 2},
        "engine": "inprocess",
        "recipe": {"v": 1, "checkpoint": "zc3N", "mask": "q6ur"},
        "checkpoint_digest": "cd" * 32,
        "facts": {
            "k": 100,
            "mask_digest": "ab" * 32,
            "eligible_size": 20000,
            "backbone_size": 30000,
            "layout": layout,
            "partitions": partitions,
        },
    }
    ledger = [
        {"round": 0, "client": c, "direction": "down", "kind": "mask", "payload_bytes": 200,
         "message_bytes": 700, "status": "ok"} for c in range(3)
    ]  # fmt: skip
    for round in (1, 2):
        for client in range(3):
            size = 4 * (129 if client == 2 else 126)
            for direction in ("down", "up"):
                status = "rejected" if (round, client, direction) == (2, 1, "up") else "ok"
                ledger.append(
                    {"round": round, "client": client, "direction": direction, "kind": "train",
                     "payload_bytes": size, "message_bytes": size + 1000, "status": status}
                )  # fmt: skip
    for client, size in ((0, 504), (1, 504), (2, 516)):  # the closing evaluation has the last round's number
        for direction, payload in (("down", size), ("up", 0)):
            ledger.append(
                {"round": 2, "client": client, "direction": direction, "kind": "evaluate",
                 "payload_bytes": payload, "message_bytes": payload + 1000, "status": "ok"}
            )  # fmt: skip
    rounds = []
    for round, (tweets, bbc) in enumerate([(0.33, 0.2), (0.6, 0.8), (0.7, 0.9)]):
        rows = [row for row in ledger if row["round"] == round and row["kind"] != "evaluate"]
        sums = {
            f"{direction}{suffix}": sum(row[key] for row in rows if row["direction"] == direction)
            for direction in ("up", "down")
            for suffix, key in (("", "payload_bytes"), ("_message", "message_bytes"))
        }
        rounds.append(
            {
                "round": round,
                "seconds": 2.5 * (round > 0),
                "dev": {"tweets": {"loss": 1.1, "accuracy": tweets}, "bbc": {"loss": 1.6, "f1": bbc}},
                "global": {"tweets": tweets - 0.1, "bbc": bbc - 0.1} if round else {},
                "personal": {"tweets": tweets + 0.05, "bbc": bbc + 0.05} if round else {},
                "train_loss": {"tweets": 0.9, "bbc": 0.8} if round else {},
                "sampled": [0, 1, 2] if round else [],
                "replied": ([0, 1, 2] if round == 1 else [0, 2]) if round else [],
                "selected": ([0, 1, 2] if round == 1 else [0, 2]) if round else [],
                "note": "",
                "rejected": [{"client": 1, "reason": "a value is not finite"}] if round == 2 else [],
                "steps": 9 * (round > 0),
                "bytes": sums,
            }
        )
    summary = {
        "test": {"tweets": {"loss": 0.7, "accuracy": 0.69}, "bbc": {"loss": 0.3, "f1": 0.91}},
        "final_dev": rounds[-1]["dev"],
        "vector_sha256": "ef" * 32,
        "rounds": 2,
        "steps": 18,
        "seconds": 5.0,
        "bytes": {key: sum(r["bytes"][key] for r in rounds) for key in rounds[0]["bytes"]},
        "clients": {"tweets": {"score": 0.6, "clients": 2}, "bbc": {"score": 0.8, "clients": 1}},
        "unscored": [],
        "notes": [],
        "overlap": {
            "rule": "gradient",
            "batches": 2,
            "clients": 3,
            "k": 100,
            "union": 250,
            "mean_jaccard": 0.1,
        },
        "costs": {
            "full": {
                "way": "full",
                "up_bytes_per_client_round": 120000.0,
                "down_bytes_per_client_round": 120000.0,
                "total_bytes": 1440000,
                "not_charged": "memory of training every weight",
            }
        },
    }
    return record, rounds, ledger, summary
