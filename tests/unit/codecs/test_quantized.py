import numpy as np
import pytest

from fedmask.codecs import Malformed, UnknownCodec, WrongLength, codec_for
from fedmask.codecs.plain import from_bf16, to_bf16

CODES = {"int8": 127.0, "int4": 7.0, "int2": 1.5}  # half the range of the codes


def normal(count: int, scale: float = 1e-3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, count).astype(np.float32)


def through(spec: str, vector: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
    codec = codec_for(spec)
    data, state = codec.encode(vector, None, generator)
    assert state is None
    return codec.decode(memoryview(data), vector.size)


def test_golden_int4() -> None:
    # One block: peak 7 makes the scale exactly 1, so values are codes less 7; two codes a byte, low first.
    vector = np.array([7, -7, 0, 1, -3, 0, 0, 2, 5], np.float32)
    data, _ = codec_for("int4:16").encode(vector, None, None)
    assert data == bytes([16, 0, 0x80, 0x3F, 0x0E, 0x87, 0x74, 0x97, 0x0C])
    np.testing.assert_array_equal(codec_for("int4").decode(memoryview(data), 9), vector)


def test_golden_int2() -> None:
    vector = np.array([3, 1, -1, -3, 2.9, 0.1, -0.1, -1.9], np.float32)  # levels -3, -1, 1, 3
    data, _ = codec_for("int2:8").encode(vector, None, None)
    assert data == bytes([8, 0, 0x00, 0x40, 0b00_01_10_11, 0b01_01_10_11])
    assert codec_for("int2").decode(memoryview(data), 8).tolist() == [3, 1, -1, -3, 3, 1, -1, -1]


@pytest.mark.parametrize(
    ("spec", "most"),
    [("fp16", 2.01), ("bf16", 2.01), ("int8", 1.02), ("int4", 0.53), ("int2", 0.27), ("sign", 0.14)],
)
def test_bytes_an_entry(spec: str, most: float) -> None:
    data, _ = codec_for(spec).encode(normal(50_000), None, None)
    assert len(data) <= most * 50_000


@pytest.mark.parametrize("spec", CODES)
@pytest.mark.parametrize("count", [0, 1, 3, 255, 256, 257, 70_000])
def test_rounding_to_nearest_errs_by_half_a_step(spec: str, count: int) -> None:
    vector = normal(count)
    back = through(spec, vector)
    assert back.shape == (count,) and back.dtype == np.float32
    for start in range(0, count, 256):
        block, out = vector[start : start + 256], back[start : start + 256]
        step = np.abs(block).max() / CODES[spec] * 1.01  # the scale is rounded up to a bf16
        assert np.all(np.abs(out - block) <= step / 2)


@pytest.mark.parametrize("spec", CODES)
def test_stochastic_rounding_is_unbiased(spec: str) -> None:
    vector = normal(256, 1.0)
    step = float(np.abs(vector).max()) / CODES[spec] * 1.01
    generator = np.random.default_rng(4)
    draws = np.stack([through(spec, vector, generator) for _ in range(4000)]).astype(np.float64)
    assert np.all(np.abs(draws - vector) <= step)
    # The spread of a mean of 4,000 draws is at most step / (2 sqrt(4000)); five of them, in 256 places.
    assert np.all(np.abs(draws.mean(axis=0) - vector) <= 5 * step / (2 * np.sqrt(4000)))
    # To nearest is another matter: this test tells the two apart.
    assert np.any(np.abs(through(spec, vector) - vector) > 5 * step / (2 * np.sqrt(4000)))


def test_the_generator_decides_and_nothing_else() -> None:
    vector = normal(70_001)
    first, again = (through("int4", vector, np.random.default_rng(9)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != through("int4", vector, np.random.default_rng(10)))


@pytest.mark.parametrize("spec", ["int8", "int4", "int2", "sign"])
def test_nothing_stays_nothing(spec: str) -> None:
    vector = np.zeros(300, np.float32)
    data, _ = codec_for(spec).encode(vector, None, np.random.default_rng(0))
    np.testing.assert_array_equal(codec_for(spec).decode(memoryview(data), 300), vector)


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_zero_entries_stay_zero(spec: str) -> None:
    vector = np.where(np.arange(512) % 3 == 0, 0, normal(512)).astype(np.float32)
    back = through(spec, vector, np.random.default_rng(0))
    np.testing.assert_array_equal(back[vector == 0], 0)


def test_a_block_keeps_a_large_value_to_itself() -> None:
    vector = np.full(512, 1e-4, np.float32)
    vector[0] = 1.0
    back = through("int8", vector)
    np.testing.assert_allclose(back[256:], vector[256:], rtol=0.01)
    np.testing.assert_allclose(through("int8:8", vector)[8:], vector[8:], rtol=0.01)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e3])
def test_any_scale_of_change(scale: float) -> None:
    vector = normal(256, scale)
    np.testing.assert_allclose(through("int8", vector), vector if scale > 1e-30 else 0, atol=scale / 20)


def test_block_sizes_travel_and_are_checked() -> None:
    vector = normal(1000)
    data, _ = codec_for("int8:64").encode(vector, None, None)
    assert len(data) == 2 + 2 * 16 + 1000
    np.testing.assert_allclose(codec_for("int8").decode(memoryview(data), 1000), vector, atol=5e-5)
    for option in ("7", "4097", "-8", "1.5", "x", "²"):
        with pytest.raises(UnknownCodec, match="block size"):
            codec_for(f"int8:{option}")
    for block in (0, 7, 4097):
        with pytest.raises(Malformed, match=str(block)):
            codec_for("int8").decode(memoryview(block.to_bytes(2, "little") + data[2:]), 1000)
    with pytest.raises(WrongLength, match="999"):
        codec_for("int8").decode(memoryview(data), 999)


def test_bf16_rounds_to_nearest_even_or_up() -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F80FFFF, 0xBF808001], np.uint32)
    values = bits.view(np.float32)
    assert to_bf16(values).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x3F81, 0xBF81]
    assert to_bf16(values, up=True).tolist() == [0x3F80, 0x3F81, 0x3F82, 0x3F81, 0x3F81, 0xBF81]
    assert from_bf16(np.array([0x3F81], np.uint16)).tolist() == [1.0078125]
