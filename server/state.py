"""What the rounds work on: the state between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedmask.channel import Public, Terms, advance, change_way, down_way, start_public
from fedmask.positions import ByHolders, Positions
from fedmask.sharing import common_size, travelling
from fedmask.views import View
from fedmask.workspace import Workspace
from server.counted import Counted


@dataclass
class RunState:
    """All that the next round depends on, besides the strategy's own state (``ServerStrategy.state``).

    ``shared`` float32 ``[s]``, ``heads`` float32 by task: changes from the reference, zeros at first. What
    tasks do not share stands with the heads; heads that stay with the clients are empty
    (``server.sharing``). This is the exact state: what is scored, averaged and exported. ``public``: by
    stream, what the clients can hold of it, where changes are sent down (``fedmask.channel.public``).
    ``held``: by client, the version that it confirmed last; 0, the pre-trained model, for those not named.
    ``holders``: clients' own masks, where they have them; ``shared`` then, and with a mask that moves,
    begins with the values at the known positions. ``counted``: whose replies were used, where clients need to
    know it.
    """

    round: int
    shared: np.ndarray
    heads: dict[str, np.ndarray]
    public: dict[str, Public] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    holders: ByHolders = field(default_factory=ByHolders)
    counted: Counted = field(default_factory=Counted)

    @classmethod
    def start(cls, workspace: Workspace) -> RunState:
        """The state before round 1."""
        sharing = workspace.config.server.sharing
        layouts = {task: travelling(workspace.layout(task), sharing) for task in workspace.tasks}
        shared = common_size(next(iter(layouts.values())), sharing)
        heads = {task: np.zeros(layout.size - shared, np.float32) for task, layout in layouts.items()}
        state = cls(0, np.zeros(shared, np.float32), heads)
        if down_way(workspace.config.down).change or workspace.config.has_views:
            state.public = {stream: start_public(state.exact(stream).size) for stream in heads}
        return state

    def exact(self, stream: str) -> np.ndarray:
        """What the clients of a stream should get, float32 ``[n]``: the shared segments, then the head."""
        return np.concatenate([self.shared, self.heads[stream]])

    def positions(self, workspace: Workspace) -> Positions:
        """Which entries the run has trained, where that is not one fixed mask."""
        return self.holders if workspace.config.mask_schedule == "fixed" else workspace.positions

    def view(self, workspace: Workspace) -> View | None:
        """What a model carries that is scored at this state; None with one fixed mask."""
        if not workspace.config.has_views:
            return None
        return View(workspace.no_mask, self.positions(workspace).known(self.round))

    def confirm(self, joined: Mapping[int, int]) -> None:
        """Take note of clients (partition -> version) that hold something else than they confirmed.

        Less: they are new. More than this state: it comes from a round that is done again, and -1 asks for
        the whole vector.
        """
        for client, version in joined.items():
            if version > self.round:
                self.held[client] = -1
            elif version < self.held.get(client, 0):
                self.held[client] = version

    def publish(self, workspace: Workspace, factors: np.ndarray | None = None) -> None:
        """Let ``public`` follow a round that has changed ``shared`` and ``heads``.

        ``factors``: float32, flat, what the residual has grown by (``Combined``).
        """
        codec, terms = down_way(workspace.config.down).codec, {}
        if workspace.config.has_views:
            codec = change_way(workspace.config.down).codec
        for client in range(workspace.config.clients):
            if (stream := workspace.stream_of(client)) not in terms:
                terms[stream] = self._terms(workspace, client, factors)
        self.public = {
            stream: advance(public, self.exact(stream), terms[stream], codec)
            for stream, public in self.public.items()
        }

    def _terms(self, workspace: Workspace, client: int, factors: np.ndarray | None) -> Terms:
        """What the values of the change that leads to this state mean."""
        if not workspace.config.has_views:
            return workspace.change_terms(client, self.round, factors)
        return workspace.union_terms(client, self.positions(workspace)).change(self.round)
