"""Laws of the channel: whoever was away lands on the same bits; what codecs lose does not move the limit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmask.channel import (
    Behind,
    Public,
    Received,
    Residual,
    Terms,
    advance,
    down_way,
    frame_for,
    payload_bytes,
    read_frame,
    receive,
    start_public,
    up_codec,
    whole_frame,
    write_frame,
)
from fedmask.codecs import encode_update, unpack_update
from fedmask.errors import ConfigError, EnvelopeError
from fedmask.layout import Layout, Segment
from fedmask.rng import rng_for

STEADY = settings(deadline=None, derandomize=True, max_examples=60)
WAYS = ("fp32+delta", "fp16+delta", "int4+delta", "int2:16+delta", "sign+delta", "topk:0.1+delta")


def terms_of(size: int, digest: str = "5f" * 32) -> Terms:
    return Terms(Layout((Segment("mask", size),)), digest)


def walk(way: str, size: int, versions: int, seed: int = 0) -> list[Public]:
    """The server's public vectors while its exact one wanders."""
    rng = np.random.default_rng(seed)
    exact, out = np.zeros(size, np.float32), [start_public(size)]
    for _ in range(versions):
        exact = exact + rng.normal(0, 0.01, size).astype(np.float32)
        out.append(advance(out[-1], exact, terms_of(size), down_way(way).codec))
    return out


# Changes instead of vectors ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@given(st.integers(1, 300), st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 99))
@STEADY
def test_whoever_was_away_lands_on_the_same_bits(way: str, size: int, visits: list[int], seed: int) -> None:
    """Also who never was, for whom version 0 is the pre-trained model."""
    versions = walk(way, size, 12, seed)
    held = Received(0, np.zeros(size, np.float32))
    for at in sorted(visits):
        public = versions[at]
        frame = frame_for(public, held.version, terms_of(size))
        held = receive(frame, held, at, lambda _version: terms_of(size))
        assert held.vector.tobytes() == public.vector.tobytes()
        assert len(frame) <= 4 * size + 150  # never more than the whole, and its headers


@pytest.mark.parametrize("way", WAYS)
def test_what_a_change_loses_comes_later(way: str) -> None:
    """The public vector follows one that stands still, however coarse the codec."""
    rng = np.random.default_rng(1)
    exact = rng.normal(size=400).astype(np.float32)
    public, left = start_public(400), [float(np.linalg.norm(exact))]
    for _ in range(40):
        public = advance(public, exact, terms_of(400), down_way(way).codec)
        left.append(float(np.linalg.norm(public.vector - exact)))
    assert all(later <= earlier for earlier, later in itertools.pairwise(left))
    assert left[-1] < 0.1 * left[0]


def test_changes_that_were_read_are_skipped_and_history_is_short() -> None:
    versions = walk("int4+delta", 1000, 30)
    newest = versions[-1]
    assert 6 <= 30 - newest.oldest <= 8  # together no larger than the vector as fp32
    ahead = Received(28, versions[28].vector)
    frame = frame_for(newest, 26, terms_of(1000))  # the server heard of 26 last
    assert len(read_frame(frame).envelopes) == 4
    found = receive(frame, ahead, 30, lambda _version: terms_of(1000))
    assert found.vector.tobytes() == newest.vector.tobytes()
    far = read_frame(frame_for(newest, 5, terms_of(1000)))
    assert (far.base, len(far.envelopes)) == (-1, 1)
    assert payload_bytes(frame_for(newest, 30, terms_of(1000))) == 0


def test_a_client_without_the_base_says_what_it_holds() -> None:
    versions = walk("int8+delta", 50, 3)
    frame = frame_for(versions[3], 2, terms_of(50))
    nothing = Received(0, np.zeros(50, np.float32))
    with pytest.raises(Behind, match="expected to hold version 2, found 0") as lost:
        receive(frame, nothing, 3, lambda _version: terms_of(50))
    assert lost.value.held == 0
    other = Received(2, versions[2].vector + np.float32(1e-3))  # not what the server takes it for
    with pytest.raises(Behind, match="checksum") as lost:
        receive(frame, other, 3, lambda _version: terms_of(50))
    assert lost.value.held == 0


def test_each_change_is_read_on_its_own_mask() -> None:
    versions = walk("fp16+delta", 20, 2)
    frame = frame_for(versions[2], 1, terms_of(20))
    with pytest.raises(EnvelopeError, match="expected mask"):
        receive(frame, Received(1, versions[1].vector), 2, lambda v: terms_of(20, f"{v:02d}" * 32))


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
@STEADY
def test_damaged_frames_are_refused(noise: bytes, at: int, byte: int) -> None:
    versions = walk("int4+delta", 60, 3)
    sound = frame_for(versions[3], 1, terms_of(60))
    held = Received(1, versions[1].vector)
    flipped = bytearray(sound)
    flipped[at] ^= byte or 1
    for data in (noise, sound[:-1], sound[: at + 1], sound + b"x", bytes(flipped)):
        with pytest.raises(EnvelopeError):
            receive(data, held, 3, lambda _version: terms_of(60))
    for version, base, count in ((3, 1, 1), (3, 4, 0), (3, -1, 2), (3, -2, 5)):
        with pytest.raises(EnvelopeError, match="do not lead"):
            read_frame(write_frame(version, base, 0, [b""] * count))


def test_ways() -> None:
    assert up_codec("int4+ef").keeps_state and not up_codec("topk:0.25+noef").keeps_state
    assert (down_way("sign+delta").change, down_way("fp16").change) == (True, False)
    for spec, said in (
        ("int4+delta", "a client sends its change anyway, found 'int4\\+delta'; write 'int4'"),
        ("int5", "up: unknown codec 'int5'; the nearest is 'int"),
    ):
        with pytest.raises(ConfigError, match=said):
            up_codec(spec)
    for spec in ("int4+ef", "sign", "topk:0.1"):
        with pytest.raises(ConfigError, match=r"only later changes can make up for; write '.*\+delta'"):
            down_way(spec)


def test_a_repeated_round_starts_from_the_residual_before_it() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.normal(size=9).astype(np.float32) for _ in range(2))
    first = Residual.of(3, None, one)
    assert first.at_start_of(3) is None and first.at_start_of(2) is None
    carried = first.at_start_of(4)
    assert carried is not None
    np.testing.assert_allclose(carried, one, rtol=2.0**-8)
    second = Residual.of(5, carried, two)
    np.testing.assert_array_equal(second.at_start_of(5), carried)  # to the bit
    assert len(second.before) + len(second.after) == 4 * 9


def test_a_reply_that_did_not_count_is_taken_back() -> None:
    one, two = np.ones(9, np.float32), np.full(9, 2.0, np.float32)
    last = Residual.of(5, one, two)
    for counted, wanted in ((None, two), (5, two), (6, two), (4, one), (0, one)):
        np.testing.assert_array_equal(last.at_start_of(7, counted), wanted)
        np.testing.assert_array_equal(last.at_start_of(5, counted), one)
        assert last.at_start_of(4, counted) is None


# The limit -------------------------------------------------------------------------------------------

SIZE, CLIENTS = 200, 3


def federate(up: str, down: str, rounds: int) -> list[np.ndarray]:
    """FedAvg on quadratics that differ by client, with falling steps: the vector after each round."""
    rng, terms = rng_for(0, -1, -1, "convex"), terms_of(SIZE)
    scale = rng.uniform(0.5, 1.5, (CLIENTS, SIZE))
    goal = rng.normal(size=(CLIENTS, SIZE)) * np.exp(rng.normal(size=SIZE))
    codec, way = up_codec(up), down_way(down)
    x, public, seen = np.zeros(SIZE, np.float32), start_public(SIZE), []
    held: list[Received] = [Received(0, x)] * CLIENTS
    carried: dict[int, Residual] = {}
    for number in range(1, rounds + 1):
        changes = []
        for client in range(CLIENTS):
            draw = rng_for(0, number, -1, "codec/convex")
            frame = (
                frame_for(public, held[client].version, terms)
                if way.change
                else whole_frame(x, number - 1, terms, way.codec, draw)
            )
            held[client] = receive(frame, held[client], number - 1, lambda _version: terms)
            y = start = held[client].vector
            for _ in range(2):
                y = (y - 0.5 / (1 + number / 10) * scale[client] * (y - goal[client])).astype(np.float32)
            before = carried[client].at_start_of(number) if client in carried else None
            data, after = encode_update(
                y - start, terms.layout, codec=codec, digest=terms.digest, round=number,
                state=before, generator=rng_for(0, number, client, "codec"),
            )  # fmt: skip
            if after is not None:
                carried[client] = Residual.of(number, before, after)
            changes.append(unpack_update(data, layout=terms.layout, digest=terms.digest, round=number))
        x = x + np.mean(changes, axis=0, dtype=np.float64).astype(np.float32)
        seen.append(x)
        if way.change:
            public = advance(public, x, terms, way.codec)
    return seen


@pytest.fixture(scope="module")
def exact() -> list[np.ndarray]:
    return federate("fp32", "fp32", 400)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


COMPENSATED = [
    ("fp16", "fp16"),
    ("int8", "int8"),
    ("int4", "int4"),
    ("int8+ef", "int8+delta"),
    ("int4+ef", "int4+delta"),
    ("int2+ef", "int2+delta"),
    ("sign", "sign+delta"),
    ("topk:0.1/int4", "topk:0.1/int4+delta"),
]


@pytest.mark.parametrize(("up", "down"), COMPENSATED, ids=[up for up, _ in COMPENSATED])
def test_the_limit_is_that_of_fp32(up: str, down: str, exact: list[np.ndarray]) -> None:
    """What is unbiased or compensated comes ever closer as the steps fall; see below for what is neither."""
    found = federate(up, down, 400)
    early, late = (distance(found[at], exact[at]) for at in (49, 399))
    assert late < max(0.6 * early, 1e-3), (early, late)


@pytest.mark.parametrize(("up", "down"), [("topk:0.1+noef", "fp32"), ("fp32", "topk:0.5+noef")])
def test_what_is_lost_for_good_moves_the_limit(up: str, down: str, exact: list[np.ndarray]) -> None:
    found = federate(up, down, 400)
    assert distance(found[399], exact[399]) > 0.1
