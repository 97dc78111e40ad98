"""One mask from many clients: what each sends, and how the server agrees on the k entries.

Two ways. Votes are the indices of a client's own k best entries: the mask holds those with most votes.
Top scores are the same with each entry's score in half precision: the mask holds the largest sums. Both
are plain functions of bytes. Clients' messages come by client number, so their order of arrival and the
number of workers cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fedmask.codecs.bits import Reader, varint
from fedmask.codecs.errors import NotFinite
from fedmask.codecs.indices import pack_indices, unpack_indices
from fedmask.masks.base import Mask, Rule, mask_from_indices, mask_size
from fedmask.masks.scores import Scores
from fedmask.masks.select import shares
from fedmask.rng import rng_for
from fedmask.space import ParameterSpace
from fedmask.unions import union

_TOP = 32768.0
"""The largest score of a message as float16: leaves twelve decimal orders below it."""

Chosen = tuple[np.ndarray, np.ndarray]
"""Sorted flat indices (int64 ``[n]``) and a number (float64 ``[n]``) for each."""


def pack_votes(mask: Mask) -> bytes:
    """A client's own k entries, through the index codec (about 9.1 bits an entry at 0.5 %)."""
    return pack_indices(mask.indices, mask.space.size, mask.space.offsets)


def unpack_votes(data: bytes | memoryview, space: ParameterSpace, rule: Rule) -> np.ndarray:
    """The inverse: sorted int64 ``[k]``. EnvelopeError or CheckpointError for bytes that are no such mask."""
    k = mask_size(rule.density, space.eligible_size)
    return mask_from_indices(unpack_indices(data, space.size, k), space, rule).indices


def pack_top_scores(scores: Scores, rule: Rule) -> bytes:
    """A client's own k entries with their scores: the votes' bytes, then float16 scores.

    Scores are sent relative to their largest, which goes before them as a float32: squared gradients
    would vanish in half precision. Relative error at most 2^-11 down to 2e-9 of the largest.
    """
    mask = scores.mask(rule)
    indices, values = pack_votes(mask), scores.at(mask.indices)
    largest = np.float32(values.max())
    # In float64: squared gradients may be so small that the quotient has no float32.
    relative = values.astype(np.float64) * (float(_TOP) / float(largest)) if largest > 0 else values
    head: bytes = varint(len(indices)) + indices + largest.astype("<f4").tobytes()
    sent: bytes = relative.astype("<f2").tobytes()
    return head + sent


def unpack_top_scores(data: bytes, space: ParameterSpace, rule: Rule) -> Chosen:
    """The inverse, scores as float64. EnvelopeError or CheckpointError for bytes that are no such thing."""
    reader = Reader(data)
    indices = unpack_votes(reader.take(reader.varint("bytes of indices"), "indices"), space, rule)
    largest = float(np.frombuffer(reader.take(4, "largest score"), "<f4")[0])
    values = np.frombuffer(reader.take(2 * indices.size, "scores"), "<f2").astype(np.float64)
    reader.end("scores")
    if not (np.isfinite(largest) and largest >= 0 and np.all(values >= 0) and np.all(np.isfinite(values))):
        raise NotFinite("scores: expected finite numbers, none below zero; the client's loss has diverged")
    return indices, values * (largest / _TOP)


def agree_by_votes(messages: Mapping[int, bytes], space: ParameterSpace, rule: Rule) -> Mask:
    """The k entries with most votes (``messages``: client -> ``pack_votes``).

    Many entries have one vote. Which of those equals get in is drawn by ``rule.seed``: by rank they would
    all lie in the first layers.
    """
    counted = _sum(messages, lambda data: _ones(unpack_votes(data, space, rule)))
    order = rng_for(rule.seed, -1, -1, "votes").permutation(counted[0].size)
    return _best(*counted, order, space, rule)


def agree_by_scores(messages: Mapping[int, bytes], space: ParameterSpace, rule: Rule) -> Mask:
    """The k entries of largest summed score (``messages``: client -> ``pack_top_scores``).

    An entry counts zero for a client that did not name it. Sums are taken in the clients' order, in
    double precision; ties by tensor order, then flat index.
    """
    summed = _sum(messages, lambda data: unpack_top_scores(data, space, rule))
    return _best(*summed, np.arange(summed[0].size), space, rule)


def _ones(indices: np.ndarray) -> Chosen:
    return indices, np.ones(indices.size)


def _sum(messages: Mapping[int, bytes], read: Callable[[bytes], Chosen]) -> Chosen:
    """The union of all clients' entries and the sum of their numbers, client by client in rising order."""
    known, totals = np.empty(0, np.int64), np.empty(0)
    for client in sorted(messages):
        indices, values = read(messages[client])
        merged = union(known, indices)
        sums = np.zeros(merged.size)
        sums[np.searchsorted(merged, known)] = totals
        sums[np.searchsorted(merged, indices)] += values
        known, totals = merged, sums
    return known, totals


def _best(
    indices: np.ndarray, totals: np.ndarray, ties: np.ndarray, space: ParameterSpace, rule: Rule
) -> Mask:
    k = mask_size(rule.density, space.eligible_size)
    groups, counts = [np.arange(indices.size)], [k]
    if rule.per_tensor:
        cuts = np.searchsorted(indices, np.asarray(space.offsets[1:-1], dtype=np.int64))
        groups, counts = np.split(groups[0], cuts), shares(k, space.eligible_sizes)
    parts = [
        indices[group[np.lexsort((ties[group], -totals[group]))[:count]]]
        for group, count in zip(groups, counts, strict=True)
    ]
    return mask_from_indices(np.sort(np.concatenate(parts)), space, rule)
