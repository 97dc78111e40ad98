"""Laws of the bytes: round trips, bounds on size and memory, and that nothing malformed gets through."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmask.codecs import (
    BadChecksum,
    Codec,
    State,
    codec_for,
    encode_update,
    index_entropy_bytes,
    pack_indices,
    pack_update,
    payload_bytes,
    unpack_indices,
    unpack_update,
)
from fedmask.errors import EnvelopeError
from fedmask.layout import Layout, Segment
from fedmask.rng import rng_for

DIGEST = "5f" * 32
CODECS = ("fp32", "fp16", "bf16", "int8", "int4", "int2", "sign", "topk:0.2", "topk:0.1/int8")
CODECS += ("int4h", "int2h:8")
STEADY = settings(deadline=None, derandomize=True, max_examples=200)

changes = st.floats(-1e4, 1e4, width=32, allow_nan=False)
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def layout_of(parts: list[int]) -> Layout:
    return Layout(tuple(Segment(f"part{i}", size) for i, size in enumerate(parts)))


@given(st.data(), sizes, st.integers(-1, 10_000))
@STEADY
def test_fp32_envelopes_give_back_every_bit(data: st.DataObject, parts: list[int], round: int) -> None:
    layout = layout_of(parts)
    vector = data.draw(hnp.arrays(np.float32, layout.size, elements=changes))
    packed = pack_update(vector, layout, codec="fp32", digest=DIGEST, round=round)
    back = unpack_update(packed, layout=layout, digest=DIGEST, round=round)
    assert back.tobytes() == vector.tobytes()  # the sign of zero included
    assert payload_bytes(packed) == 4 * layout.size


@given(hnp.arrays(np.float32, st.integers(0, 60), elements=changes))
@STEADY
def test_fp16_rounds_by_at_most_half_a_step(vector: np.ndarray) -> None:
    layout = layout_of([vector.size])
    packed = pack_update(vector, layout, codec="fp16", digest=DIGEST, round=0)
    back = unpack_update(packed, layout=layout, digest=DIGEST, round=0)
    bound = np.maximum(np.abs(vector.astype(np.float64)) * 2.0**-11, 2.0**-25)
    assert np.all(np.abs(back.astype(np.float64) - vector) <= bound)
    assert payload_bytes(packed) == 2 * vector.size
    again = pack_update(back, layout, codec="fp16", digest=DIGEST, round=0)
    assert again == packed  # what was rounded once stays


@pytest.mark.parametrize("codec", CODECS)
@given(hnp.arrays(np.float32, st.integers(0, 600), elements=changes), st.booleans())
@STEADY
def test_what_the_sender_packs_the_receiver_accepts(codec: str, vector: np.ndarray, stochastic: bool) -> None:
    layout = layout_of([vector.size])
    generator = np.random.default_rng(1) if stochastic else None
    packed, state = encode_update(vector, layout, codec=codec, digest=DIGEST, round=0, generator=generator)
    back = unpack_update(packed, layout=layout, digest=DIGEST, round=0)
    assert back.shape == vector.shape and back.dtype == np.float32
    if state is not None:
        np.testing.assert_array_equal(state, vector - back)


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    size = draw(st.integers(0, 3000) | st.integers(0, 1 << 40))
    values = draw(st.sets(st.integers(0, max(0, size - 1)), max_size=min(size, 300)))
    if draw(st.booleans()) and size <= 3000:  # the complement: dense sets
        values = set(range(size)) - values
    return np.array(sorted(values), np.int64), size


@given(index_sets(), st.lists(st.floats(0, 1), max_size=5))
@STEADY
def test_index_sets_round_trip(case: tuple[np.ndarray, int], cuts: list[float]) -> None:
    indices, size = case
    boundaries = [int(cut * size) for cut in cuts]
    for data in (pack_indices(indices, size), pack_indices(indices, size, boundaries)):
        np.testing.assert_array_equal(unpack_indices(data, size, indices.size), indices)
        assert len(data) <= 1 + -(-size // 8)


@pytest.mark.parametrize("density", [1e-4, 2.3e-4, 1e-3, 3.1e-3, 5e-3, 1e-2, 2.7e-2, 5e-2, 7.2e-2, 1e-1])
def test_random_masks_stay_within_two_percent_of_the_entropy_bound(density: float) -> None:
    size = 10_616_832  # the linear weights of a 6-layer encoder of width 384
    k = round(density * size)
    indices = np.sort(np.random.default_rng(7).choice(size, k, replace=False))
    data = pack_indices(indices, size)
    assert len(data) <= 1.02 * index_entropy_bytes(k, size)
    np.testing.assert_array_equal(unpack_indices(data, size, k), indices)


# Nothing malformed gets through ------------------------------------------------------------------------

LAYOUT = Layout((Segment("mask", 500), Segment("bias", 60), Segment("head/tweets", 40)))
HUGE = (2**31, 2**40, 2**63, 2**64 - 1)
MEMORY = 64 * 1024  # bytes: the vector is 2,400; errors, views and the interpreter take the rest


def sealed(data: bytes) -> bytes:
    """Damage under a valid checksum: a hostile sender, not a bad line."""
    return data[:5] + struct.pack("<I", zlib.crc32(data[9:])) + data[9:]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One of: flipped bits, a cut, an insertion, random bytes over a run, a huge declared number."""
    out = bytearray(data)
    kind = rng.integers(6)
    at = int(rng.integers(len(out)))
    if kind == 0:
        for _ in range(int(rng.integers(1, 5))):
            out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out[at:at] = rng.bytes(int(rng.integers(1, 30)))
    elif kind == 3:
        out[at : at + 20] = rng.bytes(len(out[at : at + 20]))
    elif kind == 4:  # any field of the header, read as a number, becomes absurd
        at = int(rng.integers(min(120, len(out))))
        huge = struct.pack("<Q", HUGE[int(rng.integers(len(HUGE)))])
        out[at : at + 8] = huge[: len(out) - at]
    else:
        return rng.bytes(int(rng.integers(0, 300)))
    return bytes(out)


@pytest.mark.parametrize("codec", CODECS)
def test_fuzzed_envelopes_are_refused_by_type_in_bounded_memory(codec: str) -> None:
    rng = np.random.default_rng(11)
    vector = rng.normal(0, 0.01, LAYOUT.size).astype(np.float32)
    good, _ = encode_update(vector, LAYOUT, codec=codec, digest=DIGEST, round=3)
    seen: dict[str, int] = {}
    tracemalloc.start()
    try:
        for _ in range(3_000):
            bad = mutated(good, rng)
            if bad == good:
                continue
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(EnvelopeError) as caught:
                unpack_update(bad, layout=LAYOUT, digest=DIGEST, round=3)
            assert tracemalloc.get_traced_memory()[1] - before < MEMORY
            assert type(caught.value) is not EnvelopeError and "\n" not in str(caught.value)
            seen[type(caught.value).__name__] = seen.get(type(caught.value).__name__, 0) + 1
    finally:
        tracemalloc.stop()
    assert sum(seen.values()) >= 2_900
    assert {"BadChecksum", "Truncated", "NotAnEnvelope", "UnknownVersion", "WrongLength"} <= set(seen)


@pytest.mark.parametrize("codec", CODECS)
def test_damage_under_a_valid_checksum_is_refused_or_gives_sane_values(codec: str) -> None:
    rng = np.random.default_rng(12)
    vector = rng.normal(0, 0.01, LAYOUT.size).astype(np.float32)
    good, _ = encode_update(vector, LAYOUT, codec=codec, digest=DIGEST, round=3)
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(2_000):
            bad = mutated(good, rng)
            if len(bad) > 9:
                bad = sealed(bad)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                back = unpack_update(bad, layout=LAYOUT, digest=DIGEST, round=3)
            except BadChecksum:
                pytest.fail("the checksum was made to fit")
            except EnvelopeError:
                refused += 1
            else:
                assert back.shape == vector.shape and np.all(np.abs(back) <= 1e4)
            assert tracemalloc.get_traced_memory()[1] - before < MEMORY
    finally:
        tracemalloc.stop()
    assert refused > 1_000


@given(st.binary(max_size=400))
@STEADY
def test_any_bytes_are_refused_as_envelopes(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        unpack_update(data, layout=LAYOUT, digest=DIGEST, round=3)


@given(st.binary(max_size=300), st.integers(0, 5000))
@STEADY
def test_any_bytes_are_refused_as_indices_or_are_indices(data: bytes, size: int) -> None:
    check_indices(data, size)


def test_fuzzed_indices_are_refused_or_are_indices() -> None:
    rng = np.random.default_rng(13)
    size = 4000
    sets = [np.flatnonzero(rng.random(size) < p) for p in (0.01, 0.1, 0.5, 0.9)]
    packed = [pack_indices(indices, size) for indices in sets]
    uneven = np.concatenate([sets[2][sets[2] < 1000], sets[0][sets[0] >= 1000]])
    packed.append(pack_indices(uneven, size, [1000, 2500]))
    assert sorted({data[0] for data in packed}) == [0, 1, 2, 3]  # every kind is there
    for number in range(10_000):
        check_indices(mutated(packed[number % len(packed)], rng), size)


def check_indices(data: bytes, size: int) -> None:
    try:
        indices = unpack_indices(data, size)
    except EnvelopeError:
        return
    assert indices.dtype == np.int64 and np.all(np.diff(indices) > 0)
    assert indices.size == 0 or (indices[0] >= 0 and indices[-1] < size)


# Every codec reaches the limit of fp32 ------------------------------------------------------------------

CLIENTS, SIZE = 4, 96
SHORT, LONG = 375, 1500  # rounds


def distance_after_descent(codec: Codec, rounds: int, *, memory: bool = True) -> float:
    """Federated gradient steps on least squares that differ by client; ||x - optimum|| / ||optimum||.

    Each client sends its own change through the codec, with its residual if it has one; the server adds
    the mean. The step falls as 1 / round at the end, so noise without bias averages out and bias stays.
    """
    rng = np.random.default_rng(21)
    matrices = [rng.normal(0, 1, (2 * SIZE, SIZE)) / np.sqrt(2 * SIZE) for _ in range(CLIENTS)]
    targets = [matrix @ rng.normal(0, 1, SIZE) + rng.normal(0, 0.3, 2 * SIZE) for matrix in matrices]
    optimum = np.linalg.lstsq(np.concatenate(matrices), np.concatenate(targets), rcond=None)[0]
    states: list[State] = [None] * CLIENTS
    x = np.zeros(SIZE)
    for round in range(rounds):
        step = 0.5 / (1 + round / 30)
        changes = []
        for client, (matrix, target) in enumerate(zip(matrices, targets, strict=True)):
            change = (-step * matrix.T @ (matrix @ x - target)).astype(np.float32)
            generator = rng_for(5, round, client, "codec") if memory else None
            data, states[client] = codec.encode(change, states[client] if memory else None, generator)
            changes.append(codec.decode(memoryview(data), SIZE))
        x = x + np.mean(changes, axis=0)
    return float(np.linalg.norm(x - optimum) / np.linalg.norm(optimum))


def test_descent_in_fp32_is_at_the_optimum() -> None:
    assert distance_after_descent(codec_for("fp32"), LONG) < 1e-6


@pytest.mark.parametrize(
    "spec",
    [
        "fp16",
        "bf16",
        "int8",
        "int4",
        "int2",
        "int8+ef",
        "int4+ef",
        "int2+ef",
        "sign",
        "topk:0.1",
        "topk:0.1/int4",
    ],
)
def test_descent_through_a_codec_has_the_limit_of_fp32(spec: str) -> None:
    late = distance_after_descent(codec_for(spec), LONG)
    assert late < 0.05
    assert late < max(1e-4, 0.65 * distance_after_descent(codec_for(spec), SHORT))  # and still falling


@pytest.mark.parametrize("spec", ["int4", "int2", "sign", "topk:0.1"])
def test_the_same_codecs_to_nearest_and_without_memory_stop_elsewhere(spec: str) -> None:
    late = distance_after_descent(codec_for(spec), LONG, memory=False)
    assert late > 0.09
    assert late > 0.9 * distance_after_descent(codec_for(spec), SHORT, memory=False)
