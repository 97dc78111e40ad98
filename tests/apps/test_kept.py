"""What clients keep on their own disks: nodes that are started again, and runs that go on as new ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr.app import Context, Message

from clients.app import make_client_app
from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig
from server.app import RunResult
from tests.apps.grids import read_rows, run_on
from tests.apps.test_resume import Cuts, PowerCut, assert_same, spoil

MakeConfig = Callable[..., RunConfig]
FIRST, SECOND = 2**63 + 5, 2**64 - 2


@pytest.fixture
def make_config(make_config: MakeConfig) -> MakeConfig:
    """With all that clients can keep: received vectors and residuals."""
    coarse = {"up": "int4+ef", "down": "int4+delta", "eval_rows": 2}
    return partial(make_config, clients=(2, 1), rounds=4, **coarse)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FEDMASK_STATE."""
    monkeypatch.setenv("FEDMASK_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


class Nodes(InProcessGrid):
    """A grid whose nodes know the run by a number, as a SuperLink's do; before ``restart`` they forget."""

    def __init__(self, config: RunConfig, run: int, restart: int = 0) -> None:
        def numbered(settings: RunConfig) -> Any:
            app = make_client_app(settings)

            def answer(message: Message, context: Context) -> Message:
                context.run_id = run
                return app(message, context)

            return answer

        super().__init__(config, 1, numbered)
        self.restart, self.round = restart, 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.round += sent[0].metadata.message_type == "train"
        if self.round == self.restart:
            for node in self._partitions:
                self.states.put(node, None)
        return super().push_messages(sent)


def whole_run(make_config: MakeConfig, **changes: Any) -> RunResult:
    config = make_config(name="whole", **changes)
    return run_on(InProcessGrid(config), engine="superlink", client_evaluation=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"server": {"sharing": "local-heads"}},
        {"method": "fish", "placement": "client", "scores": {"samples": 8}},
    ],
    ids=["one mask", "own heads", "own masks"],
)
def test_a_resumed_run_s_clients_find_what_they_kept(
    make_config: MakeConfig, state: Path, changes: dict[str, Any]
) -> None:
    """The server is killed inside a round, and Flower knows the run that goes on by another number."""
    whole = whole_run(make_config, **changes)
    config = make_config(**changes)
    with pytest.raises(PowerCut):
        run_on(Nodes(config, FIRST), observer=Cuts("reply", 3), engine="superlink", run_id=FIRST)
    resumed = {"existing": "resume", "engine": "superlink", "client_evaluation": True}
    with pytest.raises(PowerCut):  # and once more, before anything was kept under the second number
        run_on(Nodes(config, SECOND), observer=Cuts("start", 3), run_id=SECOND, **resumed)
    found = run_on(Nodes(config, 99), run_id=99, **resumed)
    assert_same(found.folder, whole.folder)
    assert {path.name for path in (state / "runs").iterdir()} == {str(FIRST), "99"}


def test_a_node_that_is_started_again_goes_on_from_its_disk(make_config: MakeConfig, state: Path) -> None:
    """All of them, before round 3: the same vector, and not a byte more."""
    whole = whole_run(make_config)
    found = run_on(Nodes(make_config(), FIRST, restart=3), engine="superlink", client_evaluation=True)
    assert_same(found.folder, whole.folder)


def test_what_is_damaged_is_left_out_and_old_runs_go(make_config: MakeConfig, state: Path) -> None:
    whole = whole_run(make_config)
    for number in range(2, 12):
        (state / "runs" / str(number)).mkdir(parents=True)
        os.utime(state / "runs" / str(number), (number, number))
    config = make_config()
    with pytest.raises(PowerCut):
        run_on(Nodes(config, FIRST), observer=Cuts("end", 2), engine="superlink", run_id=FIRST)
    kept = sorted(path.name for path in (state / "runs").iterdir())
    assert kept == sorted([*map(str, range(5, 12)), str(FIRST)])
    files = sorted((state / "runs" / str(FIRST)).iterdir())
    assert [path.name for path in files] == ["0.safetensors", "1.safetensors", "2.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    for path, damage in zip(files, ("flip", "cut", "empty"), strict=True):
        spoil(path, damage)
    found = run_on(Nodes(config, SECOND), existing="resume", engine="superlink", run_id=SECOND)
    assert [len(row["replied"]) for row in read_rows(found.folder, "rounds")[1:]] == [3] * 4
    assert found.summary["vector_sha256"] != whole.summary["vector_sha256"]
    np.testing.assert_allclose(found.state.shared, whole.state.shared, atol=1e-2)
