"""Random streams derived from (seed, round, client, purpose). Nothing here touches global state."""

from __future__ import annotations

import hashlib

import numpy as np


def _entropy(seed: int, round: int, client: int, purpose: str) -> list[int]:
    # Hashing the purpose keeps streams apart without a table of numbers that could collide when edited.
    word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return [seed, round + 1, client + 1, word]


def rng_for(seed: int, round: int, client: int, purpose: str) -> np.random.Generator:
    """A NumPy generator for one use: the same arguments give the same stream on every machine.

    ``round`` and ``client`` are -1 or more (-1: not tied to a round or client).
    """
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(_entropy(seed, round, client, purpose)))
    )


def seed_for(seed: int, round: int, client: int, purpose: str) -> int:
    """A 63-bit seed of the same derivation, for libraries that take a number (``torch.manual_seed``)."""
    return int(rng_for(seed, round, client, purpose).integers(0, 2**63 - 1))
