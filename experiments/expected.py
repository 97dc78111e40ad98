"""The sizes of a run's messages before it runs, each made by the run's own code with random values in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ConfigRecord, Message, RecordDict

from fedmask.channel import (
    Public,
    Terms,
    advance,
    down_way,
    frame_for,
    payload_bytes,
    start_public,
    whole_frame,
)
from fedmask.codecs import encode_update, pack_indices
from fedmask.config import RunConfig
from fedmask.flower import (
    ARRAYS,
    CONFIG,
    EVALUATE,
    EXAMPLES,
    HELD_OUT,
    KERNEL,
    LOSSES,
    MASK,
    PRECISION,
    QUERY_JOIN,
    QUERY_MASK,
    QUERY_SCORES,
    RECIPE,
    SCORES,
    SECONDS,
    TRAIN,
    bytes_record,
    content_payload_bytes,
    message_bytes,
    reply_content,
    update_content,
)
from fedmask.layout import Layout, Segment
from fedmask.masks import Recipe, Rule
from fedmask.methods import METHODS, TASK_SPECIFIC
from fedmask.shapes import Shapes

_DIGEST = "00" * 32
_MOST = 1 << 22  # values that are really encoded; a longer vector costs in proportion
_CHUNK = 5 * 2**20  # Flower's: what is longer than that gets an object more for each
_METRICS = {EXAMPLES: 1000, "steps": 50, HELD_OUT: 100, **dict.fromkeys((*SCORES, *LOSSES), 0.5)}


@dataclass(frozen=True)
class Size:
    """Bytes of one message, as the ledger counts them."""

    payload: int
    message: int

    def __add__(self, other: Size) -> Size:
        return Size(self.payload + other.payload, self.message + other.message)


Pair = Mapping[str, Size]
"""What one client receives (``down``) and sends (``up``) in one exchange."""


@lru_cache
def up_size(codec: str, layout: Layout) -> Size:
    """A client's change, as ``codec`` carries it."""
    part, times = _part(layout)
    vector = np.random.default_rng(1).normal(0, 1e-3, part.size).astype(np.float32)
    rng = np.random.default_rng(2)
    data, _ = encode_update(vector, part, codec=codec, digest=_DIGEST, round=1, generator=rng)
    return _carried(data, times, lambda frame: reply_content(frame, _METRICS), TRAIN, reply=True)


def scores_size() -> Size:
    """A client's answer to the closing evaluation."""
    found = {EXAMPLES: 100, "global-loss": 0.5, "global-score": 0.5}
    return _measured(reply_content(None, found), EVALUATE, reply=True)


class Downlink:
    """What the clients of one task receive, round by round: whole vectors, or changes since their version."""

    def __init__(self, down: str, layout: Layout) -> None:
        self._way = down_way(down)
        part, self._times = _part(layout)
        self._terms = Terms(part, _DIGEST)
        self._rng = np.random.default_rng(3)
        self._public: Public = start_public(part.size)
        self._held: dict[int, int] = {}
        self._sizes: dict[tuple[int, int], Size] = {}

    def receive(self, client: int) -> Size:
        """The message with the present version to a client, which then holds it."""
        key = (self._public.version, self._held.get(client, 0)) if self._way.change else (0, 0)
        self._held[client] = self._public.version
        if key not in self._sizes:
            self._sizes[key] = _carried(
                self._frame(key[1]), self._times, lambda one: update_content(one, 1), TRAIN
            )
        return self._sizes[key]

    def end_round(self) -> None:
        """The vector has changed: what a client holds is one version older."""
        if self._way.change:
            exact = self._public.vector + self._values()
            self._public = advance(self._public, exact, self._terms, self._way.codec)

    def _frame(self, held: int) -> bytes:
        if self._way.change:
            return frame_for(self._public, held, self._terms)
        return whole_frame(self._values(), 1, self._terms, self._way.codec, self._rng)

    def _values(self) -> np.ndarray:
        return self._rng.normal(0, 1e-3, self._terms.layout.size).astype(np.float32)


def recipe_of(config: RunConfig) -> str:
    """A recipe as long as that of the run's mask; empty for a method without one."""
    name = METHODS[config.method].mask
    if name is None:
        return ""
    seed = config.seed if name.startswith("random") else 0
    rule = Rule(name, config.density, config.eligible, config.per_tensor, seed)
    return Recipe(rule, checkpoint=_DIGEST, mask=_DIGEST).to_json()


def joining(config: RunConfig, shapes: Shapes) -> list[Pair]:
    """What each client exchanges before round 1: the offer, and where it takes that, votes and the mask."""
    specific = config.method in TASK_SPECIFIC
    recipe = "" if specific else recipe_of(config)
    offer = RecordDict({CONFIG: ConfigRecord({RECIPE: recipe, PRECISION: "fp32", KERNEL: "sampled"})})
    said = {"partition": 1, "status": "ok", "digest": _DIGEST, "checkpoint": _DIGEST}
    answer = RecordDict({CONFIG: ConfigRecord(said)})  # type: ignore[arg-type]
    out: list[Pair] = [_exchange(offer, answer, QUERY_JOIN)]
    if shapes.space is None or not (specific or config.mask_transport == "packed"):
        return out
    chosen = np.random.default_rng(1).choice(shapes.space.size, shapes.k, replace=False, shuffle=False)
    packed = pack_indices(np.sort(chosen), shapes.space.size)
    if specific and config.placement == "agreed":
        sent = packed + bytes(2 * shapes.k + 8) * (config.agree_by == "scores")
        question = RecordDict({CONFIG: ConfigRecord({"kind": config.agree_by})})
        own = RecordDict({ARRAYS: bytes_record(sent, MASK), CONFIG: ConfigRecord({SECONDS: 1.5})})
        out.append(_exchange(question, own, QUERY_SCORES))
    out.append(_exchange(RecordDict({ARRAYS: bytes_record(packed, MASK)}), answer, QUERY_MASK))
    return out


def slowest(clients: Sequence[Pair], link: tuple[float, float]) -> float:
    """Seconds of the slowest of clients that exchange messages at the same time, at megabits a second."""
    return max(
        (8e-6 * (one["up"].message / link[0] + one["down"].message / link[1]) for one in clients), default=0.0
    )


def _part(layout: Layout) -> tuple[Layout, float]:
    """A layout that is short enough to be made, and how many times as long the real one is."""
    if layout.size <= _MOST:
        return layout, 1.0
    return Layout((Segment("part", _MOST),)), layout.size / _MOST


def _carried(
    data: bytes, times: float, content: Callable[[bytes], RecordDict], kind: str, *, reply: bool = False
) -> Size:
    """The message around an envelope or frame that stands for one ``times`` as long."""
    around = _measured(content(bytes(1000)), kind, reply=reply).message - 1000
    chunks = round(times * len(data)) // _CHUNK
    return Size(
        round(times * payload_bytes(data)), round(times * len(data)) + around + chunks * _chunk_bytes()
    )


@lru_cache
def _chunk_bytes() -> int:
    """What one chunk more costs besides its data."""
    rng = np.random.default_rng(4)
    sizes = [
        _measured(update_content(rng.bytes(n), 1), TRAIN).message - n for n in (_CHUNK - 1000, _CHUNK + 1000)
    ]
    return sizes[1] - sizes[0]


def _exchange(down: RecordDict, up: RecordDict, kind: str) -> Pair:
    return {"down": _measured(down, kind), "up": _measured(up, kind, reply=True)}


def _measured(content: RecordDict, kind: str, *, reply: bool = False) -> Size:
    message = Message(content, dst_node_id=2**63, message_type=kind, ttl=1.0)
    if reply:
        message.metadata.__dict__["_message_id"] = "0" * 64
        message = Message(content, reply_to=message)
    return Size(content_payload_bytes(content), message_bytes([message])[0])
