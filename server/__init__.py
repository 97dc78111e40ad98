"""The Flower ServerApp: rounds, aggregation through Flower's strategies, evaluation, the run folder."""

from __future__ import annotations

import fedmask._env  # noqa: F401  (before flwr is imported)

__all__: list[str] = []
