"""What each client is sent: the same bytes for all that receive the same vector and hold the same version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import RecordDict

from fedmask.channel import down_way, frame_for, read_frame, whole_frame
from fedmask.channel.frames import WHOLE
from fedmask.flower import CONFIG, PLACES, update_content
from fedmask.positions import ByHolders, pack_positions
from fedmask.rng import rng_for
from fedmask.workspace import Workspace
from server.state import RunState

NOTHING = -1


def down_contents(
    workspace: Workspace, state: RunState, round: int, held: Mapping[int, int], clients: Sequence[int]
) -> dict[int, RecordDict]:
    """Each client's message, shared where it is the same. ``held``: by client, the version that it holds."""
    frames: dict[tuple[str, int], bytes] = {}
    made: dict[tuple[str, int, int | None], RecordDict] = {}
    if workspace.config.has_views:
        return _union_contents(workspace, state, round, held, clients)
    changes = down_way(workspace.config.down).change
    out = {}
    for client in clients:
        key = workspace.stream_of(client), held.get(client, 0) if changes else 0
        if key not in frames:
            frames[key] = _frame(workspace, state, client, *key)
        said = *key, state.counted.told(client)
        if said not in made:
            made[said] = update_content(frames[key], round, said[2])
        out[client] = made[said]
    return out


def _frame(workspace: Workspace, state: RunState, client: int, stream: str, held: int) -> bytes:
    way, terms = down_way(workspace.config.down), workspace.down_terms(client, state.round)
    if way.change:
        return frame_for(state.public[stream], held, terms)
    generator = rng_for(workspace.config.seed, state.round, -1, f"codec/{stream}")
    return whole_frame(state.exact(stream), state.round, terms, way.codec, generator)


def _union_contents(
    workspace: Workspace, state: RunState, round: int, held: Mapping[int, int], clients: Sequence[int]
) -> dict[int, RecordDict]:
    """The same where the entries differ: changes of a growing union, or the whole of it.

    Clients with masks of their own are also told what of its positions is new to them.
    """
    frames: dict[tuple[str, int], bytes] = {}
    positions = state.positions(workspace)
    out = {}
    for client in clients:
        # A version that this run has not come to (a client ahead of a state that was gone back to) is none.
        at = held.get(client, 0)
        key = workspace.stream_of(client), at if 0 <= at <= state.round else NOTHING
        if key not in frames:
            whole = workspace.union_terms(client, positions).whole(state.round)
            frames[key] = frame_for(state.public[key[0]], key[1], whole)
        out[client] = update_content(frames[key], round, state.counted.told(client))
        if isinstance(positions, ByHolders):
            steps = read_frame(frames[key]).base != WHOLE
            own = positions.masks.get(client)
            told = pack_positions(positions, max(0, key[1]), state.round, steps, own, workspace.space)
            out[client].config_records[CONFIG][PLACES] = told
    return out
