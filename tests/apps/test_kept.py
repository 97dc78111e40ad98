"""What clients keep on their own disks: nodes that are started again, and runs that go on as new ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.app import make_client_app
from clients.kept import FOLDER, recall, remember
from clients.link import NOTES, RESIDUAL
from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig
from fedmask.flower import AFTER, bytes_record
from fedmask.shard_cache import pack_arrays, write_private
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
    assert {path.name for path in (state / FOLDER).iterdir()} == {str(FIRST), "99"}


def test_a_node_that_is_started_again_goes_on_from_its_disk(make_config: MakeConfig, state: Path) -> None:
    """All of them, before round 3: the same vector, and not a byte more."""
    whole = whole_run(make_config)
    found = run_on(Nodes(make_config(), FIRST, restart=3), engine="superlink", client_evaluation=True)
    assert_same(found.folder, whole.folder)


def test_what_is_damaged_is_left_out_and_old_runs_go(make_config: MakeConfig, state: Path) -> None:
    whole = whole_run(make_config)
    for number in range(2, 12):
        (state / FOLDER / str(number)).mkdir(parents=True)
        os.utime(state / FOLDER / str(number), (number, number))
    config = make_config()
    with pytest.raises(PowerCut):
        run_on(Nodes(config, FIRST), observer=Cuts("end", 2), engine="superlink", run_id=FIRST)
    kept = sorted(path.name for path in (state / FOLDER).iterdir())
    assert kept == sorted([*map(str, range(5, 12)), str(FIRST)])
    files = sorted((state / FOLDER / str(FIRST)).iterdir())
    assert [path.name for path in files] == ["0.safetensors", "1.safetensors", "2.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    for path, damage in zip(files, ("flip", "cut", "empty"), strict=True):
        spoil(path, damage)
    found = run_on(Nodes(config, SECOND), existing="resume", engine="superlink", run_id=SECOND)
    assert [len(row["replied"]) for row in read_rows(found.folder, "rounds")[1:]] == [3] * 4
    assert found.summary["vector_sha256"] != whole.summary["vector_sha256"]
    np.testing.assert_allclose(found.state.shared, whole.state.shared, atol=1e-2)


def context_of(run: int, *, full: bool = False) -> Context:
    """A client's, in the run of a number; ``full``: with a residual."""
    context = Context(run, 1, {}, RecordDict(), {})
    if full:
        context.state[RESIDUAL] = bytes_record(b"abcd", "before")
        context.state[NOTES] = ConfigRecord({"round": run})
    return context


def found_by(offered: Any) -> Any:
    """The round in the state of a client that is told which runs it goes on from."""
    context = context_of(77)
    recall(context, 0, ConfigRecord({AFTER: offered}))
    return dict(context.state.config_records.get(NOTES, {})).get("round")


def test_only_what_clients_kept_is_ever_removed(state: Path) -> None:
    """FEDMASK_STATE may be a folder in which other things lie, and a killed writer leaves half a file."""
    foreign = [state / "runs" / "demo", state / FOLDER / "notes", state / FOLDER / "20260101"]
    for folder in foreign:
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
        os.utime(folder, (1, 1))
    for run in range(2, 14):
        remember(context_of(run, full=True), 0)
        (state / FOLDER / str(run) / ".0.safetensors.123").write_bytes(b"half")
        os.utime(state / FOLDER / str(run), (run, run))
    assert all((folder / "summary.json").is_file() for folder in foreign)
    kept = {path.name for path in (state / FOLDER).iterdir()}
    assert kept == {"notes", "20260101", *map(str, range(6, 14))}


@pytest.mark.parametrize("gone", ["nothing can be written", "another client removes"])
def test_a_disk_costs_time_later_and_no_reply(
    state: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    if gone == "nothing can be written":
        state.write_text("a file, not a folder")
        remember(context_of(5, full=True), 0)
        return
    for run in range(2, 12):
        (state / FOLDER / str(run)).mkdir(parents=True)
    listed = list((state / FOLDER).iterdir())
    (state / FOLDER / "2").rmdir()
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(listed) if path.name == FOLDER else real(path))
    remember(context_of(50, full=True), 0)
    assert (state / FOLDER / "50" / "0.safetensors").is_file()
    assert len(list(real(state / FOLDER))) <= 9


def test_only_numbers_of_runs_are_looked_up(state: Path) -> None:
    remember(context_of(5, full=True), 0)
    assert found_by(["5"]) == 5
    for strange in ("9" * 5000, "\u0665", "../5", "-5", ""):
        assert found_by([strange]) is None
    assert found_by(["5", *["6"] * 7]) == 5
    assert found_by(["5", *["6"] * 8]) is None  # no more than are kept
    assert found_by([5]) is None


@pytest.mark.parametrize(
    "said",
    [
        {"version": 1, "arrays": {RESIDUAL: ["before"]}},
        {"version": 1, "settings": {NOTES: {"round": 5}}, "arrays": {RESIDUAL: ["another"]}},
        {"version": 1, "settings": {NOTES: {"round": None}}, "arrays": {}},
        {"version": 2, "settings": {NOTES: {"round": 5}}, "arrays": {}},
        {"settings": {NOTES: {"round": 5}}, "arrays": {}},
    ],
    ids=["no settings", "no such part", "no value", "version", "no version"],
)
def test_a_file_of_another_release_is_none(state: Path, said: dict[str, Any]) -> None:
    arrays = {f"{RESIDUAL}/before": np.zeros(4, np.uint8)}
    write_private(state / FOLDER / "5" / "0.safetensors", pack_arrays("state", said, arrays))
    context = context_of(5)
    recall(context, 0)
    assert not context.state
