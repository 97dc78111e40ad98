"""Time and memory of a magnitude mask: ``python -m experiments.benchmarks.masking``.

Three sizes with random weights, each in a process of its own, so that its peak is its own. Memory is the
process's peak after masking minus what it held before: an upper bound. Digest of the checkpoint included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def _sizes(hidden: int, layers: int, heads: int, words: int, positions: int, types: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": words,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
    }


MODELS: dict[str, dict[str, Any]] = {
    "22M": _sizes(384, 6, 12, 30522, 512, 2),  # MiniLM-L6
    "110M": _sizes(768, 12, 12, 30522, 512, 2),  # BERT-base
    "355M": _sizes(1024, 24, 16, 50265, 514, 1),  # RoBERTa-large
}
_MB = 2**20


def measure(size: str, density: float, eligible: str, threads: int) -> dict[str, Any]:
    """Seconds and extra memory (MB) of one mask in this process."""
    import torch
    from transformers import BertConfig, BertModel

    from fedmask.masks import Rule, derive_mask
    from fedmask.space import backbone_parameters

    torch.set_num_threads(threads)
    rule = Rule("magnitude", density, eligible)  # type: ignore[arg-type]
    small = {**MODELS["22M"], "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 100}
    derive_mask(BertModel(BertConfig(**small)), rule)  # imports and thread pools are not what is measured
    with torch.device("meta"):
        model = BertModel(BertConfig(**MODELS[size]), add_pooling_layer=False)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.04)
    entries = sum(parameter.numel() for parameter in backbone_parameters(model).values())
    before, began = _resident_bytes(), time.perf_counter()
    mask = derive_mask(model, rule)
    seconds = time.perf_counter() - began
    return {
        "model": size,
        "backbone_entries": entries,
        "eligible_entries": mask.space.eligible_size,
        "k": mask.k,
        "seconds": round(seconds, 3),
        "model_mb": round(4 * entries / _MB, 1),
        "extra_mb": round((_peak_bytes() - before) / _MB, 1),
    }


def _resident_bytes() -> int:
    """What the process holds now; where the system does not say, the most that it has held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return _peak_bytes()


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the process that started this one held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--sizes", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--eligible", default="linear", choices=["linear", "linear+embeddings", "all"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--here", action="store_true", help="one size, in this process, as JSON on the output"
    )
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure(options.sizes[0], options.density, options.eligible, options.threads)))
        return 0
    rows = []
    print(f"{'model':>6} {'k':>10} {'seconds':>8} {'model MB':>9} {'extra MB':>9} {'share':>6}")
    for size in options.sizes:
        command = [sys.executable, "-m", "experiments.benchmarks.masking", "--here", "--sizes", size,
                   "--density", str(options.density), "--eligible", options.eligible,
                   "--threads", str(options.threads)]  # fmt: skip
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        share = row["extra_mb"] / row["model_mb"]
        print(f"{size:>6} {row['k']:>10,} {row['seconds']:>8.2f}", end=" ")
        print(f"{row['model_mb']:>9.1f} {row['extra_mb']:>9.1f} {share:>6.0%}")
    if options.json:
        import torch

        from experiments.benchmarks.measuring import write

        torch.set_num_threads(options.threads)  # as in the processes that measured
        write(options.json, settings={"threads": options.threads, "density": options.density}, masks=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
