"""Masks that move: successive bands of a data-free rule, one a round.

A shared mask is a recipe and costs no bytes, so it may be another one in each round. Band 0 is the rule's
own mask; band b of a magnitude rule has the entries ranked b k to (b + 1) k, band b of a random rule is a
set of its own draw. ``rotate`` takes the next band each round. ``anneal`` moves ever more rarely: rounds 1,
2-3, 4-7, 8-15, ..., so that early rounds explore and late ones settle. Both send k entries a round, and
neither depends on how many rounds there will be. An idea of ours; no source.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from fedmask.errors import ConfigError
from fedmask.masks.base import Mask, Rule, mask_size
from fedmask.masks.random import draw
from fedmask.masks.select import Chunks, group_chunks, shares, smallest
from fedmask.recent import Recent
from fedmask.space import ParameterSpace, backbone_parameters
from fedmask.stored import stored_reader
from fedmask.unions import union

SCHEDULES = ("fixed", "rotate", "anneal")
BANDED = ("magnitude", "largest", "random")
"""The rules that have bands."""
_KEPT_BYTES = 16_000_000


def band_of(schedule: str, round: int, bands: int) -> int:
    """The band of a round (1 or more), of ``bands`` that there are; after the last one comes the first."""
    if schedule == "rotate":
        return (round - 1) % bands
    return (round.bit_length() - 1) % bands if schedule == "anneal" else 0


class Bands:
    """The bands of ``rule`` over ``space``, for ``model``'s stored values.

    Ranking goes once through the values for many bands (8, then 16, 32, ...) and keeps their order: 8 bytes
    an entry ranked so far. Raises ConfigError for a rule that has no bands.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, rule: Rule) -> None:
        if rule.name not in BANDED:
            raise ConfigError(
                f"mask_schedule: rule {rule.name!r} has no bands; use method 'pafi', 'largest' or 'random',"
                " or mask_schedule 'fixed'"
            )
        self.space, self.rule = space, rule
        self._read = stored_reader(model, backbone_parameters(model))
        self._k = mask_size(rule.density, space.eligible_size)
        tensors = range(len(space.names))
        split = rule.per_tensor and rule.name != "random"
        groups = [[i] for i in tensors] if split else [list(tensors)]
        counts = shares(self._k, space.eligible_sizes) if split else [self._k]
        self._groups = [(group, count) for group, count in zip(groups, counts, strict=True) if count]
        self._ranked: list[np.ndarray] = []
        self._ready = 0

    @property
    def count(self) -> int:
        """How many whole bands there are, at least 1."""
        sizes = self.space.eligible_sizes
        return max(1, min(sum(sizes[i] for i in group) // count for group, count in self._groups))

    def mask(self, band: int) -> Mask:
        """Band ``band`` (below ``count``) as a mask of the rule's size."""
        if self.rule.name == "random":
            indices = draw(self.space, self._k, self.rule.seed, band)
        else:
            self._rank(band + 1)
            parts = [
                order[band * count : (band + 1) * count]
                for order, (_, count) in zip(self._ranked, self._groups, strict=True)
            ]
            indices = np.sort(np.concatenate(parts))
        return Mask(indices, self.space, self.rule)

    def _rank(self, bands: int) -> None:
        if bands <= self._ready:
            return
        self._ready = min(self.count, max(8, 2 * self._ready, bands))
        largest = self.rule.name == "largest"
        self._ranked = [
            ranked(group_chunks(self.space, self._read, group, largest), self._ready * count)
            for group, count in self._groups
        ]


class Schedule:
    """The mask of each round.

    ``schedule``: ``fixed``, ``rotate`` or ``anneal``; ``bands``: how many there are before the first one
    comes again, None for all. The masks used last are kept.
    """

    def __init__(
        self, model: nn.Module, space: ParameterSpace, rule: Rule, schedule: str, bands: int | None
    ) -> None:
        self._bands = Bands(model, space, rule)
        self.schedule, self.count = schedule, min(bands or self._bands.count, self._bands.count)
        self._kept: Recent[int, Mask] = Recent(_KEPT_BYTES, lambda mask: mask.indices.nbytes)

    def mask(self, round: int) -> Mask:
        """The mask of a round (1 or more)."""
        band = band_of(self.schedule, round, self.count)
        return self._kept.get(band, lambda: self._bands.mask(band))

    def moved(self, after: int, before: int) -> np.ndarray:
        """All entries that trained in the rounds ``after + 1`` to ``before - 1``: int64, sorted."""
        bands = {band_of(self.schedule, round, self.count): round for round in range(after + 1, before)}
        return union(*(self.mask(bands[band]).indices for band in sorted(bands)))


def ranked(chunks: Chunks, count: int) -> np.ndarray:
    """Flat indices (int64 ``[count]``) of the smallest keys in rising order of key, then of index."""
    found = smallest(chunks, count)
    keys = np.concatenate(list(_keys_at(chunks, found)))
    return found[np.argsort(keys, kind="stable")]


def _keys_at(chunks: Chunks, indices: np.ndarray) -> Iterator[np.ndarray]:
    for start, keys in chunks():
        low, high = np.searchsorted(indices, [start, start + keys.size])
        yield keys[indices[low:high] - start]
