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

from fedmask.codecs import (
    CODECS,
    Malformed,
    WrongLength,
    encode_update,
    pack_indices,
    unpack_indices,
    unpack_update,
)
from fedmask.codecs.bits import varint
from fedmask.errors import EnvelopeError
from fedmask.flower import Array, ArrayRecord, RecordError, record_bytes
from fedmask.layout import Layout, Segment

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
