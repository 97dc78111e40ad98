import numpy as np
import pytest

from fedmask.codecs import Malformed, UnknownCodec, WrongLength, codec_for, index_entropy_bytes

VECTOR = np.array([3, -1, 0.5, -4, 0, 2, 1, -0.25], np.float32)


def test_sign_by_hand() -> None:
    data, state = codec_for("sign:8").encode(VECTOR, None, None)
    mean = 1.46875  # 11.75 / 8, exactly a bf16
    assert data == bytes([8, 0, 0xBC, 0x3F, 0b0111_0101])
    back = codec_for("sign").decode(memoryview(data), 8)
    np.testing.assert_array_equal(back, np.where(VECTOR >= 0, mean, -mean))
    np.testing.assert_array_equal(state, VECTOR - back)


def test_sign_scales_a_short_last_block_by_its_own_entries() -> None:
    data, _ = codec_for("sign:8").encode(np.ones(11, np.float32), None, None)
    np.testing.assert_array_equal(codec_for("sign").decode(memoryview(data), 11), 1.0)


def test_topk_by_hand() -> None:
    data, state = codec_for("topk:0.25/fp32").encode(VECTOR, None, None)
    back = codec_for("topk").decode(memoryview(data), 8)
    assert back.tolist() == [3, 0, 0, -4, 0, 0, 0, 0]
    np.testing.assert_array_equal(state, VECTOR - back)


def test_topk_gives_ties_to_the_first() -> None:
    vector = np.array([1, -2, 2, 2, -2, 1], np.float32)
    data, _ = codec_for("topk:0.5").encode(vector, None, None)
    assert codec_for("topk").decode(memoryview(data), 6).tolist() == [0, -2, 2, 2, 0, 0]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_topk_of_short_vectors(count: int) -> None:
    vector = np.arange(1, count + 1, dtype=np.float32)
    data, _ = codec_for("topk:0.01").encode(vector, None, None)
    back = codec_for("topk").decode(memoryview(data), count)
    assert np.count_nonzero(back) == min(1, count) and back.max(initial=0) == count


@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_topk_positions_cost_their_entropy(fraction: float) -> None:
    vector = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    t = round(50_000 * fraction)
    data, _ = codec_for(f"topk:{fraction}/int8").encode(vector, None, None)
    values = t + 2 * -(-t // 256) + 2
    assert len(data) <= values + 1.02 * index_entropy_bytes(t, 50_000) + 16


def test_topk_refuses_bad_options_and_bytes() -> None:
    for option in ("0", "1.5", "x", "nan", "-1"):
        with pytest.raises(UnknownCodec, match="fraction"):
            codec_for(f"topk:{option}")
    for inner in ("topk", "fp8"):
        with pytest.raises(UnknownCodec, match=f"found '{inner}'"):
            codec_for(f"topk:0.1/{inner}")
    data, _ = codec_for("topk:0.25/fp32").encode(VECTOR, None, None)
    for bad in (b"\x04topk" + data[5:], b"\x04\xff\xff\xff\xff" + data[5:], b"\x06fp32:3" + data[5:]):
        with pytest.raises(UnknownCodec, match="codec of values"):
            codec_for("topk").decode(memoryview(bad), 8)
    with pytest.raises(Malformed, match="at most 8 positions, found 9"):
        codec_for("topk").decode(memoryview(data[:5] + b"\x09" + data[6:]), 8)
    with pytest.raises(WrongLength):
        codec_for("topk").decode(memoryview(data[:5] + b"\x01" + data[6:]), 8)
    with pytest.raises(WrongLength):
        codec_for("topk").decode(memoryview(data[:-1]), 8)


@pytest.mark.parametrize(
    "spec", ["fp16+ef", "int8+ef", "int4+ef", "int2+ef", "sign", "topk:0.1", "topk:0.1/int4"]
)
def test_what_is_lost_is_sent_later(spec: str) -> None:
    codec = codec_for(spec)
    assert codec.keeps_state
    rng = np.random.default_rng(3)
    state, sent, meant = None, np.zeros(600), np.zeros(600)
    for _ in range(60):
        vector = rng.normal(0, 1, 600).astype(np.float32)
        data, state = codec.encode(vector, state, rng)
        sent += codec.decode(memoryview(data), 600)
        meant += vector
        assert state is not None
        np.testing.assert_allclose(sent + state, meant, atol=1e-3)  # nothing is lost, only late
    assert np.abs(state).max() < 40  # and the residual does not grow with the rounds


def test_a_new_client_starts_without_a_residual_and_a_foreign_one_is_refused() -> None:
    codec = codec_for("int2+ef")
    new, _ = codec.encode(VECTOR, None, None)
    zero, _ = codec.encode(VECTOR, np.zeros(8, np.float32), None)
    assert new == zero
    with pytest.raises(WrongLength, match="residual of 8 values, found 7"):
        codec.encode(VECTOR, np.zeros(7, np.float32), None)


def test_specs() -> None:
    assert codec_for("int4+ef").name == "int4" and codec_for("int4+ef").keeps_state
    assert not codec_for("int4").keeps_state
    assert codec_for("sign+ef").keeps_state and codec_for("sign").keeps_state
    assert not codec_for("topk:0.25+noef").keeps_state  # what it leaves out is lost, and that is meant
    with pytest.raises(UnknownCodec, match="'ef' or 'noef' after"):
        codec_for("int4+delta")
    with pytest.raises(UnknownCodec, match="only 'topk' goes without feedback; write 'sign'"):
        codec_for("sign+noef")
    with pytest.raises(UnknownCodec, match="'int5'; the nearest is 'int"):
        codec_for("int5")
