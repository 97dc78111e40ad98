"""Seats for nodes that are not numbered, and the way back for nodes that were started again.

A node without a ``partition-id`` claims one: the offer names a seat for it, which it takes unless it kept one
of this run. Two nodes are never given the same seat: where claims collide, the later ones are told another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import ConfigRecord, RecordDict

from fedmask.flower import CONFIG, NOT_JOINED, SEAT, TAKE
from server.exchange import Answer

Offered = Mapping[str, Any]


def seat_offers(nodes: Iterable[int], seats: Iterable[int], offered: Offered) -> dict[int, RecordDict]:
    """For each node the join message's content, with the next free seat while there are any.

    A function of the nodes' ids alone: registered nodes, whose ids last, get the same seats in each run.
    """
    free = iter(sorted(seats))
    plain = _content(offered)
    out = {}
    for node in sorted(nodes):
        seat = next(free, None)
        out[node] = plain if seat is None else _content({**offered, SEAT: seat})
    return out


def told_offers(nodes: Iterable[int], seats: Iterable[int], offered: Offered) -> dict[int, RecordDict]:
    """Contents that tell each of the nodes, as far as seats go, which one to take."""
    pairs = zip(sorted(nodes), sorted(seats), strict=False)
    return {node: _content({**offered, TAKE: seat}) for node, seat in pairs}


def claimed(answer: Answer) -> bool:
    """Whether the node chose its seat itself or took the one that it was offered: it is not numbered."""
    return bool(_said(answer).get(SEAT))


def numbered_first(answers: Iterable[Answer]) -> list[Answer]:
    """Numbered nodes have no other seat to go to, so they come first; then those that kept one."""
    rank = {"": 0, "kept": 1}
    return sorted(answers, key=lambda answer: rank.get(str(_said(answer).get(SEAT, "")), 2))


def lost_seats(rejected: Sequence[Mapping[str, Any]]) -> set[int]:
    """The clients of a round's row whose SuperNode was started again and knows nothing of the run."""
    return {int(one["client"]) for one in rejected if NOT_JOINED in str(one["reason"])}


def whom_to_ask(
    online: set[int], nodes: Mapping[int, int], seen: set[int], lost: set[int], clients: int
) -> tuple[list[int], list[int]]:
    """Between two rounds: nodes to ask to join (again), and the seats that are free.

    ``nodes``: seat -> node; ``seen``: all nodes that were asked before; ``lost``: see ``lost_seats``. New
    nodes are always asked, because one that was started again may keep the seat of one that seems to be
    there; spare ones when a seat is free.
    """
    free = [seat for seat in range(clients) if seat in lost or nodes.get(seat) not in online]
    ask = (online - seen) | {nodes[seat] for seat in lost if nodes.get(seat) in online}
    if free:
        ask |= online - set(nodes.values())
    return sorted(ask), free


def _content(offered: Offered) -> RecordDict:
    return RecordDict({CONFIG: ConfigRecord(dict(offered))})


def _said(answer: Answer) -> Mapping[str, Any]:
    """What a join answer says, empty for anything that is none: it is read properly later."""
    if answer.reply is None or not answer.reply.has_content():
        return {}
    record = answer.reply.content.get(CONFIG)
    return record if isinstance(record, ConfigRecord) else {}
