"""A real SuperLink and two real SuperNodes on this machine, for tests; and a small run for them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmask.config import RunConfig, from_dict
from tests.end_to_end.processes import free_port, none_left, start, stop, wait_for_health
from tests.end_to_end.proxy import CountingProxy
from tests.support import save_two_tasks


@dataclass(frozen=True)
class Site:
    """FLWR_HOME of a SuperLink, the proxy through which its SuperNodes reach it, and these."""

    home: Path
    proxy: CountingProxy
    nodes: tuple[subprocess.Popen[bytes], ...]


@contextlib.contextmanager
def superlink_at(home: Path) -> Iterator[Site]:
    """A SuperLink, called "here", with two SuperNodes; nothing of them is left afterwards.

    ``home``: a new folder, which must be this process's FLWR_HOME.
    """
    home.mkdir()
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    here = ["--insecure", "--host", "127.0.0.1", "--port"]
    started = [start(home, "link", ["flower-superlink", *here, str(port)])]
    proxy = CountingProxy(port)
    try:
        for node in range(2):
            place = ["--node-config", f"partition-id={node} num-partitions=2"]
            arguments = [
                "flower-supernode",
                *here,
                str(free_port()),
                "--superlink",
                f"127.0.0.1:{proxy.port}",
                *place,
            ]
            started.append(start(home, f"node-{node}", arguments))
        wait_for_health(port)
        yield Site(home, proxy, tuple(started[1:]))
    except BaseException:
        for log in sorted(home.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")
        raise
    finally:
        for process in reversed(started):
            stop(process)
        proxy.close()
        none_left(home)


def remote_config(tmp_path: Path, held_out: float = 0.1) -> RunConfig:
    """One client of each of two tasks, one round; model and rows in ``tmp_path``.

    With nothing ``held_out`` clients are not asked to score, which takes a process each.
    """
    save_two_tasks(tmp_path)
    return from_dict(
        {
            "name": "remote",
            "model": str(tmp_path / "model"),
            "density": 0.02,
            "rounds": 1,
            "precision": "auto",  # each message is a new process there, and must know the choice
            "workers": 1,
            "tasks": [
                {
                    "name": name,
                    "source": str(tmp_path / f"{name}.tsv"),
                    "text": ["text"],
                    "label": "label",
                    "clients": 1,
                }
                for name in ("mood", "topic")
            ],
            "partition": {"kind": "iid", "held_out": held_out},
            "train": {"steps": 2, "batch_size": 8, "max_tokens": 16},
            "runs_dir": str(tmp_path / "runs"),
        }
    )
