"""Sizes and speeds of the codecs on one core: ``python -m experiments.benchmarks.codecs``.

Sizes are exact and repeat on every machine; speeds are the best of several runs and are for reading,
not for passing or failing anything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.measuring import write
from fedmask.codecs import (
    encode_update,
    index_entropy_bytes,
    pack_indices,
    payload_bytes,
    unpack_indices,
    unpack_update,
)
from fedmask.layout import Layout, Segment
from fedmask.masks import magnitude_mask
from fedmask.models import load_backbone

DENSITIES = (1e-4, 3e-4, 1e-3, 3e-3, 5e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SIZES = (10_616_832, 301_989_888)  # the linear weights of 6 layers x 384 and of 24 layers x 1024
MOST = 4_000_000  # indices in one mask
VALUE_CODECS = (
    "fp32",
    "fp16",
    "bf16",
    "int8",
    "int4",
    "int2",
    "int8h",
    "int4h",
    "int2h",
    "int8+ef",
    "int4+ef",
    "sign",
    "topk:0.1",
    "topk:0.1/int8",
)
DIGEST = "00" * 32


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Shortest of ``repeats`` runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_indices(size: int, density: float, repeats: int) -> dict[str, Any]:
    """One random mask: bits an index, ratio to the entropy bound, indices a second both ways."""
    k = round(density * size)
    indices = np.sort(np.random.default_rng(1).choice(size, k, replace=False, shuffle=False))
    data = pack_indices(indices, size)
    return {
        "size": size,
        "density": density,
        "k": k,
        "bits_per_index": 8 * len(data) / k,
        "ratio_to_bound": len(data) / index_entropy_bytes(k, size),
        "encode_indices_per_second": k / best_seconds(lambda: pack_indices(indices, size), repeats),
        "decode_indices_per_second": k / best_seconds(lambda: unpack_indices(data, size, k), repeats),
    }


def measure_mask(density: float) -> dict[str, Any]:
    """MiniLM's magnitude mask, whose densities differ from tensor to tensor: one code, and one a tensor."""
    mask = magnitude_mask(load_backbone("minilm").model, density)
    size = mask.space.size
    flat, cut = (len(pack_indices(mask.indices, size, edges)) for edges in (None, mask.space.offsets))
    bound = index_entropy_bytes(mask.k, size)
    return {
        "mask": f"minilm, {density:.1%}",
        "k": mask.k,
        "bits_per_index": 8 * flat / mask.k,
        "bits_per_index_by_tensor": 8 * cut / mask.k,
        "ratio_to_bound": flat / bound,
        "ratio_to_bound_by_tensor": cut / bound,
    }


def measure_values(codec: str, repeats: int, count: int = 50_000, copies: int = 40) -> dict[str, Any]:
    """Normal values: bytes an entry and overhead at ``count`` entries, MB of fp32 a second at more."""

    def encode(vector: np.ndarray, layout: Layout) -> bytes:
        draws = np.random.default_rng(3)
        return encode_update(vector, layout, codec=codec, digest=DIGEST, round=1, generator=draws)[0]

    def decode(data: bytes, layout: Layout) -> np.ndarray:
        return unpack_update(data, layout=layout, digest=DIGEST, round=1)

    small = Layout((Segment("mask", count - 12_675), Segment("bias", 11_520), Segment("head/tweets", 1155)))
    large = Layout((Segment("mask", count * copies),))
    rng = np.random.default_rng(2)
    message = encode(rng.normal(0, 1e-3, small.size).astype(np.float32), small)
    vector = rng.normal(0, 1e-3, large.size).astype(np.float32)
    packed = encode(vector, large)
    megabytes = vector.nbytes / 1e6
    return {
        "codec": codec,
        "bytes_per_entry": payload_bytes(message) / small.size,
        "overhead_bytes": len(message) - payload_bytes(message),
        "encode_megabytes_per_second": megabytes / best_seconds(lambda: encode(vector, large), repeats),
        "decode_megabytes_per_second": megabytes / best_seconds(lambda: decode(packed, large), repeats),
    }


def main() -> None:
    """Print the tables, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    cases = [(size, density) for size in SIZES for density in DENSITIES if density * size <= MOST]
    result = {
        "indices": [measure_indices(size, density, options.repeats) for size, density in cases],
        "masks": [measure_mask(density) for density in (0.001, 0.005, 0.02)],
        "values": [measure_values(codec, options.repeats) for codec in VALUE_CODECS],
    }
    if options.json:
        torch.set_num_threads(1)  # no codec uses more
        write(options.json, **result)
    for title, rows in result.items():
        print(title)
        print("  " + "  ".join(rows[0]))
        for row in rows:
            print("  " + "  ".join(f"{v:,.5g}" if isinstance(v, float) else str(v) for v in row.values()))


if __name__ == "__main__":
    main()
