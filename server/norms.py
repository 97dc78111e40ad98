"""How large each reply's change is beside the round's others. It judges nobody: strategies do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FAR = 5.0
"""Changes so many times the median are named in the round's line."""


def norm(change: np.ndarray) -> float:
    """The Euclidean norm of ``change`` (float32 ``[n]``), summed in float64, with any number of threads."""
    return float(np.sqrt(np.einsum("i,i->", change, change, dtype=np.float64)))


def beside_median(norms: Mapping[int, float]) -> list[dict[str, Any]]:
    """Each client's norm, and the norm over the median of all: ``[{"client", "norm", "outlier"}]``.

    ``outlier`` is None where the median is zero.
    """
    median = float(np.median(list(norms.values()))) if norms else 0.0
    return [
        {"client": client, "norm": found, "outlier": found / median if median > 0 else None}
        for client, found in sorted(norms.items())
    ]


def far_out(rows: Sequence[Mapping[str, Any]]) -> str:
    """One phrase on the largest of a round's changes; empty unless it is ``FAR`` times the median."""
    known = [row for row in rows if row["outlier"] is not None]
    worst = max(known, key=lambda row: float(row["outlier"]), default=None)
    if worst is None or worst["outlier"] < FAR:
        return ""
    return f"client {worst['client']}'s change is {worst['outlier']:.0f} times as large as the median"
