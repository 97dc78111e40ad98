"""Following a run on a SuperLink: where it is, how it really ended, and one that was started again."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import superlink
from experiments.superlink import run_config_toml
from fedmask.config import RunConfig, from_dict
from fedmask.errors import ConfigError, FederationError
from server.record import FOLDER_LINE

STARTED = "Successfully started run 77"


@pytest.fixture
def config() -> RunConfig:
    return from_dict({"tasks": [{"name": "bbc", "clients": 2}]})


def test_an_address_needs_no_file_of_flower_s(tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    with pytest.raises(ConfigError, match="expected a file, found nothing at"):
        superlink._connect("hub.example.org:8000", authority, tmp_path)
    authority.write_text("x")
    where, home = superlink._connect("hub.example.org:8000", authority, tmp_path)
    table = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"][where[0]]
    assert table == {"address": "hub.example.org:8000", "root-certificates": str(authority)}
    assert home == {"FLWR_HOME": str(tmp_path)}
    superlink._connect("[::1]:8000", None, tmp_path)
    assert "insecure = true" in (tmp_path / "config.toml").read_text()
    with pytest.raises(ConfigError, match="expected --connection HOST:PORT with it"):
        superlink._connect("site", authority, tmp_path)


def test_a_local_superlink_is_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for home in ("a", "b"):
        monkeypatch.setenv("FLWR_HOME", home)
        ports.add(superlink._own_port())
        assert superlink._own_port() in ports
    assert len(ports) == 2
    assert "39091" not in ports
    monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "1234")
    assert superlink._own_port() == "1234"


def test_the_run_config_says_whether_to_go_on(config: RunConfig) -> None:
    assert tomllib.loads(run_config_toml(config)) == {"config": config.model_dump_json()}
    assert tomllib.loads(run_config_toml(config, True))["resume"] is True


Answers = Callable[[list[str], list[tuple[str, dict[str, int]]]], list[list[str]]]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Stands in for flwr: what a second look at the log says, and how the run is doing at each look."""

    def prepare(again: list[str], looks: list[tuple[str, dict[str, int]]]) -> list[list[str]]:
        asked: list[list[str]] = []

        def follow(words: list[str], *rest: object) -> tuple[int, list[str]]:
            asked.append([*words, str(rest[-1])])
            return 0, again

        monkeypatch.setattr(superlink, "_follow", follow)
        monkeypatch.setattr(superlink, "_final_status", lambda *_: looks.pop(0))
        return asked

    return prepare


def test_a_log_that_breaks_off_is_followed_again(answers: Answers, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"flower_run": 77}))
    (tmp_path / "summary.json").write_text(json.dumps({"rounds": 3}))
    whole = ["round 0", "round 1", f"{FOLDER_LINE} {tmp_path} on hub"]
    asked = answers(whole, [("running", {}), ("finished:completed", {"inbound": 5, "outbound": 6})])
    run = superlink._end_of(1, [STARTED, "round 0"], [], {}, None)
    assert asked == [["log", "77", "2"]]  # the two lines that were shown are not shown again
    assert (run.folder, run.host, run.summary) == (tmp_path, "hub", {"rounds": 3})
    assert json.loads((tmp_path / "wire.json").read_text())["inbound"] == 5


@pytest.mark.parametrize("status", ["finished:completed", "finished:failed"])
def test_a_run_that_ended_while_nobody_could_follow_it(answers: Answers, tmp_path: Path, status: str) -> None:
    """The SuperLink was started again, and at the first look after it the run is over."""
    completed = status == "finished:completed"
    last = f"{FOLDER_LINE} {tmp_path} on hub" if completed else "fedmask.errors.DataError: no rows"
    asked = answers(["round 0", "round 1", last], [(status, {})])
    if completed:
        assert superlink._end_of(1, [STARTED, "round 0"], [], {}, None).folder == tmp_path
    else:
        with pytest.raises(FederationError, match="ended as finished:failed: DataError: no rows"):
            superlink._end_of(1, [STARTED, "round 0"], [], {}, None)
    assert asked == [["log", "77", "2"]]


def test_the_folder_of_another_run_is_not_taken_for_this_one_s(answers: Answers, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"flower_run": 76}))
    (tmp_path / "summary.json").write_text("{}")
    answers([], [("finished:completed", {})])
    run = superlink._end_of(0, [STARTED, f"{FOLDER_LINE} {tmp_path} on hub"], [], {}, None)
    assert run.summary is None


def test_a_superlink_that_never_answers_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "_FLWR", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(superlink, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(superlink, "_SETTLE_SECONDS", 0.0)
    assert superlink._final_status("77", [], {}) == ("unknown (no answer)", {})


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped", "unknown (no answer)"])
def test_a_run_that_did_not_complete_is_an_error(answers: Answers, status: str) -> None:
    answers([], [(status, {})])
    lines = [STARTED, "fedmask.errors.ConfigError: nothing there"]
    with pytest.raises(FederationError, match=r"run 77 ended as .*: ConfigError: nothing there"):
        superlink._end_of(0, lines, [], {}, None)
