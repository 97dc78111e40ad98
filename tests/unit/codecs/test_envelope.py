import struct
import zlib

import numpy as np
import pytest

from fedmask.codecs import (
    AbsurdScale,
    BadChecksum,
    Malformed,
    NotAnEnvelope,
    NotFinite,
    OutOfRange,
    StaleRound,
    Truncated,
    UnknownCodec,
    UnknownVersion,
    WrongDigest,
    WrongLayout,
    WrongLength,
    encode_update,
    pack_update,
    payload_bytes,
    read_header,
    unpack_update,
)
from fedmask.layout import Layout, Segment

DIGEST = "ab" * 32
LAYOUT = Layout((Segment("mask", 4), Segment("bias", 3), Segment("head/tweets", 2)))
VECTOR = np.array([1, -2, 3, 0, 0.5, -0.25, 7, 8, -9], np.float32)


def packed(
    codec: str = "fp32", vector: np.ndarray = VECTOR, layout: Layout = LAYOUT, round: int = 5
) -> bytes:
    return pack_update(vector, layout, codec=codec, digest=DIGEST, round=round)


def opened(data: bytes, layout: Layout = LAYOUT, digest: str = DIGEST, round: int = 5) -> np.ndarray:
    return unpack_update(data, layout=layout, digest=digest, round=round)


def sealed(data: bytes) -> bytes:
    """The same bytes with a checksum that fits: what a sender with other ideas would make."""
    return data[:5] + struct.pack("<I", zlib.crc32(data[9:])) + data[9:]


def test_golden_bytes() -> None:
    layout = Layout((Segment("mask", 1),))
    body = struct.pack("<i", -1) + bytes.fromhex(DIGEST) + b"\x04fp32" + b"\x01\x00" + b"\x04mask"
    body += struct.pack("<Q", 1)
    body = struct.pack("<HQ", len(body), 4) + body + b"\x00\x00\x80\x3f"
    expected = b"FMSK\x01" + struct.pack("<I", zlib.crc32(body)) + body
    assert packed(vector=np.ones(1, np.float32), layout=layout, round=-1) == expected


@pytest.mark.parametrize(("codec", "width"), [("fp32", 4), ("fp16", 2)])
def test_round_trip_and_sizes(codec: str, width: int) -> None:
    data = packed(codec)
    back = opened(data)
    assert back.dtype == np.float32 and back.flags.writeable
    np.testing.assert_array_equal(back, VECTOR)  # each of these has an exact fp16
    assert payload_bytes(data) == 9 * width
    assert len(data) - payload_bytes(data) < 200


def test_a_header_can_be_read_alone() -> None:
    header = read_header(packed("fp16"))
    assert (header.codec, header.round, header.digest) == ("fp16", 5, DIGEST)
    assert header.layout == LAYOUT and header.payload_bytes == 18


def test_an_empty_layout_travels() -> None:
    data = packed(vector=np.zeros(0, np.float32), layout=Layout(()))
    assert opened(data, Layout(())).shape == (0,) and payload_bytes(data) == 0


def test_refusals_name_what_was_expected_and_found() -> None:
    data = packed()
    with pytest.raises(NotAnEnvelope, match=r"FMSK.*XMSK"):
        opened(b"X" + data[1:])
    with pytest.raises(UnknownVersion, match="version 1, found 2"):
        opened(data[:4] + b"\x02" + data[5:])
    with pytest.raises(Truncated, match=rf"expected {len(data)} bytes, found {len(data) - 1}"):
        opened(data[:-1])
    with pytest.raises(WrongLength, match=rf"expected {len(data)} bytes, found {len(data) + 1}"):
        opened(data + b"\x00")
    with pytest.raises(BadChecksum, match="checksum"):
        opened(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(WrongDigest, match=r"cdcd.*abab"):
        opened(data, digest="cd" * 32)
    with pytest.raises(StaleRound, match="round 6, found one of round 5"):
        opened(data, round=6)
    with pytest.raises(WrongLayout, match=r"mask:9, found mask:4\+bias:3\+head/tweets:2"):
        opened(data, layout=Layout((Segment("mask", 9),)))
    for message in (b"", b"FMSK", data[:18]):
        with pytest.raises(Truncated, match=f"found {len(message)}"):
            opened(message)


def test_a_layout_of_other_names_or_order_is_another_layout() -> None:
    data = packed()
    for segments in (
        reversed(LAYOUT.segments),
        [Segment("mask", 4), Segment("bias", 3), Segment("head/bbc", 2)],
    ):
        with pytest.raises(WrongLayout):
            opened(data, layout=Layout(tuple(segments)))


def test_a_codec_that_nobody_registered() -> None:
    with pytest.raises(UnknownCodec, match="'fp23'; the nearest is 'fp32'"):
        packed("fp23")
    with pytest.raises(UnknownCodec, match="'fp99'"):
        opened(sealed(packed().replace(b"fp32", b"fp99")))
    with pytest.raises(UnknownCodec, match="takes no option"):
        packed("fp32:3")


def test_a_payload_of_another_length() -> None:
    data = packed("fp32").replace(b"fp32", b"fp16")
    with pytest.raises(WrongLength, match="18 bytes for 9 values, found 36"):
        opened(sealed(data))


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"\x00\x00\xc0\x7f", NotFinite),
        (b"\x00\x00\x80\x7f", NotFinite),
        (b"\x00\x00\x80\xff", NotFinite),
        (struct.pack("<f", 3e38), AbsurdScale),
        (struct.pack("<f", -10101), AbsurdScale),
    ],
)
def test_values_that_no_training_makes(raw: bytes, error: type[Exception]) -> None:
    data = packed()
    bad = sealed(data[:-8] + raw + data[-4:])
    with pytest.raises(error, match=r"head/tweets\[0\]"):
        opened(bad)
    vector = VECTOR.copy()
    vector[7] = np.frombuffer(raw, "<f4")[0]
    with pytest.raises(error, match=r"head/tweets\[0\]"):
        packed(vector=vector)


def test_the_limit_on_scale_is_an_option() -> None:
    vector = VECTOR * 10_000
    data = pack_update(vector, LAYOUT, codec="fp32", digest=DIGEST, round=0, max_abs=1e6)
    back = unpack_update(data, layout=LAYOUT, digest=DIGEST, round=0, max_abs=1e6)
    np.testing.assert_array_equal(back, vector)


def test_a_codec_that_needs_memory_is_not_packed_without() -> None:
    with pytest.raises(Malformed, match="encode_update"):
        packed("sign")
    data, state = encode_update(VECTOR, LAYOUT, codec="int4+ef", digest=DIGEST, round=5)
    assert state is not None and read_header(data).codec == "int4"
    np.testing.assert_array_equal(state, VECTOR - opened(data))
    later, _ = encode_update(VECTOR, LAYOUT, codec="int4+ef", digest=DIGEST, round=6, state=state)
    np.testing.assert_allclose(opened(data) + opened(later, round=6), 2 * VECTOR, atol=1.5)


def test_fp16_refuses_what_it_cannot_carry() -> None:
    with pytest.raises(OutOfRange, match=r"65504.*90000.*fp32"):
        pack_update(VECTOR * 10_000, LAYOUT, codec="fp16", digest=DIGEST, round=0, max_abs=1e6)


@pytest.mark.parametrize("vector", [VECTOR[:8], VECTOR.astype(np.float64), VECTOR.reshape(3, 3)])
def test_only_the_layouts_own_vector_is_packed(vector: np.ndarray) -> None:
    with pytest.raises(WrongLength, match=r"expected float32 \[9\]"):
        packed(vector=vector)


@pytest.mark.parametrize("digest", ["", "abc", "zz" * 32, "ab" * 31])
def test_a_digest_is_64_hex_digits(digest: str) -> None:
    with pytest.raises(Malformed, match="digest"):
        pack_update(VECTOR, LAYOUT, codec="fp32", digest=digest, round=0)


def test_headers_that_cannot_be_written() -> None:
    with pytest.raises(Malformed, match="round=3000000000"):
        packed(round=3_000_000_000)
    with pytest.raises(Malformed, match="cannot write"):
        packed(layout=Layout((Segment("x" * 256, 9),)))
    with pytest.raises(Malformed, match="64 KiB"):
        packed(layout=Layout((Segment("mask", 9), *(Segment("x" * 200, 0) for _ in range(400)))))


def test_a_name_that_is_no_text() -> None:
    with pytest.raises(Malformed, match="UTF-8"):
        opened(sealed(packed().replace(b"mask", b"\xff\xfe\xfd\xfc")))
