"""The server's own misfortunes: killed at any moment, a full disk, a folder that cannot be written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.app import make_client_app
from experiments.engines import run_inprocess
from experiments.flower_app import _report
from experiments.inprocess import _node_id
from experiments.runs import read_run
from experiments.states import FOLDER
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError
from server.observer import Silent
from server.overlap import measured_unions
from server.record import unfinished
from server.resume import PREVIOUS, STATE
from tests.apps.fakes import quick_app
from tests.apps.grids import read_rows
from tests.apps.test_resume import PowerCut, assert_aborted_as_sent, assert_same, cut, quick

MakeConfig = Callable[..., RunConfig]
# By client: how many kills, in a run of how many rounds (which they must not outlive), with which settings.
KILLS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "quick": (20, 40, {"server": {"strategy": "fedadam"}}),
    "real": (10, 14, {"up": "int4+ef", "down": "int4+delta"}),
}


@pytest.fixture
def make_config(make_config: MakeConfig) -> MakeConfig:
    """Little to score."""
    return partial(make_config, eval_rows=2)


# One process loads everything and forks a child for each attempt: only so are 30 attempts affordable.
_LOOP = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # no threads that a fork would lose
from experiments.engines import run_inprocess
from fedmask.config import from_json
from fedmask.workspace import get_workspace
from server.observer import Silent
from server.record import is_run
from clients.app import make_client_app
from tests.apps.fakes import quick_app

config, kills = from_json(sys.stdin.read()), int(sys.argv[1])
make_app, longest = {"quick": (quick_app, 0.015), "real": (make_client_app, 0.04)}[sys.argv[2]]
folder = Path(config.runs_dir) / config.name
luck = random.Random(20)
warm = config.model_copy(update={"name": "warm", "rounds": 1})
run_inprocess(warm, client_evaluation=False, make_app=make_app)
for task in get_workspace(config).tasks:
    get_workspace(config).model(task)

class Tells(Silent):
    def __init__(self, pipe):
        self.pipe = pipe
    def on_reply(self, client):
        os.write(self.pipe, b".")
    def on_round_start(self, round, clients):
        os.write(self.pipe, b".")
    def on_round_end(self, row):
        os.write(self.pipe, b".")

def attempt(events, seconds):
    existing = "resume" if is_run(folder) else "overwrite"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            told = Tells(write)
            run_inprocess(config, told, existing=existing, client_evaluation=False, make_app=make_app)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    seen = 0
    while events is None or seen < events:
        got = os.read(read, 1 if events is not None else 4096)
        if not got:
            break
        seen += len(got)
    if events is not None:
        time.sleep(seconds)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _, status = os.waitpid(child, 0)
    os.close(read)  # not before: the child's next word would end it otherwise
    return os.WIFSIGNALED(status), status

killed = 0
while killed < kills:
    # Joining takes one event a client and one more, a round as many and two: anywhere in or between rounds.
    died, status = attempt(luck.randint(1, 14), luck.random() * longest)
    if not died:
        sys.exit(f"an attempt ended by itself: status {status}")
    killed += 1
died, status = attempt(None, 0)
sys.exit(f"the last attempt failed: {status}" if died or status else 0)
"""


@pytest.mark.parametrize("client", KILLS)
def test_killed_thirty_times_and_still_the_same(make_config: MakeConfig, client: str) -> None:
    """kill -9 at random moments: the same vector, rounds and bytes. Real clients carry residuals besides."""
    kills, rounds, settings = KILLS[client]
    config = make_config(clients=(3, 1), rounds=rounds, **settings)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, str(kills), client],
        input=config.model_dump_json(),
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
        capture_output=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = Path(config.runs_dir) / config.name
    make_app = quick_app if client == "quick" else make_client_app
    whole = without_evaluation(config.model_copy(update={"name": "whole"}), make_app)
    assert_same(folder, whole)
    ledger = read_rows(folder, "ledger")
    aborted = [row for row in ledger if row["status"] == "aborted"]
    # Every broken round is there with what went down; what came up is what had come.
    broken = assert_aborted_as_sent(folder, whole)
    sent = {(number, one) for number, one, way in broken if way == "down"}
    # As many as had come: all of them where every kill fell between a last reply and the saved state.
    assert {(number, one) for number, one, way in broken if way == "up"} <= sent
    assert sent == {(number, one) for number, _one in sent for one in range(4)}
    record = json.loads((folder / "config.json").read_text())
    assert record["resumed"] and all(0 <= one["after_round"] <= rounds for one in record["resumed"])
    assert {row["kind"] for row in aborted} <= {"train", "mask"}  # joining again counts too
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def without_evaluation(config: RunConfig, make_app: Any) -> Path:
    """The same run with nothing happening to it; scored with one thread, as the killed one is."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return run_inprocess(config, client_evaluation=False, make_app=make_app).folder
    finally:
        torch.set_num_threads(threads)


class AtRound(Silent):
    """Does something as a round begins."""

    def __init__(self, round: int, deed: Callable[[], None]) -> None:
        self.round, self.deed = round, deed

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        if round == self.round and clients:
            self.deed()


@contextmanager
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Gives a function that limits every file of this process to some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("ways", "file"),
    [({}, STATE), ({"up": "int4+ef", "down": "int4+delta"}, f"{FOLDER}/{_node_id(0)}.json")],
    ids=["the server's state", "a client's"],
)
def test_a_full_disk_ends_the_run_in_one_line_and_loses_no_round(
    make_config: MakeConfig, ways: dict[str, str], file: str
) -> None:
    """The device /dev/full, where a state of round 2 would be written: no space left."""
    whole = quick(make_config(name="whole", rounds=3, **ways)).folder
    config = make_config(rounds=3, **ways)
    folder = Path(config.runs_dir) / config.name
    deed = AtRound(2, lambda: (folder / (file + ".part")).symlink_to("/dev/full"))
    with pytest.raises(FederationError, match=r"tiny: cannot be written \(No space left on device\)"):
        quick(config, deed)
    assert not list(folder.rglob("*.part"))
    quick(config, existing="resume")
    assert_same(folder, whole)
    assert json.loads((folder / "config.json").read_text())["resumed"][0]["after_round"] == 1


def test_a_disk_that_is_full_after_the_summary_loses_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What only adds to a run that is complete: the overlap in its summary, and the report."""
    config = make_config()
    folder = Path(config.runs_dir) / config.name

    def full(*given: Any) -> Any:
        for name in ("summary.json.part", "report.md.new"):
            (folder / name).symlink_to("/dev/full")
        return measured_unions(*given)

    monkeypatch.setattr("server.app.measured_unions", full)
    run = quick(config)
    assert json.loads((folder / "summary.json").read_text())["notes"] == []
    assert run.summary["notes"] == ["the summary's last version was not written (No space left on device)"]
    assert not (folder / "summary.json.part").is_symlink()
    _report(run)
    assert "No space left on device" in caplog.messages[-1]
    assert f"it is written by: fedmask report {folder}" in caplog.messages[-1]
    (folder / "report.md.new").unlink(missing_ok=True)
    _report(run)
    assert (folder / "report.md").is_file()


@pytest.mark.parametrize("place", ["Journal", "save_state"])
def test_a_run_that_broke_off_before_its_first_state_begins_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """With nothing but ``config.json``, and with round 0 and its messages."""
    whole = quick(make_config(name="whole")).folder
    config = make_config()
    folder = Path(config.runs_dir) / config.name

    def power_cut(*_given: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(f"server.app.{place}", power_cut)
        quick(config)
    assert (folder / "rounds.jsonl").exists() == (place == "save_state")
    assert unfinished(config) == config.name
    with pytest.raises(ConfigError, match=r"was started with density = 0\.02, found 0\.5"):
        quick(make_config(density=0.5), existing="resume")
    quick(config, existing="resume")
    assert_same(folder, whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_whose_states_were_removed_does_not_begin_again(make_config: MakeConfig) -> None:
    """It has rounds to lose."""
    config = make_config()
    folder = cut(config, "end", 1)
    for name in (STATE, PREVIOUS):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"cannot be resumed \(state\.safetensors: no such file"):
        quick(config, existing="resume")


def test_half_a_letter_at_the_end_of_the_rounds(make_config: MakeConfig) -> None:
    whole = quick(make_config(name="whole", rounds=3)).folder
    config = make_config(rounds=3)
    folder = cut(config, "reply", 3)
    with (folder / "rounds.jsonl").open("ab") as file:
        file.write('{"round": 3, "note": "l\u00f6'.encode()[:-1])
    with pytest.raises(ConfigError, match=r"rounds\.jsonl:4: expected a JSON object a line"):
        read_run(folder, finished=False)
    quick(config, existing="resume")
    assert_same(folder, whole)


@pytest.mark.parametrize("name", ["rounds.jsonl", "ledger.jsonl"])
def test_a_line_that_was_half_written_is_written_again(make_config: MakeConfig, name: str) -> None:
    """A file that may not grow any further: half a line, the error, and a run that goes on."""
    whole = quick(make_config(name="whole", rounds=3)).folder
    config = make_config(rounds=3)
    folder = Path(config.runs_dir) / config.name
    with file_size_limit() as limit:

        def short() -> None:
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            limit(sizes[name] + 40 if name == "rounds.jsonl" else max(sizes.values()) + 40)

        with pytest.raises(FederationError, match=r"cannot be written \(File too large\)"):
            quick(config, AtRound(2, short))
    quick(config, existing="resume")
    assert_same(folder, whole)


# Root may write anywhere, so it becomes nobody; all is imported before, from places that nobody may not see.
_AS_NOBODY = """
import os, sys
from experiments.engines import run_inprocess
from fedmask.config import from_json
from fedmask.errors import ConfigError
from server.record import RunFolder
from tests.apps.fakes import quick_app

config = from_json(sys.stdin.read())
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
RunFolder(config.model_copy(update={"runs_dir": os.path.join(sys.argv[1], "open", "runs")}))
for folder in ("closed", "file"):
    try:
        run_inprocess(config.model_copy(update={"runs_dir": os.path.join(sys.argv[1], folder, "runs")}),
                      make_app=quick_app)
    except ConfigError as error:
        print(error)
"""


def test_a_folder_without_write_permission_is_said_before_anything_runs(make_config: MakeConfig) -> None:
    """Also where there is no model: nothing is loaded before. A folder that is open is not refused."""
    config = make_config(model="/nowhere")
    with tempfile.TemporaryDirectory() as name:  # pytest's own lie where only their owner may look
        place = Path(name)
        place.chmod(0o755)
        (place / "file").write_text("no folder")
        for folder, mode in (("open", 0o777), ("closed", 0o555)):
            (place / folder).mkdir()
            (place / folder).chmod(mode)
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, name],
            input=config.model_dump_json(),
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            text=True,
            capture_output=True,
            check=False,
            timeout=120,
        )
        left = sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))
    assert done.returncode == 0, done.stderr[-2000:]
    for said, found in zip(done.stdout.splitlines(), ("closed", "file"), strict=True):
        expected = f"expected a folder that can be written, found no permission in {place / found}; give"
        assert said.startswith(f"{place / found / 'runs' / config.name}: {expected}"), said
    assert left == ["closed", "file", "open"]


def test_a_folder_that_became_unwritable_is_said(make_config: MakeConfig) -> None:
    """A file where the state's would be: the same line whatever the disk's reason."""
    config = make_config(rounds=3)
    folder = Path(config.runs_dir) / config.name
    with pytest.raises(FederationError, match=r"cannot be written \(Is a directory\)"):
        quick(config, AtRound(2, lambda: (folder / (STATE + ".part")).mkdir()))
