"""How many values there are to count: unions of masks, LoRA's factors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_QUERY_VALUE = re.compile(
    r"(^|\.)(query|value|q_proj|v_proj|q_lin|v_lin|q|v|c_attn|query_key_value)\.weight$"
)


def union_sizes(
    masks: Mapping[int, NDArray[np.integer]], schedule: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Measured unions, one a round: distinct indices in the masks of all clients of earlier rounds."""
    known: NDArray[np.integer] = np.empty(0, np.int64)
    seen: set[int] = set()
    sizes = []
    for sampled in schedule:
        sizes.append(int(known.size))
        for client in sampled:
            if client not in seen:
                known = np.union1d(known, masks[client])
                seen.add(client)
    return tuple(sizes)


def independent_union(k: int, eligible_size: int, clients: int) -> int:
    """Expected union of independent random masks, N (1 - (1 - k/N)^clients), rounded up.

    An upper bound for masks that favour the same entries: scores of related data overlap more than chance.
    """
    if not k or not clients:
        return 0
    if k == eligible_size:
        return k
    return math.ceil(-eligible_size * math.expm1(clients * math.log1p(-k / eligible_size)))


def lora_values(shapes: Iterable[Sequence[int]], rank: int = 8) -> int:
    """Values of both factors over the adapted matrices [d_out, d_in]: sum of rank x (d_out + d_in)."""
    return sum(rank * (shape[0] + shape[1]) for shape in shapes)


def query_value_shapes(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Shapes of the query and value projections among named weights, LoRA's usual targets.

    A fused projection (``c_attn``, ``query_key_value``) counts as one matrix, as the PEFT library adapts it.
    """
    pairs = zip(names, shapes, strict=True)
    return [shape for name, shape in pairs if len(shape) == 2 and _QUERY_VALUE.search(name)]
