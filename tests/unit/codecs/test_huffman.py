import tracemalloc
import zlib

import numpy as np
import pytest

from fedmask.codecs import codec_for
from fedmask.codecs.bits import varint
from fedmask.errors import EnvelopeError


@pytest.mark.parametrize(("name", "most"), [("int8", 0.99), ("int4", 0.95), ("int2", 0.88)])
def test_a_bell_costs_less_and_says_the_same(name: str, most: float) -> None:
    vector = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    plain, _ = codec_for(name).encode(vector, None, None)
    data, _ = codec_for(f"{name}h").encode(vector, None, None)
    assert len(data) < most * len(plain)
    back = codec_for(f"{name}h").decode(memoryview(data), vector.size)
    np.testing.assert_array_equal(back, codec_for(name).decode(memoryview(plain), vector.size))


def test_it_goes_into_feedback_and_topk() -> None:
    vector = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    data, state = codec_for("int4h:64+ef").encode(vector, None, None)
    np.testing.assert_array_equal(state, vector - codec_for("int4h").decode(memoryview(data), 5000))
    data, _ = codec_for("topk:0.2/int4h+noef").encode(vector, None, None)
    assert np.count_nonzero(codec_for("topk").decode(memoryview(data), 5000)) > 900


def test_what_inflates_without_end_is_cut_off() -> None:
    raw = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = raw.compress(bytes(50_000_000)) + raw.flush()
    tracemalloc.start()
    try:
        for length in (100, 60_000_000, 2**62):
            with pytest.raises(EnvelopeError):
                codec_for("int4h").decode(memoryview(varint(length) + bomb), 600)
        assert tracemalloc.get_traced_memory()[1] < 400_000  # a window and the errors
    finally:
        tracemalloc.stop()


def test_damage_is_refused() -> None:
    data, _ = codec_for("int4h").encode(np.ones(600, np.float32), None, None)
    for bad in (b"", data[:-1], data + b"x", data[:2] + b"\xff" + data[3:], b"\x05" + data[1:]):
        with pytest.raises(EnvelopeError):
            codec_for("int4h").decode(memoryview(bad), 600)
