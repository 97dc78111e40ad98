"""One training step of each method against the frozen floor: ``python -m experiments.benchmarks.step``.

A step is forward, backward and optimizer (AdamW, fused) in float32, without dropout and with transformers'
default attention for everyone. ``floor``: forward and input gradients, with the first layer norm's bias
trained. Ratios are a method's median time to the floor's.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from typing import Any

import torch

from experiments.benchmarks.backbones import SHAPES, backbone, inputs, mask_of, with_own_modules
from experiments.benchmarks.measuring import in_turns, parser, ratios, show, show_others, write
from experiments.competitors import CONTENDERS

OWN_MEMORY = ("full", "dense-mask")


def measure(
    shape: str, methods: list[str], rows: int, tokens: int, density: float, repeats: int
) -> list[dict[str, Any]]:
    """One row a method: milliseconds (median and minimum), the ratio to the floor, trained entries."""
    model = backbone(shape)
    mask = mask_of(model, density)
    batch, direction = inputs(rows, tokens, model.config.hidden_size)
    prepared = {
        name: CONTENDERS[name](with_own_modules(model, share=name not in OWN_MEMORY), mask)
        for name in methods
    }
    seconds = in_turns({name: partial(one.step, batch, direction) for name, one in prepared.items()}, repeats)
    to_floor = ratios(seconds, "floor")
    return [
        {
            "model": shape,
            "method": name,
            "trained": prepared[name].trained,
            "ms": 1e3 * statistics.median(seconds[name]),
            "least_ms": 1e3 * min(seconds[name]),
            "ratio_to_floor": to_floor[name],
            "ratio_of_least": min(seconds[name]) / min(seconds["floor"]),
            "others": seconds.others[name],
        }
        for name in methods
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked to."""
    options = parser(__doc__, repeats=7)
    options.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--methods", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    options.add_argument("--rows", type=int, default=32)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--density", type=float, default=0.005)
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    methods = list(dict.fromkeys(["floor", *given.methods]))
    rows = []
    for shape in given.models:
        rows += measure(shape, methods, given.rows, given.tokens, given.density, given.repeats)
    show(
        f"A training step, {given.rows} x {given.tokens} tokens, float32, {given.threads} threads",
        ("method", "model", "trained", "ms", "to the floor", "of the least"),
        [
            (row["method"], row["model"], f"{row['trained']:,}", f"{row['ms']:.0f}",
             f"{row['ratio_to_floor']:.2f}", f"{row['ratio_of_least']:.2f}")
            for row in rows
        ],
    )  # fmt: skip
    show_others(rows)
    settings = {key: getattr(given, key) for key in ("rows", "tokens", "density", "repeats")}
    write(given.json, settings=settings, steps=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
