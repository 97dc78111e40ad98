"""What the rounds work on: the state between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedmask.channel import Public, advance, down_way, start_public
from fedmask.workspace import Workspace


@dataclass
class RunState:
    """All that the next round depends on, besides the strategy's own state (``ServerStrategy.state``).

    ``shared`` float32 ``[s]``, ``heads`` float32 by task: changes from the reference, zeros at first. This is
    the exact state: what is scored, averaged and exported. ``public``: by stream, what the clients can hold
    of it, where changes are sent down (``fedmask.channel.public``). ``held``: by client, the version that it
    confirmed last; 0, the pre-trained model, for those not named.
    """

    round: int
    shared: np.ndarray
    heads: dict[str, np.ndarray]
    public: dict[str, Public] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    @classmethod
    def start(cls, workspace: Workspace) -> RunState:
        """The state before round 1."""
        layouts = {task: workspace.layout(task) for task in workspace.tasks}
        shared = next(iter(layouts.values())).shared_size
        heads = {task: np.zeros(layout.size - shared, np.float32) for task, layout in layouts.items()}
        state = cls(0, np.zeros(shared, np.float32), heads)
        if down_way(workspace.config.down).change:
            state.public = {stream: start_public(state.exact(stream).size) for stream in heads}
        return state

    def exact(self, stream: str) -> np.ndarray:
        """What the clients of a stream should get, float32 ``[n]``: the shared segments, then the head."""
        return np.concatenate([self.shared, self.heads[stream]])

    def confirm(self, joined: Mapping[int, int]) -> None:
        """Take note of clients (partition -> version) that hold less than they confirmed: they are new."""
        self.held = {client: min(version, joined.get(client, 0)) for client, version in self.held.items()}

    def publish(self, workspace: Workspace) -> None:
        """Let ``public`` follow a round that has changed ``shared`` and ``heads``."""
        codec = down_way(workspace.config.down).codec
        terms = {
            workspace.stream_of(client): workspace.down_terms(client, self.round)
            for client in range(workspace.config.clients)
        }
        self.public = {
            stream: advance(public, self.exact(stream), terms[stream], codec)
            for stream, public in self.public.items()
        }
