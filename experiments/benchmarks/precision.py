"""Each method in its best precision and attention: ``python -m experiments.benchmarks.precision``.

Unlike ``step``, this is training as it is used: dropout 0.1 on, our models with our attention and dropout
(and once without, ``sdpa``), the others as transformers gives them, in float32, under autocast to bfloat16 or
with frozen weights in bfloat16, with fused (sdpa) or plain (eager) attention; each method's fastest way
counts. Steps take turns.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from experiments.benchmarks.backbones import (
    SHAPES,
    backbone,
    inputs,
    mask_of,
    set_torch_dropout,
    with_own_modules,
)
from experiments.benchmarks.measuring import in_turns, parser, ratios, show, show_others, write
from experiments.competitors import CONTENDERS
from fedmask.attention import use_plain_attention
from fedmask.masks import Mask
from fedmask.models import set_dropout
from fedmask.precision import cast

DROPOUT = 0.1
BASE = "dense-mask, fp32, sdpa"
# Method, precision, attention. Frozen weights in bfloat16 only where the method has frozen weights.
WAYS = (
    *(("fedmask", *way) for way in product(("fp32", "bf16"), ("ours", "sdpa"))),
    *(("dense-mask", *way) for way in (("fp32", "sdpa"), ("autocast", "sdpa"), ("autocast", "eager"))),
    *(("full", *way) for way in (("fp32", "sdpa"), ("autocast", "eager"))),
    *(("lora", *way) for way in (("fp32", "sdpa"), ("autocast", "eager"), ("bf16", "eager"))),
    *((name, *way) for name in ("shira", "bitfit") for way in (("fp32", "sdpa"), ("autocast", "eager"))),
)


def prepare(
    model: Any, mask: Mask, method: str, precision: str, attention: str
) -> Callable[[dict[str, torch.Tensor], torch.Tensor], None]:
    """The step of one method in one precision with one attention."""
    own = with_own_modules(model, share=method not in ("full", "dense-mask"))
    if attention == "ours":
        use_plain_attention(own)
        set_dropout(own, DROPOUT)
    else:
        own.set_attn_implementation(attention)
        set_torch_dropout(own, DROPOUT)
    if precision == "bf16":
        cast(own, "bf16")
    step = CONTENDERS[method](own, mask).step
    if precision != "autocast":
        return step

    def under_autocast(batch: dict[str, torch.Tensor], direction: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            step(batch, direction)

    return under_autocast


def measure(shape: str, rows: int, tokens: int, density: float, repeats: int) -> list[dict[str, Any]]:
    """One row a way: milliseconds, and how many times faster than dense gradient and mask in float32."""
    model = backbone(shape)
    mask = mask_of(model, density)
    batch, direction = inputs(rows, tokens, model.config.hidden_size)
    steps = {", ".join(way): partial(prepare(model, mask, *way), batch, direction) for way in WAYS}
    seconds = in_turns(steps, repeats)
    to_base = ratios(seconds, BASE)
    return [
        {
            "model": shape,
            "way": name,
            "ms": 1e3 * statistics.median(times),
            "least_ms": 1e3 * min(times),
            "times_faster": 1 / to_base[name],
            "times_faster_of_least": min(seconds[BASE]) / min(times),
            "others": seconds.others[name],
        }
        for name, times in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked to."""
    options = parser(__doc__, repeats=5)
    options.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--rows", type=int, default=32)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--density", type=float, default=0.005)
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rows = []
    for shape in given.models:
        rows += measure(shape, given.rows, given.tokens, given.density, given.repeats)
    show(
        f"A training step with dropout, {given.rows} x {given.tokens} tokens, {given.threads} threads;"
        f" times faster than {BASE}",
        ("method, precision, attention", "model", "ms", "times faster", "of the least"),
        [
            (row["way"], row["model"], f"{row['ms']:.0f}", f"{row['times_faster']:.2f}",
             f"{row['times_faster_of_least']:.2f}")
            for row in rows
        ],
    )  # fmt: skip
    show_others(rows)
    settings = {key: getattr(given, key) for key in ("rows", "tokens", "density", "repeats")}
    write(given.json, settings=settings, steps=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
