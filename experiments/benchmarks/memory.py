"""Memory of one training step, above the frozen floor: ``python -m experiments.benchmarks.memory``.

Exact, not timed: every allocation of PyTorch during a step is counted, and the peak is compared with the
floor's (see ``step``), in float32 and for ours in bfloat16 too. ``kept``: what the forward pass keeps for the
backward pass, parameters apart; a layer whose weight is trained keeps its input. ``rest``: gradients and
scratch. ``state``: values, gradients and two moments of what is trained. ``beside``: masks, indices,
references.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks.backbones import SHAPES, backbone, inputs, mask_of, with_own_modules
from experiments.benchmarks.measuring import parser, show, write
from experiments.competitors import CONTENDERS, Contender
from fedmask.precision import cast

_MB = 2**20
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def peak_bytes(contender: Contender, batch: Batch) -> int:
    """The most that a step holds at one time beyond what it began with."""
    contender.step(*batch)  # moments are made and scratch grows in the first one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        contender.step(*batch)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def kept_bytes(contender: Contender, batch: Batch) -> int:
    """What the forward pass keeps for the backward pass, without the model's own tensors."""
    own = [*contender.model.parameters(), *contender.model.buffers()]
    seen = {tensor.untyped_storage().data_ptr() for tensor in own}
    alive: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.extend([tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = contender.model(**batch[0]).last_hidden_state
    del states
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return sum(size for place, size in storages.items() if place not in seen)


def measure(shape: str, methods: list[str], rows: int, tokens: int, density: float) -> list[dict[str, Any]]:
    """One row a method and precision."""
    model = backbone(shape)
    mask = mask_of(model, density)
    batch = inputs(rows, tokens, model.config.hidden_size)
    ways = [(name, "fp32") for name in methods] + [(name, "bf16") for name in methods if name == "fedmask"]
    found: list[dict[str, Any]] = []
    for name, precision in ways:
        own = cast(with_own_modules(model, share=False), precision)  # type: ignore[arg-type]
        contender = CONTENDERS[name](own, mask)
        found.append(
            {
                "model": shape,
                "method": name,
                "precision": precision,
                "trained": contender.trained,
                "peak_bytes": peak_bytes(contender, batch),
                "kept_bytes": kept_bytes(contender, batch),
                "state_bytes": contender.state_bytes(),
                "state_bytes_per_trained_entry": contender.state_bytes() / contender.trained,
                "beside_bytes": contender.extra_bytes,
            }
        )
        del own, contender
        gc.collect()  # models and their patches hold each other
    for row in found:
        row["peak_above_floor"] = row["peak_bytes"] - found[0]["peak_bytes"]
        row["kept_above_floor"] = row["kept_bytes"] - found[0]["kept_bytes"]
        row["rest_above_floor"] = row["peak_above_floor"] - row["kept_above_floor"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked to."""
    options = parser(__doc__, repeats=1)
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
        rows += measure(shape, methods, given.rows, given.tokens, given.density)
    show(
        f"A training step, {given.rows} x {given.tokens} tokens: megabytes above the floor's peak",
        ("method", "model", "trained", "peak", "of it kept", "rest", "state", "bytes an entry", "beside"),
        [
            (f"{row['method']} {row['precision']}", row["model"], f"{row['trained']:,}",
             *(f"{row[f'{key}_above_floor'] / _MB:.1f}" for key in ("peak", "kept", "rest")),
             f"{row['state_bytes'] / _MB:.1f}", f"{row['state_bytes_per_trained_entry']:.1f}",
             f"{row['beside_bytes'] / _MB:.1f}")
            for row in rows
        ],
    )  # fmt: skip
    settings = {key: getattr(given, key) for key in ("rows", "tokens", "density")}
    write(given.json, settings=settings, memory=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
