"""Whatever bytes come: a typed error in one line or exactly what was sent, in memory that k bounds."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmask.channel import Received, Terms, advance, frame_for, receive, start_public, whole_frame
from fedmask.codecs import (
    CODECS,
    Malformed,
    WrongLength,
    bare_codec,
    encode_update,
    pack_indices,
    unpack_indices,
    unpack_update,
)
from fedmask.codecs.bits import varint
from fedmask.errors import CheckpointError, EnvelopeError
from fedmask.flower import Array, ArrayRecord, RecordError, record_bytes
from fedmask.layout import Layout, Segment
from fedmask.masks import Mask, Rule
from fedmask.masks.votes import pack_votes, unpack_top_scores, unpack_votes
from fedmask.space import ParameterSpace

DIGEST = "5f" * 32
LAYOUT = Layout((Segment("mask", 300), Segment("head/tweets", 33)))
STEADY = settings(deadline=None, derandomize=True, max_examples=150)


def good(codec: str) -> bytes:
    vector = np.random.default_rng(1).normal(0, 0.01, LAYOUT.size).astype(np.float32)
    return encode_update(vector, LAYOUT, codec=codec, digest=DIGEST, round=3)[0]


GOOD = {codec: good(codec) for codec in CODECS}


@st.composite
def damages(draw: st.DrawFn, codec: str) -> bytes:
    """An envelope after one to four cuts, insertions, overwritings or moves, sealed again or not."""
    data = bytearray(GOOD[codec])
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 12)))
        data[start:stop] = draw(
            st.binary(max_size=12)
            | st.sampled_from([b"\xff" * 8, b"\x00" * 8, struct.pack("<f", float("nan")), varint(2**62)])
            | st.just(bytes(data[:stop]))
        )
    if draw(st.booleans()) and len(data) > 9:
        data[5:9] = struct.pack("<I", zlib.crc32(bytes(data[9:])))
    return bytes(data)


@pytest.mark.parametrize("codec", CODECS)
@given(st.data())
@STEADY
def test_damaged_envelopes(codec: str, data: st.DataObject) -> None:
    bad = data.draw(damages(codec))
    try:
        back = unpack_update(bad, layout=LAYOUT, digest=DIGEST, round=3)
    except EnvelopeError as error:
        assert type(error) is not EnvelopeError and "\n" not in str(error)
    else:  # a sender can always send other finite values under a checksum of its own
        assert back.shape == (LAYOUT.size,) and np.all(np.abs(back) <= 1.01e4)
        if zlib.crc32(bad[9:]) == zlib.crc32(GOOD[codec][9:]):
            assert bad == GOOD[codec]


# What is claimed is not allocated -----------------------------------------------------------------------


def peak(call: Callable[[], object], error: type[Exception]) -> int:
    """Bytes allocated at most while ``call`` is refused."""
    call_once = pytest.raises(error)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with call_once:
            call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


# The down-link's frames ---------------------------------------------------------------------------------

TERMS = Terms(LAYOUT, DIGEST)


def frames() -> list[tuple[bytes, np.ndarray]]:
    """Whole vectors and changes in several codecs, with the vector that each leads to from version 0."""
    rng = np.random.default_rng(4)
    out = []
    for codec in ("fp32", "fp16", "int8", "topk:0.2"):
        public = start_public(LAYOUT.size)
        for _ in range(3):
            exact = public.vector + rng.normal(0, 0.01, LAYOUT.size).astype(np.float32)
            public = advance(public, exact, TERMS, bare_codec(codec))
        out.append((frame_for(public, 0, TERMS), public.vector))
        whole = whole_frame(public.vector, 3, TERMS, bare_codec(codec))
        out.append((whole, receive(whole, Received(0, np.zeros(0, np.float32)), 3, lambda _: TERMS).vector))
    return out


def test_fuzzed_frames_are_refused_or_lead_to_what_was_sent() -> None:
    rng = np.random.default_rng(6)
    held = Received(0, np.zeros(LAYOUT.size, np.float32))
    whole, refused = frames(), 0
    tracemalloc.start()
    try:
        for number in range(6_000):
            frame, meant = whole[number % len(whole)]
            data = bytearray(frame)
            for _ in range(int(rng.integers(1, 5))):
                at = int(rng.integers(len(data))) if rng.integers(2) else int(rng.integers(24))
                data[at : at + 1] = rng.bytes(int(rng.integers(0, 9)))
            if rng.integers(4) == 0:
                del data[int(rng.integers(len(data))) :]
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                found = receive(bytes(data), held, 3, lambda _: TERMS).vector
            except EnvelopeError as error:
                refused += 1
                assert "\n" not in str(error)
                found = meant
            assert tracemalloc.get_traced_memory()[1] - before < 64_000 + 4 * len(data)
            assert found.tobytes() == meant.tobytes()
    finally:
        tracemalloc.stop()
    assert refused > 5_900


# What clients say of a mask -----------------------------------------------------------------------------


def test_fuzzed_votes_and_scores_are_refused_or_are_k_indices() -> None:
    rng = np.random.default_rng(7)
    space = ParameterSpace(("w",), ((100, 100),), (0, 10_000), ((50, 60),), "cd" * 32)
    rule = Rule("gradient", 0.02)
    mask = Mask(np.sort(rng.choice(np.arange(60, 10_000), 200, replace=False)), space, rule)
    votes = pack_votes(mask)
    head = varint(len(votes)) + votes + struct.pack("<f", 2.5)
    sent = head + rng.uniform(0, 32768, 200).astype("<f2").tobytes()
    np.testing.assert_array_equal(unpack_top_scores(sent, space, rule)[0], mask.indices)
    for number in range(4_000):
        data = bytearray(sent if number % 2 else votes)
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(len(data))) if rng.integers(2) else int(rng.integers(8))
            data[at : at + 1] = rng.bytes(int(rng.integers(0, 9)))
        try:
            found = (
                unpack_top_scores(bytes(data), space, rule)[0]
                if number % 2
                else unpack_votes(bytes(data), space, rule)
            )
        except (EnvelopeError, CheckpointError) as error:
            assert "\n" not in str(error)
        else:
            assert found.size == 200 and np.all(np.diff(found) > 0)
            assert not np.any((found >= 50) & (found < 60)) and found[-1] < 10_000


SIZE = 300_000_000  # the linear weights of a model of 24 layers x 1024


@pytest.mark.parametrize(
    "claim",
    [
        b"\x00" + varint(SIZE),  # as many indices as there are entries
        b"\x00" + varint(2**62) + varint(1),
        b"\x00" + varint(1000) + varint(2**60),  # a divisor beyond the space
        b"\x00" + varint(1000) + varint(1) + b"\xff" * 500_000,  # more quotients than indices
        b"\x00" + varint(1000) + varint(1) + b"\x00" * 500_000,  # quotients that never end
        b"\x01" + b"\xff" * 500_000,  # a bitmap of another space
        b"\x02" + varint(0),  # the complement of nothing: everything
        b"\x03" + varint(2**40),  # sections without end
        b"\x03" + varint(1) + varint(SIZE) + varint(2) + b"\x02" + varint(0),
    ],
)
def test_what_indices_claim_is_not_allocated(claim: bytes) -> None:
    """k = 1000 indices were agreed: 8 kB. The bytes are counted, never unpacked."""
    assert peak(lambda: unpack_indices(claim, SIZE, 1000), EnvelopeError) < 150_000 + 1.2 * len(claim)


def test_a_bitmap_with_more_ones_than_agreed_is_counted_before_it_is_unpacked() -> None:
    size = 8_000_000
    claim = b"\x01" + b"\xff" * (size // 8)
    assert peak(lambda: unpack_indices(claim, size, 1000), WrongLength) < 2.5 * len(claim)


def test_ones_beyond_the_last_entry_are_no_indices() -> None:
    data = bytearray(pack_indices(np.arange(0, 20, 2), 20))
    assert data[0] == 1
    data[-1] |= 0x80
    with pytest.raises(WrongLength, match="at most 10 indices, found 11"):
        unpack_indices(bytes(data), 20, 10)
    with pytest.raises(Malformed):
        unpack_indices(b"\x00" + varint(2) + varint(1) + b"\x00", 20)


def npy(shape: tuple[int, ...], data: bytes, descr: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})
    return file.getvalue() + data


@pytest.mark.parametrize(
    "data",
    [
        npy((10**12,), b"abc"),
        npy((10**9,), b"abc"),
        npy((2,), b"abc"),
        npy((4,), b"abc"),
        npy((3, 1), b"abc"),
        npy((-1,), b""),
        npy((3,), b"abc" * 8, "<f8"),
        npy((3,), b"abc", "|O"),
        npy((3,), b"abc")[:-1],
        b"\x93NUMPY\x02\x00" + npy((3,), b"abc")[8:],
        b"\x93NUMPY\x01\x00\xff\xff{'descr': ",
        b"\x80\x04pickled",
        b"PK\x03\x04",
        b"",
    ],
)
def test_what_an_array_claims_is_not_allocated(data: bytes) -> None:
    record = ArrayRecord({"update": Array("uint8", (3,), "numpy.ndarray", data)})
    assert peak(lambda: record_bytes(record), RecordError) < 200_000


def test_fuzzed_arrays_are_refused_or_hold_the_bytes() -> None:
    rng = np.random.default_rng(3)
    whole = npy((40,), bytes(range(40)))
    for _ in range(2_000):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        if rng.integers(3) == 0:
            del data[int(rng.integers(len(data))) :]
        try:
            found = record_bytes(ArrayRecord({"update": Array("uint8", (40,), "numpy.ndarray", bytes(data))}))
        except RecordError as error:
            assert "\n" not in str(error)
        else:
            assert found == bytes(data[-40:])
