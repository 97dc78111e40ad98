"""The range in which a run's vectors stay, whatever the clients send.

An envelope carries values up to ``MAX_ABS``. A client may send changes as large in every round, so a mean
could grow out of what the next message can carry, or a difference of two vectors could: one client would
end the run. No sound change comes near, as weights are of the order of 1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmask.codecs import MAX_ABS
from server.strategy import Combined

LARGEST = MAX_ABS / 4  # two vectors within it, one of them rounded by a codec, differ by less than MAX_ABS


def within_bounds(combined: Combined) -> Combined:
    """``combined`` with its vectors (float32 ``[n]``) cut to +-``LARGEST``, and a note where that cut any."""
    vectors = {"": combined.shared, **combined.heads}
    if all(float(np.abs(vector).max(initial=0.0)) <= LARGEST for vector in vectors.values()):
        return combined
    cut = {name: np.clip(vector, -LARGEST, LARGEST) for name, vector in vectors.items()}
    note = f"values beyond {LARGEST:g} were cut: training diverged, or a client sends what it should not"
    shared = cut.pop("")
    return replace(combined, shared=shared, heads=cut, note="; ".join(filter(None, [combined.note, note])))
