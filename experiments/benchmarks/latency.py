"""Inference with a merged model against the original: ``python -m experiments.benchmarks.latency``.

Merged are 0.5 % masked entries and HiWi's bias adapters. Beside it LoRA (peft, rank 8) as it is served
without merging. Ratios are a model's median time to the original's.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from experiments.benchmarks.backbones import SHAPES, backbone, inputs, mask_of, with_own_modules
from experiments.benchmarks.measuring import in_turns, parser, ratios, show, show_others, write
from experiments.competitors import lora
from fedmask import merge, sparsify
from fedmask.tuner import tuning_of

BATCHES = ((1, 16), (32, 64))
CALLS = {1: 10, 32: 1}  # forward passes in one turn, by rows


def forward(model: Any, batch: dict[str, torch.Tensor], calls: int) -> None:
    """``calls`` forward passes without gradient."""
    with torch.inference_mode():
        for _ in range(calls):
            model(**batch)


def models_of(shape: str) -> dict[str, Any]:
    """The original, a merged one whose entries have really moved, and LoRA unmerged."""
    original = backbone(shape).eval()
    mask = mask_of(original, 0.005)
    tuned = sparsify(with_own_modules(original, share=False), mask, bias_adapters=16)
    with torch.no_grad():
        for trainable in tuning_of(tuned).trainables:
            trainable.values.add_(torch.randn_like(trainable.values), alpha=1e-3)
    wrapped = lora(with_own_modules(original, share=False), mask).model
    # On memory of its own, copied like the others': neither cache nor pages must favour one.
    plain = with_own_modules(original, share=False)
    return {"original": plain.eval(), "merged": merge(tuned).eval(), "lora unmerged": wrapped.eval()}


def measure(shape: str, repeats: int) -> list[dict[str, Any]]:
    """One row a model and batch."""
    models, found = models_of(shape), []
    for rows, tokens in BATCHES:
        batch, _ = inputs(rows, tokens, 1)
        calls = CALLS[rows]
        functions: dict[str, Callable[[], None]] = {
            name: partial(forward, model, batch, calls) for name, model in models.items()
        }
        seconds = in_turns(functions, repeats)
        to_original = ratios(seconds, "original")
        found += [
            {
                "model": shape,
                "variant": name,
                "rows": rows,
                "tokens": tokens,
                "ms": 1e3 * statistics.median(times) / calls,
                "ratio_to_original": to_original[name],
                "ratio_of_least": min(times) / min(seconds["original"]),
                "others": seconds.others[name],
            }
            for name, times in seconds.items()
        ]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked to."""
    options = parser(__doc__, repeats=9)
    options.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rows = [row for shape in given.models for row in measure(shape, given.repeats)]
    show(
        f"Inference, {given.threads} threads",
        ("variant", "model", "batch", "ms", "to the original", "of the least"),
        [
            (row["variant"], row["model"], f"{row['rows']} x {row['tokens']}", f"{row['ms']:.1f}",
             f"{row['ratio_to_original']:.3f}", f"{row['ratio_of_least']:.3f}")
            for row in rows
        ],
    )  # fmt: skip
    show_others(rows)
    write(given.json, settings={"repeats": given.repeats}, latency=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
