"""A sorted set of indices in [0, size) <-> bytes, close to the entropy bound log2 C(size, k).

Golomb coding of the gaps between indices (S. W. Golomb, "Run-length encodings", IEEE Trans. Inf. Theory
1966; remainders in truncated binary). A random set has geometric gaps, for which it is the optimal prefix
code: about 0.03 bits an index above the bound, where a Rice code (divisor a power of two) can lose 0.12.
What differs from the textbook: the code words are not strung together but split into three streams, so
that numpy reads each of them at once:

    main    the leading floor(log2 m) bits of each remainder, fixed width
    extra   one bit more for those remainders whose truncated binary word is the longer one
    unary   the quotients: as many zeros as the quotient says, then a one

A dense set is sent as a bitmap, a very dense one as the code of its complement; and where boundaries (the
offsets of the tensors) are given and each section with a divisor of its own comes out smaller, the sections
are coded one by one. The smallest wins. The reader needs no boundaries: they are in the bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmask.codecs.bits import (
    Reader,
    fixed_bytes,
    pack_fixed,
    pack_small,
    unpack_fixed,
    unpack_small,
    varint,
)
from fedmask.codecs.errors import Malformed, WrongLength

Indices = NDArray[np.int64]

_GOLOMB, _BITMAP, _COMPLEMENT, _SECTIONS = 0, 1, 2, 3
_MAX_SIZE = 1 << 56  # keeps every intermediate sum within an int64
_MAX_SECTIONS = 1 << 16
_SAMPLE = 1 << 16  # gaps looked at while searching for the divisor


def index_entropy_bytes(k: int, size: int) -> float:
    """The bound: log2 C(size, k) / 8 bytes, what a set of k of ``size`` indices needs when all are alike."""
    if not 0 <= k <= size:
        raise Malformed(f"expected 0 <= k <= size, found k {k} and size {size}")
    few = min(k, size - k)
    if few <= 1 << 16:  # exact to rounding, where the difference of two huge lgamma values would not be
        steps = np.arange(few, dtype=np.float64)
        return float(np.log2((size - steps) / (few - steps)).sum()) / 8
    nats = math.lgamma(size + 1) - math.lgamma(few + 1) - math.lgamma(size - few + 1)
    return nats / math.log(2) / 8


def pack_indices(indices: NDArray[np.integer], size: int, boundaries: Sequence[int] | None = None) -> bytes:
    """Sorted unique indices (int[k], each in [0, size)) -> bytes, the smallest of the ways above.

    ``boundaries`` are the starts (or starts and end) of sections with densities of their own, sorted, such as
    the offsets of the tensors of a space. Raises ``Malformed`` for indices that are unsorted, repeated or
    outside.
    """
    values = _checked(indices, size)
    best = _pack_one(values, size)
    if boundaries is not None:
        edges = _edges(boundaries, size)
        if 2 < len(edges) <= _MAX_SECTIONS:
            best = min(best, _pack_sections(values, edges), key=len)
    return best


def unpack_indices(data: bytes | memoryview, size: int, count: int | None = None) -> Indices:
    """The inverse of ``pack_indices`` for the same ``size``: sorted unique int64[k].

    ``count``, when given, is the k that was agreed on. Whatever the bytes claim is compared with ``size``,
    ``count`` and the number of bytes at hand before anything is allocated. Raises ``Truncated``,
    ``WrongLength`` or ``Malformed``.
    """
    _check_size(size)
    reader = Reader(data)
    kind = reader.take(1, "packed indices")[0]
    most = size if count is None else count
    if kind == _SECTIONS:
        indices = _unpack_sections(reader, size, most)
    else:
        indices = _unpack_one(kind, reader, size, most)
    if count is not None and indices.size != count:
        raise WrongLength(
            f"packed indices: expected {count} indices, found {indices.size}; use the same mask on both sides"
        )
    return indices


def _checked(indices: NDArray[np.integer], size: int) -> Indices:
    _check_size(size)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise Malformed(f"expected integer indices [k], found {indices.dtype} of shape {indices.shape}")
    values = indices.astype(np.int64, copy=False)
    if values.size and (values[0] < 0 or values[-1] >= size or bool(np.any(values[1:] <= values[:-1]))):
        raise Malformed(f"expected sorted unique indices in [0, {size}); np.unique sorts them")
    return values


def _check_size(size: int) -> None:
    if not 0 <= size <= _MAX_SIZE:
        raise Malformed(f"expected a size in [0, 2^56], found {size}")


def _edges(boundaries: Sequence[int], size: int) -> list[int]:
    edges = sorted({0, size, *(int(b) for b in boundaries)})
    if edges[0] < 0 or edges[-1] > size:
        raise Malformed(f"expected boundaries in [0, {size}], found {edges[0]} to {edges[-1]}")
    return edges


# One section ------------------------------------------------------------------------------------------


def _pack_one(values: Indices, size: int) -> bytes:
    if 2 * values.size > size:
        mask = np.ones(size, bool)
        mask[values] = False
        best = bytes([_COMPLEMENT]) + _golomb(np.flatnonzero(mask), size)
    else:
        best = bytes([_GOLOMB]) + _golomb(values, size)
    if 1 + -(-size // 8) < len(best):
        bitmap = np.zeros(size, np.uint8)
        bitmap[values] = 1
        best = bytes([_BITMAP]) + pack_small(bitmap, 1).tobytes()
    return best


def _unpack_one(kind: int, reader: Reader, size: int, most: int) -> Indices:
    if kind == _BITMAP:
        data = np.frombuffer(reader.take(-(-size // 8), "bitmap"), np.uint8)
        reader.end("bitmap")
        if (found := _ones(data)) > most:
            raise WrongLength(f"packed indices: expected at most {most} indices, found {found}")
        return np.flatnonzero(unpack_small(data, size, 1).view(bool))
    if kind not in (_GOLOMB, _COMPLEMENT):
        raise Malformed(f"packed indices: expected a known kind (0 to 3), found {kind}; update fedmask here")
    coded = reader.varint("count of indices")
    k = coded if kind == _GOLOMB else size - coded
    if coded > size or k > most:
        raise WrongLength(f"packed indices: expected at most {min(size, most)} indices, found {k}")
    indices = _read_golomb(reader, coded, size)
    if kind == _GOLOMB:
        return indices
    mask = np.ones(size, bool)
    mask[indices] = False
    return np.flatnonzero(mask)


def _golomb(values: Indices, size: int) -> bytes:
    k = values.size
    if k == 0:
        return varint(0)
    gaps = np.diff(values, prepend=np.int64(-1)) - 1
    divisor = _best_divisor(gaps, size)
    width = divisor.bit_length() - 1
    short = (2 << width) - divisor  # remainders below have the shorter word
    quotients, remainders = np.divmod(gaps, divisor)
    words = np.where(remainders < short, remainders, (remainders + short) >> 1)
    extra = (remainders + short)[remainders >= short] & 1
    ends = np.cumsum(quotients + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    streams = (
        pack_fixed(words, width) + pack_fixed(extra, 1) + np.packbits(unary, bitorder="little").tobytes()
    )
    return varint(k) + varint(divisor) + streams


def _best_divisor(gaps: Indices, size: int) -> int:
    """The divisor m that makes these gaps shortest, starting from the best for geometric gaps."""
    sample = gaps[:: -(-gaps.size // _SAMPLE)]

    def bits(divisor: int) -> int:
        width = divisor.bit_length() - 1
        quotients, remainders = np.divmod(sample, divisor)
        longer = int(np.count_nonzero(remainders >= (2 << width) - divisor))
        return sample.size * (width + 1) + int(quotients.sum()) + longer

    density = min(gaps.size / size, 0.999)
    best = max(1, math.ceil(-math.log(2 - density) / math.log1p(-density)))
    cost = bits(best)
    for factor in (0.7, 1.4):  # gaps that are not geometric (clusters) have their optimum elsewhere
        while True:
            other = math.ceil(best * factor) if factor > 1 else math.floor(best * factor)
            other = min(max(1, other), size)
            if other == best or (other_cost := bits(other)) >= cost:
                break
            best, cost = other, other_cost
    # The sample may miss a huge gap; its quotient is paid in unary, so never let that outweigh the rest.
    return max(best, int(gaps.max()) // (64 * gaps.size) + 1)


def _read_golomb(reader: Reader, k: int, size: int) -> Indices:
    if k == 0:
        reader.end("packed indices")
        return np.empty(0, np.int64)
    divisor = reader.varint("divisor")
    # An index takes at least one bit, so the bytes at hand bound k; the product keeps sums within an int64.
    if not 1 <= divisor <= size or k > 8 * reader.left or k * divisor >= 1 << 62:
        raise Malformed(f"packed indices: size {size} does not fit divisor {divisor} and count {k}")
    width = divisor.bit_length() - 1
    short = (2 << width) - divisor
    gaps = unpack_fixed(reader.take(fixed_bytes(k, width), "remainders"), k, width)
    longer = np.flatnonzero(gaps >= short)
    extra = unpack_fixed(reader.take(fixed_bytes(longer.size, 1), "extra bits"), longer.size, 1)
    gaps[longer] = 2 * gaps[longer] - short + extra
    unary = np.frombuffer(reader.take(reader.left, "quotients"), np.uint8)
    # Counted before they are unpacked: what is allocated must follow k, not the bytes that somebody sent.
    found = _ones(unary) if unary.size <= (k + size // divisor) // 8 + 1 else -1
    if found != k or unary[-1] == 0:
        raise Malformed(f"packed indices: expected {k} quotients, found {unary.size} bytes with {found} ends")
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little").view(bool))
    if (int(ends[-1]) + 1 - k) * divisor > size:
        raise Malformed(f"packed indices: expected indices below {size}, found larger ones")
    # index_i = i + sum of the gaps up to i, and ends_i = i + sum of the quotients up to i
    indices = np.cumsum(gaps, out=gaps)
    if divisor > 1:
        ends *= divisor
        indices += ends
        indices -= np.arange(0, k * (divisor - 1), divisor - 1)
    else:
        indices += ends
    if indices[-1] >= size:
        raise Malformed(f"packed indices: expected indices below {size}, found {int(indices[-1])}")
    return indices


def _ones(data: NDArray[np.uint8]) -> int:
    """Set bits in uint8[n]."""
    return int(np.bitwise_count(data).sum())


# Sections ---------------------------------------------------------------------------------------------


def _pack_sections(values: Indices, edges: list[int]) -> bytes:
    cuts = np.searchsorted(values, edges)
    table = [varint(len(edges) - 1)]
    bodies = []
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        body = _pack_one(values[cuts[i] : cuts[i + 1]] - start, end - start)
        table += [varint(end - start), varint(len(body))]
        bodies.append(body)
    return bytes([_SECTIONS]) + b"".join(table) + b"".join(bodies)


def _unpack_sections(reader: Reader, size: int, most: int) -> Indices:
    sections = reader.varint("count of sections")
    if sections > _MAX_SECTIONS:
        raise Malformed(f"packed indices: expected at most {_MAX_SECTIONS} sections, found {sections}")
    table = [(reader.varint("section size"), reader.varint("section bytes")) for _ in range(sections)]
    if (total := sum(width for width, _ in table)) != size:
        raise WrongLength(f"packed indices: expected sections of {size} in all, found {total}")
    if (total := sum(length for _, length in table)) != reader.left:
        raise WrongLength(f"packed indices: expected {total} bytes in sections, found {reader.left}")
    parts = []
    start = 0
    for width, length in table:
        section = Reader(reader.take(length, "section"))
        part = _unpack_one(section.take(1, "section")[0], section, width, most)
        most -= part.size
        part += start
        parts.append(part)
        start += width
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
