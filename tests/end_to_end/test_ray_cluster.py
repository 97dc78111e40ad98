"""A Ray cluster of two nodes on this machine: what a larger one sees. In a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from experiments.engines import run_inprocess
from tests.support import run_config, save_run_files

ROOT = Path(__file__).parents[2]

_CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster
from experiments.engines import run_ray
from fedmask.config import from_json
from tests.end_to_end.ray_apps import noting_app

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "temp_dir": sys.argv[1]})
    try:
        cluster.add_node(num_cpus=1)
        os.environ["RAY_ADDRESS"] = cluster.address
        run_ray(from_json(sys.stdin.read()), make_app=noting_app)
    finally:
        cluster.shutdown()
"""


@pytest.mark.timeout(500)
def test_two_nodes_share_the_clients_and_load_the_backbone_once_each(tmp_path: Path) -> None:
    folder = save_run_files(tmp_path / "files")
    # Clients keep what they received and their residuals, wherever their messages are answered.
    ways = {"up": "int4+ef", "down": "int4+delta"}
    config = run_config(folder, name="cluster", workers=None, runs_dir=str(tmp_path / "runs"), **ways)
    temporary = tempfile.mkdtemp(prefix="ray-")  # short: it holds Unix sockets
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CLUSTER, temporary],
            input=config.model_dump_json(),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        deadline = time.monotonic() + 60
        while _processes_with(temporary) and time.monotonic() < deadline:  # workers follow their raylet
            time.sleep(0.2)
        assert _processes_with(temporary) == []
    finally:
        shutil.rmtree(temporary)
    notes = [json.loads(line) for line in (tmp_path / "runs" / "notes").read_text().splitlines()]
    loads = [note["pid"] for note in notes if note["event"] == "load"]
    messages = [note["pid"] for note in notes if note["event"] == "message"]
    assert len(loads) == len(set(loads)) == 2 and set(loads) == set(messages)
    assert len({note["node"] for note in notes}) == 2
    assert len(messages) == 3 * (1 + config.rounds + 1)  # joining, training, the last evaluation
    here = run_inprocess(run_config(folder, name="here", runs_dir=str(tmp_path / "runs"), **ways))
    there = json.loads((tmp_path / "runs" / "cluster" / "summary.json").read_text())
    assert here.summary["vector_sha256"] == there["vector_sha256"]


def _processes_with(text: str) -> list[str]:
    """Command lines of running processes that name ``text``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended meanwhile
                continue
            if text in command:
                found.append(command)
    return found
