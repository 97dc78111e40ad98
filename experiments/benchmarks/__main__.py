"""All benchmarks, one after the other, each in a process of its own: ``python -m experiments.benchmarks``.

Names of some restrict it to those. Results go to ``--to`` as JSON, one file a benchmark.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = (
    "step",
    "precision",
    "memory",
    "latency",
    "overhead",
    "scale",
    "masking",
    "quality",
    "kernels",
    "codecs",
    "entropy",
    "message",
)


def main(arguments: list[str] | None = None) -> int:
    """Run them; the exit code is that of the first one that failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", help=f"which of {', '.join(NAMES)} (all)")
    options.add_argument("--to", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON files")
    given = options.parse_args(arguments)
    unknown = sorted(set(given.names) - set(NAMES))
    if unknown:
        options.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    given.to.mkdir(parents=True, exist_ok=True)
    for name in given.names or NAMES:
        command = [sys.executable, "-m", f"experiments.benchmarks.{name}"]
        code = subprocess.run([*command, "--json", str(given.to / f"{name}.json")], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
