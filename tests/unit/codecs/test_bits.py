import numpy as np
import pytest

from fedmask.codecs.bits import Reader, fixed_bytes, pack_fixed, unpack_fixed, varint
from fedmask.codecs.errors import Malformed, Truncated, WrongLength


@pytest.mark.parametrize(
    ("value", "expected"), [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")]
)
def test_varint_is_leb128(value: int, expected: bytes) -> None:
    assert varint(value) == expected
    assert Reader(expected).varint("a number") == value


def test_varint_takes_63_bits_and_no_more() -> None:
    assert Reader(varint(2**63 - 1)).varint("a number") == 2**63 - 1
    for value in (-1, 2**63):
        with pytest.raises(Malformed, match=str(value)):
            varint(value)
    with pytest.raises(Malformed, match="found more"):
        Reader(b"\xff" * 12).varint("a number")


def test_reader_stops_at_the_end() -> None:
    reader = Reader(b"abc")
    assert bytes(reader.take(2, "two")) == b"ab"
    with pytest.raises(Truncated, match="two more: expected 2 more bytes, found 1"):
        reader.take(2, "two more")
    with pytest.raises(WrongLength, match="found 1"):
        reader.end("message")


@pytest.mark.parametrize("width", [0, 1, 2, 3, 4, 7, 8, 11, 13, 16, 29, 31, 32, 40, 63])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_fixed_width_round_trip(width: int, count: int) -> None:
    values = np.random.default_rng(width).integers(0, 2**width, count, dtype=np.int64)
    data = pack_fixed(values, width)
    assert len(data) == fixed_bytes(count, width)
    assert len(data) <= count * width / 8 + 6  # at most one part-filled byte for each power of two
    np.testing.assert_array_equal(unpack_fixed(data, count, width), values)


def test_fixed_width_refuses_another_length() -> None:
    with pytest.raises(WrongLength, match="expected 2 bytes for 4 x 4 bits, found 3"):
        unpack_fixed(b"abc", 4, 4)
