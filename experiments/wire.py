"""Messages and states as plain bytes, the way Flower takes them apart: content-addressed objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


class Parcel(NamedTuple):
    """One object and all below it: the id of the topmost, the bytes of each by id, and the message's id."""

    root: str
    objects: dict[str, bytes]
    message_id: str = ""


def pack(things: Sequence[Message] | Sequence[RecordDict]) -> list[Parcel]:
    """Take messages or record dicts apart into bytes that share nothing with them.

    What several of them share (the vector of a task) is serialized once and its bytes are shared.
    """
    known: dict[str, bytes] = {}
    parcels = []
    with no_object_id_recompute():
        for thing in things:
            parts = get_all_nested_objects(thing)
            for name, part in parts.items():
                if name not in known:
                    known[name] = part.deflate()
            name = thing.metadata.message_id if isinstance(thing, Message) else ""
            parcels.append(Parcel(thing.object_id, {part: known[part] for part in parts}, name))
    return parcels


def is_whole(name: str, piece: bytes) -> bool:
    """Whether bytes are the object of that id, which is their SHA-256."""
    return get_object_id(piece) == name


def unpack_message(parcel: Parcel) -> Message:
    """The message again, with the id that serialization leaves out."""
    message = cast(
        Message, inflate_object_from_contents(parcel.root, parcel.objects, keep_object_contents=True)
    )
    message.metadata.__dict__["_message_id"] = parcel.message_id
    return message


def unpack_state(parcel: Parcel | None) -> RecordDict:
    """A node's state; None is the empty one."""
    if parcel is None:
        return RecordDict()
    return cast(
        RecordDict, inflate_object_from_contents(parcel.root, parcel.objects, keep_object_contents=True)
    )
