"""What each client is sent: the same bytes for all that receive the same vector and hold the same version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import RecordDict

from fedmask.channel import down_way, frame_for, whole_frame
from fedmask.flower import update_content
from fedmask.rng import rng_for
from fedmask.workspace import Workspace
from server.state import RunState


def down_contents(
    workspace: Workspace, state: RunState, round: int, held: Mapping[int, int], clients: Sequence[int]
) -> dict[int, RecordDict]:
    """Each client's message, shared where it is the same. ``held``: by client, the version that it holds."""
    made: dict[tuple[str, int], RecordDict] = {}
    changes = down_way(workspace.config.down).change
    out = {}
    for client in clients:
        key = workspace.stream_of(client), held.get(client, 0) if changes else 0
        if key not in made:
            made[key] = update_content(_frame(workspace, state, client, *key), round)
        out[client] = made[key]
    return out


def _frame(workspace: Workspace, state: RunState, client: int, stream: str, held: int) -> bytes:
    way, terms = down_way(workspace.config.down), workspace.down_terms(client, state.round)
    if way.change:
        return frame_for(state.public[stream], held, terms)
    generator = rng_for(workspace.config.seed, state.round, -1, f"codec/{stream}")
    return whole_frame(state.exact(stream), state.round, terms, way.codec, generator)
