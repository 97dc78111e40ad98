"""A cache that holds what was used last, up to a total size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """At most ``room`` units of values; those used longest ago are let go first.

    ``size(value)`` says how many units a value takes. One that alone is larger than the room is given out
    and not kept.
    """

    def __init__(self, room: int, size: Callable[[V], int]) -> None:
        self.room = room
        self._size = size
        self._held: dict[K, V] = {}  # in the order of use
        self._used = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``, made by ``make()`` if it is not held."""
        if key in self._held:
            value = self._held[key] = self._held.pop(key)
            return value
        value = make()
        if (size := self._size(value)) > self.room:
            return value
        self._held[key] = value
        self._used += size
        while self._used > self.room:
            self._used -= self._size(self._held.pop(next(iter(self._held))))
        return value
