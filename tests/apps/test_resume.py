"""A run that was interrupted and goes on gives what one gives that never was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from experiments.engines import run_inprocess
from experiments.inprocess import InProcessGrid
from experiments.report import render
from experiments.runs import read_run
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError
from fedmask.ledger import Ledger
from fedmask.workspace import get_workspace
from server.app import RunResult
from server.journal import JOURNAL
from server.observer import Silent
from server.resume import PREVIOUS, STATE
from tests.apps.fakes import quick_app
from tests.apps.grids import TamperedGrid, read_rows, run_on
from tests.apps.test_rejections import BAD_REPLIES

MakeConfig = Callable[..., RunConfig]
ADAM = {"strategy": "fedadam", "options": {"eta": 0.01}}
MOMENTUM = {"strategy": "fedavgm", "options": {"server_momentum": 0.5}}


class PowerCut(Exception):
    pass


class Cuts(Silent):
    """Raises at a place of a round."""

    def __init__(self, place: str, round: int) -> None:
        self.place, self.round, self.now = place, round, 0

    def _cut(self, place: str) -> None:
        if (place, self.now) == (self.place, self.round):
            raise PowerCut

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        self.now = round
        if clients:
            self._cut("start")

    def on_reply(self, client: int) -> None:
        self._cut("reply")

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        self._cut("end")


def quick(config: RunConfig, observer: Silent | None = None, existing: Any = "refuse") -> Any:
    """A run whose clients answer at once."""
    return run_inprocess(config, observer, existing=existing, make_app=quick_app)  # type: ignore[arg-type]


def cut(config: RunConfig, place: str = "start", round: int = 3) -> Path:
    """The folder of a run that was interrupted."""
    with pytest.raises(PowerCut):
        quick(config, Cuts(place, round))
    folder = Path(config.runs_dir) / config.name
    assert not (folder / "summary.json").exists()
    return folder


def totals(folder: Path) -> dict[Any, Any]:
    """The ledger's sums over completed rounds."""
    rows = Ledger.read_jsonl(folder / "ledger.jsonl")
    return Ledger(row for row in rows if row.round >= 0 and row.status != "aborted").totals(
        "round", "client", "direction", "kind", "status"
    )


def broken_and_resumed(config: RunConfig, round: int = 2, workers: int = 1) -> RunResult:
    """The run ``broken``, of real clients: stopped after a round, and brought to its end by ``workers``."""
    broken = config.model_copy(update={"name": "broken"})
    with pytest.raises(PowerCut):
        run_inprocess(broken, Cuts("end", round))
    get_workspace(broken).forget_mask()  # as in a process that starts anew
    return run_inprocess(broken.model_copy(update={"workers": workers}), existing="resume")


Way = tuple[int, int, str]


def assert_aborted_as_sent(folder: Path, whole: Path, ways: list[Way] | None = None) -> set[Way]:
    """What an interruption left of a round is in the ledger: each message at the bytes that it has elsewhere.

    ``ways``: the messages of training that must be there, if exactly these.
    """
    sizes = {
        (row["round"], row["client"], row["direction"]): (row["payload_bytes"], row["message_bytes"])
        for row in read_rows(whole, "ledger")
        if row["kind"] == "train"
    }
    rows = [row for row in read_rows(folder, "ledger") if row["status"] == "aborted"]
    found = []
    for row in rows:
        if row["kind"] == "train":
            found.append((row["round"], row["client"], row["direction"]))
            assert (row["payload_bytes"], row["message_bytes"]) == sizes[found[-1]]
    assert ways is None or found == ways
    return set(found)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run's rounds without what differs from run to run: how long things took."""
    took = {"seconds": 0}
    own = [{"mask_search": row["mask_search"] | took} if "mask_search" in row else {} for row in rows]
    return [row | took | search for row, search in zip(rows, own, strict=True)]


def assert_same(one: Path, other: Path) -> None:
    """Same vector, scores, rounds and bytes; only times may differ."""
    left, right = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    for key in (
        "vector_sha256",
        "test",
        "final_dev",
        "clients",
        "rounds",
        "steps",
        "costs",
        "overlap",
        "notes",
    ):
        assert left[key] == right[key], key
    assert timeless(read_rows(one, "rounds")) == timeless(read_rows(other, "rounds"))
    assert totals(one) == totals(other)


@pytest.mark.parametrize(
    "server", [{"clients_per_round": 3}, ADAM, MOMENTUM], ids=["fedavg", "fedadam", "fedavgm"]
)
@pytest.mark.parametrize(("place", "round"), [("start", 1), ("reply", 3), ("end", 2)])
def test_resumed_equals_uninterrupted(
    make_config: MakeConfig, server: dict[str, Any], place: str, round: int
) -> None:
    overlap = {"overlap_batches": 2 if (place, server) == ("reply", ADAM) else 0}
    whole = quick(make_config(name="whole", rounds=4, server=server, **overlap)).folder
    config = make_config(rounds=4, server=server, **overlap)
    folder = cut(config, place, round)
    assert quick(config, existing="resume").folder == folder
    assert_same(folder, whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    record = json.loads((folder / "config.json").read_text())
    assert [one["after_round"] for one in record["resumed"]] == [round - (place != "end")]


_KILLED = """
import os, signal, sys
from experiments.engines import run_inprocess
from fedmask.config import from_json
from server.journal import JOURNAL
from server.observer import Silent

class Dies(Silent):
    def on_reply(self, client):
        if self.now == 2 and client == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_round_start(self, round, clients):
        self.now = round

if __name__ == "__main__":
    run_inprocess(from_json(sys.stdin.read()), Dies())
"""


def test_a_killed_process_goes_on_from_the_command_line(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """With real training; nothing but the name is typed again."""
    config = make_config(clients=(2, 1), rounds=3, server=ADAM)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED],
        input=config.model_dump_json(),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
        capture_output=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(SystemExit) as stop:
        main(["run", "--resume", "--name", "tiny", "--runs-dir", config.runs_dir, "--json"])
    assert stop.value.code == 0
    out, err = capfd.readouterr()
    assert "going on after round 1" in err
    folder = Path(json.loads(out)["folder"])
    assert not (folder / JOURNAL).exists()
    whole = run_inprocess(make_config(clients=(2, 1), rounds=3, server=ADAM, name="whole")).folder
    assert_same(folder, whole)
    assert_aborted_as_sent(folder, whole, [(2, 0, "down"), (2, 1, "down"), (2, 2, "down"), (2, 0, "up")])
    text = render(read_run(folder))
    assert "went on after round 1" in " ".join(text.split())


def test_a_round_that_failed_is_done_again_and_its_traffic_is_kept(make_config: MakeConfig) -> None:
    config = make_config(clients=(3, 1), rounds=3, server={"min_replies": 4})
    silent = BAD_REPLIES["error"][0]
    grid = TamperedGrid(
        config, lambda c, r, reply: [silent(reply)] if (c, r) == (1, 2) else [reply], quick_app
    )
    with pytest.raises(FederationError, match="round 2"):
        run_on(grid, existing="refuse", client_evaluation=True)
    again = quick(config, existing="resume").folder
    aborted = [row for row in read_rows(again, "ledger") if row["status"] == "aborted"]
    assert {(row["round"], row["kind"]) for row in aborted} == {(2, "train")}
    assert len(aborted) == 8
    whole = quick(config.model_copy(update={"name": "whole"})).folder
    assert_same(again, whole)
    run, other = read_run(again), read_run(whole)
    from experiments.results import comparisons, traffic

    assert (comparisons(run)[0]["total"], traffic(run)) == (comparisons(other)[0]["total"], traffic(other))


@pytest.mark.parametrize("error", [PowerCut, FederationError])
def test_what_a_round_that_broke_off_has_sent_is_in_the_ledger(
    make_config: MakeConfig, error: type[BaseException]
) -> None:
    """At once, not only when the run goes on: of a round that had not entered it, and of one that had."""
    config = make_config(clients=(3, 1), rounds=3, server={"min_replies": 4})
    if error is PowerCut:
        folder = cut(config, "reply", 2)
    else:
        silent, folder = BAD_REPLIES["error"][0], Path(config.runs_dir) / config.name
        with pytest.raises(FederationError, match="round 2"):
            run_on(TamperedGrid(config, lambda c, r, reply: [silent(reply) if r == 2 else reply], quick_app))
    assert not (folder / JOURNAL).exists()
    rows = [row for row in read_rows(folder, "ledger") if row["round"] == 2]
    ways = [(row["client"], row["direction"]) for row in rows]
    assert len(ways) == len(set(ways))
    assert {(client, "down") for client in range(4)} <= set(ways)
    before = [row for row in read_rows(folder, "ledger") if row["round"] == 1]
    assert len(before) == 8


def test_twice_interrupted_and_with_more_rounds(make_config: MakeConfig) -> None:
    whole = quick(make_config(name="whole", rounds=5, server=ADAM)).folder
    config = make_config(rounds=4, server=ADAM)
    folder = cut(config, "reply", 2)
    with pytest.raises(PowerCut):
        quick(config, Cuts("reply", 4), "resume")
    quick(make_config(rounds=5, server=ADAM), existing="resume")
    assert_same(folder, whole)
    assert json.loads((folder / "config.json").read_text())["config"]["rounds"] == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_state_falls_back_to_the_one_before(make_config: MakeConfig, damage: str) -> None:
    whole = quick(make_config(name="whole", rounds=3)).folder
    config = make_config(rounds=3)
    folder = cut(config, "end", 2)
    spoil(folder / STATE, damage)
    quick(config, existing="resume")
    assert_same(folder, whole)
    record = json.loads((folder / "config.json").read_text())
    assert record["resumed"][0]["after_round"] == 1


def spoil(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
        return
    data[-5] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_cannot_be_resumed_is_refused_and_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(rounds=4)
    with pytest.raises(ConfigError, match="expected an unfinished run to resume, found none"):
        quick(config, existing="resume")
    folder = cut(config)
    before = contents(folder)
    for changes, said in (
        (
            {"train": {"steps": 2, "batch_size": 8, "max_tokens": 16, "lr": 0.25}},
            r"train\.lr = 0\.005, found 0\.25",
        ),
        ({"clients": (3, 1)}, r"tasks\[1\]\.clients = 2, found 1"),
        ({"rounds": 1}, "2 rounds are done already, found 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            quick(make_config(**{"rounds": 4, **changes}), existing="resume")
    with pytest.raises(ConfigError, match=r"found an older run; go on with it by --resume, .* --overwrite"):
        quick(config)
    record = json.loads(before["config.json"])
    for key in ("checkpoint_digest", "facts"):
        (folder / "config.json").write_text(json.dumps(record | {key: "other"}))
        with pytest.raises(ConfigError, match=f"{key} in config.json are not those found now"):
            quick(config, existing="resume")
    (folder / "config.json").write_bytes(before["config.json"])
    shutil.copy(folder / "rounds.jsonl", tmp_path / "rounds.jsonl")
    (folder / "rounds.jsonl").write_text("")
    with pytest.raises(
        ConfigError, match=r"cannot be resumed .*ends before.*; start it again with --overwrite"
    ):
        quick(config, existing="resume")
    shutil.copy(tmp_path / "rounds.jsonl", folder / "rounds.jsonl")
    assert contents(folder) == before
    for name in (STATE, PREVIOUS):
        spoil(folder / name, "flip")
    with pytest.raises(ConfigError, match=f"{STATE}: damaged file .*{PREVIOUS}: damaged file"):
        quick(config, existing="resume")
    quick(config, existing="overwrite")
    with pytest.raises(ConfigError, match="the run is finished, so there is nothing to resume"):
        quick(config, existing="resume")


def test_nothing_is_cut_before_the_clients_are_there(make_config: MakeConfig) -> None:
    config = make_config(rounds=3)
    folder = cut(config)
    before = contents(folder)

    class Empty(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            return []

    with pytest.raises(FederationError, match="expected 5 nodes"):
        run_on(Empty(config), existing="resume", node_timeout=0.1)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume"], "runs/run: expected a run, found none"),
        (["--resume", "--overwrite", "--config", "CONFIG"], "exclude each other"),
        (["--resume", "--root-certificates", "ca.crt", "--config", "CONFIG"], "is for --engine superlink"),
    ],
)
def test_the_command_line_says_what_holds(
    words: list[str], said: str, make_config: MakeConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": make_config().model_dump(mode="json")}))
    with pytest.raises(SystemExit) as stop:
        main(["run", *(str(path) if word == "CONFIG" else word for word in words)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
