"""A bad reply is rejected and named, and the round goes on as if it had never come."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from experiments.inprocess import InProcessGrid
from fedmask.codecs import pack_update, read_header, unpack_update
from fedmask.config import RunConfig
from fedmask.errors import FederationError
from fedmask.flower import (
    ARRAYS,
    METRICS,
    UPDATE,
    bytes_record,
    ensure_identity,
    held_bytes,
    record_bytes,
)
from fedmask.layout import Layout, Segment
from server.exchange import SMALL, Request, exchange, most_bytes
from tests.apps.fakes import assert_mean_of_what_counted, quick_app
from tests.apps.grids import ShuffledGrid, TamperedGrid, read_rows, run_on

MakeConfig = Callable[..., RunConfig]
BAD = 1


def _changed(reply: Message, arrays: ArrayRecord | None = None, **metrics: float | list[float]) -> Message:
    content = RecordDict(dict(reply.content))
    if arrays is not None:
        content[ARRAYS] = arrays
    content[METRICS] = MetricRecord({**reply.content[METRICS], **metrics})
    return _again(reply, content)


def _again(reply: Message, content: RecordDict | Error) -> Message:
    out = Message(content, reply_to=reply)  # type: ignore[call-overload]
    out.metadata.__dict__.update(reply.metadata.__dict__)
    return out


def _envelope(reply: Message) -> bytes:
    return record_bytes(reply.content.array_records[ARRAYS])


def _repacked(reply: Message, **changes: object) -> Message:
    """The reply with its envelope packed anew: other digest, round, layout or values."""
    data = _envelope(reply)
    header = read_header(data)
    vector = unpack_update(data, layout=header.layout, digest=header.digest, round=header.round)
    given = {"vector": vector, "layout": header.layout, "digest": header.digest, "round": header.round}
    given |= {"codec": header.codec, **changes}
    packed = pack_update(
        given["vector"],  # type: ignore[arg-type]
        given["layout"],  # type: ignore[arg-type]
        codec=given["codec"],  # type: ignore[arg-type]
        digest=given["digest"],  # type: ignore[arg-type]
        round=given["round"],  # type: ignore[arg-type]
        max_abs=np.inf,
    )
    return _changed(reply, bytes_record(packed))


def _patched(reply: Message, value: float) -> Message:
    """One value of the payload overwritten, with a checksum that fits."""
    data = bytearray(_envelope(reply))
    data[-4:] = struct.pack("<f", value)
    data[5:9] = struct.pack("<I", zlib.crc32(bytes(data[9:])))
    return _changed(reply, bytes_record(bytes(data)))


def _flipped(reply: Message) -> Message:
    data = bytearray(_envelope(reply))
    data[-1] ^= 1
    return _changed(reply, bytes_record(bytes(data)))


def _newer(reply: Message) -> Message:
    """An envelope of a format that is not known yet, with a checksum that fits."""
    data = bytearray(_envelope(reply))
    data[4] = 99
    data[5:9] = struct.pack("<I", zlib.crc32(bytes(data[9:])))
    return _changed(reply, bytes_record(bytes(data)))


def _longer(reply: Message) -> Message:
    header = read_header(_envelope(reply))
    *first, last = header.layout.segments
    layout = Layout((*first, Segment(last.name, last.size + 1)))
    return _repacked(reply, layout=layout, vector=np.zeros(layout.size, np.float32))


def _with(reply: Message, name: str, record: ArrayRecord | ConfigRecord | MetricRecord) -> Message:
    return _again(reply, RecordDict({**reply.content, name: record}))


def _without(reply: Message, name: str) -> Message:
    return _again(reply, RecordDict({key: value for key, value in reply.content.items() if key != name}))


def _archive() -> Array:
    """What ``numpy.load`` opens as an archive of arrays, not as an array."""
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3, np.uint8))
    return Array("uint8", (3,), "numpy.ndarray", file.getvalue())


def _array(reply: Message, array: Array) -> Message:
    return _changed(reply, ArrayRecord({UPDATE: array}))


BAD_REPLIES: dict[str, tuple[Callable[[Message], Message], str]] = {
    "error": (lambda m: _again(m, Error(code=2, reason="OSError: disk\nfull")), "OSError: disk full"),
    "wrong digest": (lambda m: _repacked(m, digest="ab" * 32), "expected mask"),
    "stale round": (lambda m: _repacked(m, round=0), "an update of round"),
    "another layout": (_longer, "expected segments"),
    "NaN": (lambda m: _patched(m, float("nan")), "finite"),
    "infinity": (lambda m: _patched(m, float("-inf")), "finite"),
    "absurd value": (lambda m: _patched(m, 1e30), "1e+30"),
    "unknown version": (_newer, "expected version 1, found 99; update the older side"),
    "flipped bit": (_flipped, "checksum"),
    "truncated": (lambda m: _changed(m, bytes_record(_envelope(m)[:-10])), "bytes"),
    "no envelope": (lambda m: _changed(m, bytes_record(b"something else entirely.....")), "FMSK"),
    "empty": (lambda m: _changed(m, bytes_record(b"")), "bytes"),
    "no rows": (lambda m: _changed(m, **{"num-examples": 0}), "num-examples"),
    "negative rows": (lambda m: _changed(m, **{"num-examples": -3}), "num-examples"),
    "absurd rows": (lambda m: _changed(m, **{"num-examples": 10**9}), "num-examples"),
    "fraction of rows": (lambda m: _changed(m, **{"num-examples": 2.5}), "num-examples"),
    "list of rows": (lambda m: _changed(m, **{"num-examples": [3.0]}), "expected one number"),
    "metric NaN": (lambda m: _changed(m, **{"train-loss": float("nan")}), "not finite"),
    "unknown metric": (lambda m: _changed(m, surprise=1.0), "surprise"),
    "absurd steps": (lambda m: _changed(m, steps=1.7e308), "steps: expected a whole number from 0 to 2"),
    "more steps than planned": (
        lambda m: _changed(m, steps=3.0),
        "steps: expected a whole number from 0 to 2",
    ),
    "negative steps": (lambda m: _changed(m, steps=-1.0), "steps"),
    "absurd held-out rows": (
        lambda m: _changed(m, **{"held-out": 1e12}),
        "held-out: expected a whole number",
    ),
    "half a held-out row": (lambda m: _changed(m, **{"held-out": 0.5}), "held-out: expected a whole number"),
    "score above one": (lambda m: _changed(m, **{"personal-score": 5.0}), "a score from -1 to 1"),
    "score below minus one": (lambda m: _changed(m, **{"global-score": -1.1}), "a score from -1 to 1"),
    "absurd loss": (lambda m: _changed(m, **{"train-loss": 1e300}), "train-loss: expected a loss from 0"),
    "negative loss": (lambda m: _changed(m, **{"global-loss": -1}), "global-loss: expected a loss from 0"),
    "metric of a known family": (lambda m: _changed(m, **{"global-x": 1.0}), "global-x"),
    "another codec": (lambda m: _repacked(m, codec="fp16"), "expected values as fp32, found fp16"),
    "too many metrics": (lambda m: _changed(m, **{f"global-{i}": 1.0 for i in range(9)}), "at most 9"),
    "half a step": (lambda m: _changed(m, steps=0.5), "steps"),
    "missing metric": (lambda m: _with(m, METRICS, MetricRecord({"num-examples": 3})), "missing"),
    "no metrics": (lambda m: _without(m, METRICS), "expected the records"),
    "no arrays": (lambda m: _without(m, ARRAYS), "expected the records"),
    "extra record": (lambda m: _with(m, "more", ConfigRecord({"a": 1})), "expected the records"),
    "second arrays": (lambda m: _with(m, "more", bytes_record(b"x")), "expected the records"),
    "arrays are metrics": (
        lambda m: _with(_without(m, ARRAYS), ARRAYS, MetricRecord({"a": 1})),
        "ArrayRecord",
    ),
    "two arrays": (
        lambda m: _changed(m, ArrayRecord({UPDATE: Array(np.zeros(3, np.uint8)), "b": Array(np.zeros(1))})),
        "expected one array",
    ),
    "floats": (lambda m: _array(m, Array(np.zeros(9, np.float32))), "uint8"),
    "a matrix": (lambda m: _array(m, Array(np.zeros((3, 3), np.uint8))), "uint8"),
    "another format": (lambda m: _array(m, Array("uint8", (3,), "other", b"abc")), "uint8"),
    "an archive": (lambda m: _array(m, _archive()), "cannot be read"),
    "a lie about the array": (
        lambda m: _array(m, Array("uint8", (3,), "numpy.ndarray", b"abc")),
        "cannot be read",
    ),
}


def test_bad_replies_change_nothing(make_config: MakeConfig) -> None:
    """One client sends another kind of bad reply each round; it might as well have been silent."""
    kinds = list(BAD_REPLIES.items())
    config = make_config(clients=(3, 1), rounds=len(kinds), eval_rows=2)

    def spoil(client: int, number: int, reply: Message) -> list[Message]:
        return [kinds[number - 1][1][0](reply) if client == BAD else reply]

    spoilt = run_on(TamperedGrid(config, spoil, quick_app))
    up = [
        row for row in read_rows(spoilt.folder, "ledger") if (row["direction"], row["client"]) == ("up", BAD)
    ]
    rows = read_rows(spoilt.folder, "rounds")[1:]
    for (name, (_, reason)), row, entry in zip(kinds, rows, up[1:], strict=True):
        assert [one["client"] for one in row["rejected"]] == [BAD], name
        assert reason in row["rejected"][0]["reason"], (name, row["rejected"])
        assert "\n" not in row["rejected"][0]["reason"]
        assert row["replied"] == [0, 2, 3], name
        assert entry["status"] == ("failed" if name == "error" else "rejected"), name

    silent = BAD_REPLIES["error"][0]
    absent = run_on(
        TamperedGrid(config, lambda c, _r, reply: [silent(reply) if c == BAD else reply], quick_app)
    )
    clean = run_on(TamperedGrid(config, lambda _c, _r, reply: [reply], quick_app))
    assert spoilt.summary["vector_sha256"] == absent.summary["vector_sha256"]
    assert spoilt.summary["vector_sha256"] != clean.summary["vector_sha256"]


class OneReply:
    """A grid whose only node answers with ``content``."""

    def __init__(self, content: RecordDict) -> None:
        self.content = content

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (sent,) = messages
        sent.metadata.__dict__["_message_id"] = "one"
        self.reply = Message(self.content, reply_to=sent)
        return ["one"]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.reply]


MEGABYTE = bytes(range(256)) * 4096


@pytest.mark.parametrize(
    "record",
    [
        bytes_record(MEGABYTE * 32),
        ConfigRecord({"text": MEGABYTE.hex() * 8, "bytes": MEGABYTE * 24}),
        ConfigRecord({"texts": [MEGABYTE.hex() * 8], "many": [MEGABYTE] * 24}),
        MetricRecord({"numbers": [0.5] * (1 << 22)}),
    ],
    ids=["array", "text", "list", "numbers"],
)
def test_a_reply_that_is_too_large_is_not_even_copied(record: ArrayRecord | ConfigRecord) -> None:
    ensure_identity()
    content = RecordDict({"some": record})
    requests = [Request(5, 0, RecordDict())]
    noted: list[tuple[str, tuple[int, int]]] = []
    tracemalloc.start()
    try:
        (answer,) = exchange(
            OneReply(content),  # type: ignore[arg-type]
            requests,
            "train",
            5.0,
            most=most_bytes(1000),
            note=lambda way, answers: noted.extend((way, one.up) for one in answers),
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status == "rejected" and answer.reply is None
    assert answer.reason == f"expected a reply of at most {SMALL + 8000} bytes, found {answer.up[1]}"
    assert answer.up == (0, held_bytes(content)) and answer.up[1] >= 32 << 20
    assert noted[-1] == ("up", answer.up)
    assert peak < 1 << 20


def test_a_round_goes_on_without_a_reply_that_is_too_large(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=1, eval_rows=2)

    def spoil(client: int, _round: int, reply: Message) -> list[Message]:
        return [_changed(reply, bytes_record(MEGABYTE * 2)) if client == BAD else reply]

    result = run_on(TamperedGrid(config, spoil, quick_app))
    folder, row = result.folder, read_rows(result.folder, "rounds")[1]
    assert row["replied"] == [0, 2, 3]
    assert re.fullmatch(
        r"expected a reply of at most 1\d{6} bytes, found 2\d{6}", row["rejected"][0]["reason"]
    )
    (up,) = (
        one
        for one in read_rows(folder, "ledger")
        if (one["round"], one["client"], one["direction"]) == (1, BAD, "up")
    )
    assert (up["status"], up["payload_bytes"]) == ("rejected", 0) and up["message_bytes"] > 2 << 20
    assert_mean_of_what_counted(result, config)


def test_fuzzed_replies_never_end_a_round(make_config: MakeConfig) -> None:
    """Two of four clients send damaged bytes in 25 rounds: in the array, below it, or under a checksum of
    their own."""
    config = make_config(clients=(3, 1), rounds=25, eval_rows=2)
    rng = np.random.default_rng(5)

    def damaged(data: bytes) -> bytes:
        out = bytearray(data)
        for _ in range(int(rng.integers(1, 9))):
            out[int(rng.integers(len(out)))] = int(rng.integers(256))
        return bytes(out[: int(rng.integers(len(out)))] if rng.integers(3) == 0 else out)

    def spoil(client: int, number: int, reply: Message) -> list[Message]:
        if client in (0, 3):
            return [reply]
        if number % 3 == 0:  # what NumPy would read
            array = reply.content.array_records[ARRAYS][UPDATE]
            raw = Array("uint8", array.shape, "numpy.ndarray", damaged(array.data))
            return [_array(reply, raw)]
        data = damaged(_envelope(reply))
        if number % 3 == 1 and len(data) > 9:
            data = data[:5] + struct.pack("<I", zlib.crc32(data[9:])) + data[9:]
        return [_changed(reply, bytes_record(data))]

    rows = read_rows(run_on(TamperedGrid(config, spoil, quick_app)).folder, "rounds")[1:]
    assert len(rows) == 25
    assert all({0, 3} <= set(row["replied"]) for row in rows)
    refused = [one for row in rows for one in row["rejected"]]
    assert len(refused) > 40 and {one["client"] for one in refused} == {1, 2}
    assert all("\n" not in one["reason"] for one in refused)
    finite = [value for row in rows for value in row["dev"]["mood"].values()]
    assert np.all(np.isfinite(finite))


def test_scores_below_zero_count(make_config: MakeConfig) -> None:
    """Correlations have a sign; only what no metric can be is refused."""
    config = make_config(clients=(3, 1), rounds=1)
    grid = TamperedGrid(
        config,
        lambda _c, _r, reply: [_changed(reply, **{"global-score": -0.5, "personal-score": 1})],
        quick_app,
    )
    row = read_rows(run_on(grid).folder, "rounds")[1]
    assert (row["rejected"], row["global"]["mood"], row["personal"]["mood"]) == ([], -0.5, 1.0)


def test_bad_evaluations_are_left_out_and_named(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=1)
    lies: dict[int, dict[str, float]] = {0: {"num-examples": 10**6}, 1: {"global-score": 7.0}}

    class LyingGrid(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for reply in super().pull_messages(message_ids):
                client = self._partitions[reply.metadata.src_node_id]
                kind = reply.metadata.message_type
                yield _changed(reply, **lies[client]) if kind == "evaluate" and client in lies else reply

    found = run_on(LyingGrid(config, 1, quick_app), client_evaluation=True).summary
    assert {task: one["clients"] for task, one in found["clients"].items()} == {"mood": 1, "topic": 1}
    assert [one["client"] for one in found["unscored"]] == [0, 1]
    assert "num-examples" in found["unscored"][0]["reason"]
    assert "a score from -1 to 1" in found["unscored"][1]["reason"]


def test_second_reply_is_rejected_and_the_first_counts(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1))

    def twice(client: int, _round: int, reply: Message) -> list[Message]:
        other = _repacked(reply, vector=np.ones(read_header(_envelope(reply)).layout.size, np.float32))
        return [reply, other] if client == BAD else [reply]

    doubled = run_on(TamperedGrid(config, twice, quick_app))
    rows = read_rows(doubled.folder, "rounds")
    clean = run_on(TamperedGrid(config, lambda _c, _r, reply: [reply], quick_app))
    assert doubled.summary["vector_sha256"] == clean.summary["vector_sha256"]
    assert [one["reason"] for one in rows[1]["rejected"]] == ["a second reply to one message"]
    assert rows[1]["replied"] == [0, 1, 2, 3]


@pytest.mark.usefixtures("server_s_clock")
def test_silent_client_is_a_failed_reply(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), server={"timeout": 1.0})
    result = run_on(
        TamperedGrid(config, lambda client, _r, reply: [] if client == BAD else [reply], quick_app)
    )
    for row in read_rows(result.folder, "rounds")[1:]:
        assert row["rejected"] == [{"client": BAD, "reason": "no answer within 1 s"}]
        assert row["replied"] == [0, 2, 3]
    assert_mean_of_what_counted(result, config)


def test_run_fails_only_below_the_minimum(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), server={"min_replies": 4})
    spoil = BAD_REPLIES["NaN"][0]
    with pytest.raises(
        FederationError, match=r"round 1: .*min_replies.*found 3 of 4 \(client 1: expected finite"
    ):
        run_on(
            TamperedGrid(
                config, lambda client, _r, reply: [spoil(reply)] if client == BAD else [reply], quick_app
            )
        )


def test_a_failed_run_leaves_its_ledger(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), server={"min_replies": 4})
    silent = BAD_REPLIES["error"][0]
    grid = TamperedGrid(config, lambda c, _r, reply: [silent(reply)] if c == BAD else [reply], quick_app)
    with pytest.raises(FederationError):
        run_on(grid)
    folder = Path(config.runs_dir) / config.name
    assert not (folder / "summary.json").exists()
    statuses = {(row["client"], row["status"]) for row in read_rows(folder, "ledger") if row["round"] == 1}
    assert (BAD, "failed") in statuses


def test_order_of_arrival_does_not_matter(make_config: MakeConfig) -> None:
    config = make_config(rounds=1)
    found = {run_on(ShuffledGrid(config, seed)).summary["vector_sha256"] for seed in range(2)}
    assert len(found) == 1
