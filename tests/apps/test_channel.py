"""How vectors travel in a run: changes instead of vectors, error feedback, lost and late clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from experiments.engines import run_inprocess
from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig
from fedmask.ledger import Ledger
from fedmask.workspace import get_workspace
from server.app import RunResult
from tests.apps.fakes import quick_app
from tests.apps.grids import run_on

MakeConfig = Callable[..., RunConfig]


def quick(config: RunConfig, **options: Any) -> RunResult:
    """A run whose clients answer at once."""
    return run_inprocess(config, make_app=quick_app, **options)  # type: ignore[arg-type]


def trained(result: RunResult) -> list[tuple[int, int, str, int, str]]:
    """Round, client, direction, payload and status of each training message."""
    return [
        (row.round, row.client, row.direction, row.payload_bytes, row.status)
        for row in Ledger.read_jsonl(result.folder / "ledger.jsonl")
        if row.kind == "train"
    ]


@pytest.mark.parametrize("down", ["fp32", "fp32+delta"])
def test_changes_lead_where_the_vector_leads(make_config: MakeConfig, down: str) -> None:
    plain = quick(make_config(name="plain", rounds=3))
    other = quick(make_config(rounds=3, down=down))
    np.testing.assert_allclose(other.state.shared, plain.state.shared, atol=1e-7)
    if down == "fp32":
        np.testing.assert_array_equal(other.state.shared, plain.state.shared)


def test_the_first_change_costs_nothing(make_config: MakeConfig) -> None:
    """Version 0 is the pre-trained model, which every client has."""
    result = quick(make_config(rounds=2, down="int4+delta"))
    down = {(round, client): size for round, client, way, size, _ in trained(result) if way == "down"}
    assert {down[1, client] for client in range(5)} == {0}
    layout = get_workspace(make_config()).layout("mood")
    assert down[2, 0] == 2 + 2 * -(-layout.size // 256) + -(-layout.size // 2)


def test_all_clients_hold_the_servers_public_vector(make_config: MakeConfig) -> None:
    config = make_config(rounds=3, down="int2+delta", server={"clients_per_round": 2})
    grid = InProcessGrid(config, make_app=quick_app)  # type: ignore[arg-type]
    result = run_on(grid, client_evaluation=True)
    public = result.state.public["mood"]
    assert public.version == 3
    exact = result.state.exact("mood")
    assert 0 < np.abs(public.vector - exact).max() < np.abs(exact).max()
    assert result.summary["unscored"] == []
