"""The Flower ClientApp: what a client answers. No maths of its own."""

from __future__ import annotations

import fedmask._env  # noqa: F401  (before flwr is imported)

__all__: list[str] = []
