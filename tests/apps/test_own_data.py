"""Clients with rows of their own: files that only they read, columns as they call them, the task's labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flwr.app import Context, Error, Message

from clients.app import make_client_app
from experiments.inprocess import InProcessGrid
from experiments.options import build_config, parse_task
from experiments.runs import read_run
from fedmask.config import RunConfig, TaskConfig, from_dict
from fedmask.errors import ConfigError, DataError
from fedmask.tasks.own import OwnData, own_data, own_rows
from fedmask.workspace import get_workspace
from server.observer import Silent
from tests.apps.grids import TamperedGrid, read_rows, run_on
from tests.apps.test_rejections import _again

MakeConfig = Callable[..., RunConfig]
WORDS = ["good", "fine", "bad", "poor"]


def _rows(client: int, count: int = 24) -> list[tuple[str, str]]:
    return [(f"{WORDS[(row + client) % 4]} number {row}", "up" if (row + client) % 4 < 2 else "down")
            for row in range(count)]  # fmt: skip


def _write(path: Path, rows: list[tuple[str, str]], text: str = "text", label: str = "label") -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({label: said, text: words}) + "\n" for words, said in rows))
        return
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([(text, label), *rows])


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Three clients with a file each, which are named by the environment."""
    for client in range(3):
        _write(tmp_path / f"rows-{client}.csv", _rows(client))
    _write(tmp_path / "dev.csv", _rows(7, 40))
    monkeypatch.setenv("FEDMASK_DATA", str(tmp_path / "rows-{client}.csv"))
    task = {"name": "own", "own_data": True, "clients": 3, "text": ["text"], "label": "label",
            "labels": ["up", "down"], "dev": str(tmp_path / "dev.csv")}  # fmt: skip
    return make_config(tasks=[task])


def test_a_run_over_clients_own_files(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_on(InProcessGrid(config))
    done = read_run(run.folder)
    assert [part["train_rows"] + part["held_out_rows"] for part in done.facts["partitions"]] == [24, 24, 24]
    assert done.rounds[-1]["replied"] == [0, 1, 2]
    assert set(run.summary["test"]["own"]) == {"loss", "accuracy"}
    from experiments.report import write_report

    assert "| 2 | own | 22 | 2 |" in write_report(run.folder).read_text()
    # Other formats and other names for the columns are the client's affair.
    for client in range(3):
        _write(tmp_path / f"same-{client}.jsonl", _rows(client), "words", "verdict")
    monkeypatch.setenv("FEDMASK_DATA", str(tmp_path / "same-{client}.jsonl"))
    monkeypatch.setenv("FEDMASK_TEXT", "words")
    monkeypatch.setenv("FEDMASK_LABEL", "verdict")
    again = run_on(InProcessGrid(config.model_copy(update={"name": "again"})))
    assert again.summary["vector_sha256"] == run.summary["vector_sha256"]


def test_a_client_whose_labels_do_not_fit_is_refused_with_both_lists(
    config: RunConfig, tmp_path: Path
) -> None:
    _write(tmp_path / "rows-1.csv", [*_rows(1), ("who knows", "sideways")])
    run = run_on(InProcessGrid(config))
    rows = read_rows(run.folder, "rounds")
    (lost,) = rows[0]["rejected"]
    assert lost["client"] == 1
    assert "expected the task's labels (up, down), found 'sideways'" in lost["reason"]
    assert "the file's labels: down, sideways, up" in lost["reason"]
    assert rows[-1]["replied"] == [0, 2]


class Files(Silent):
    """Client 1's file is empty in round 2, gone in round 3, and back in round 4."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, file.read_text()

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        if round == 2:
            self.file.write_text(self.rows.splitlines()[0] + "\n")
        elif round == 3:
            self.file.unlink()
        elif round == 4:
            self.file.write_text(self.rows)


def test_a_client_whose_rows_are_gone_says_so(config: RunConfig, tmp_path: Path) -> None:
    """Each message meets a process that reads the file anew; the mean is of the others."""
    count = 0

    def anew(config: RunConfig) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            nonlocal count
            count += 1
            other = {"name": f"process-{count}"} if context.node_config["partition-id"] == 1 else {}
            return make_client_app(config.model_copy(update=other))(message, context)

        return app

    config = config.model_copy(update={"rounds": 4})
    grid = InProcessGrid(config, make_app=anew)  # type: ignore[arg-type]
    run = run_on(grid, observer=Files(tmp_path / "rows-1.csv"))
    rows = read_rows(run.folder, "rounds")
    assert [row["replied"] for row in rows[1:]] == [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2]]
    (empty,), (gone,) = rows[2]["rejected"], rows[3]["rejected"]
    file = f"DataError: task 'own', client 1: file {tmp_path / 'rows-1.csv'}"
    assert empty == {"client": 1, "reason": f"{file}: expected rows, found none"}
    assert gone["client"] == 1
    assert gone["reason"].startswith(f"{file}: expected a file, found nothing there; check the name")

    def silent(client: int, number: int, reply: Message) -> list[Message]:
        said = Error(code=2, reason="nothing")
        return [_again(reply, said) if client == 1 and number in (2, 3) else reply]

    other = run_on(TamperedGrid(config.model_copy(update={"name": "silent"}), silent))
    assert run.summary["vector_sha256"] == other.summary["vector_sha256"]


def test_a_client_may_not_claim_more_rows_than_the_task_allows(config: RunConfig) -> None:
    task = config.tasks[0].model_copy(update={"most_rows": 23})
    with pytest.raises(Exception, match=r"expected at most 23 rows \(tasks\.most_rows\), found \(22, 2\)"):
        run_on(InProcessGrid(config.model_copy(update={"tasks": (task,)})))


def test_the_server_reads_no_row_of_a_client(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.facts import run_record
    from server.rounds import most_claims

    workspace = get_workspace(config.model_copy(update={"name": "server"}))
    monkeypatch.delenv("FEDMASK_DATA")
    workspace.use_precision("fp32")
    record = run_record(workspace, "test", {})
    assert [part["train_rows"] for part in record["facts"]["partitions"]] == [0, 0, 0]
    assert most_claims(workspace, {1: (20, 2)})[1].rows == 20
    assert len(workspace.sample("own")) == len(workspace.central("own", "dev")) > 0
    assert len(workspace.central("own", "dev")) + len(workspace.central("own", "test")) == 40
    workspace.use_own_data(own_data({}))
    with pytest.raises(DataError, match="client 0 has no data of its own; start its SuperNode with"):
        workspace.shard(0)


def test_where_a_client_s_file_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDMASK_DATA", "elsewhere.csv")
    monkeypatch.setenv("FEDMASK_LABEL", "grade")
    assert own_data({"data": "here.csv"}) == OwnData("here.csv", "", "grade")
    task = TaskConfig(
        name="own", own_data=True, clients=1, text=("a", "b"), label="c", labels=("x", "y"), dev="d"
    )
    with pytest.raises(DataError, match=r"expected 2 text columns as in the task \(a\+b\), found words"):
        own_rows(task, 0, OwnData("rows.csv", "words"))
    pair = tmp_path / "pair.csv"
    pair.write_text("one,two,mark\nhow,why,y\n")
    rows = own_rows(task, 0, OwnData(str(pair), "one+two", "mark"))
    assert rows[0] == {"text": "how", "text_pair": "why", "label": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": []}, "labels: own_data needs two different ones"),
        ({"labels": ["x", "x"]}, "labels: own_data needs two different ones"),
        ({"source": "rows.csv"}, "leave source and partition out"),
        ({"dev": ""}, "it needs text, label, and dev"),
        ({"metric": "spearman"}, "labels: a regression"),
        ({"own_data": False}, "labels: only for own_data"),
    ],
)
def test_settings_that_do_not_fit_together(changes: dict[str, object], said: str) -> None:
    task = {"name": "own", "own_data": True, "clients": 1, "text": "a", "label": "c", "labels": ["x", "y"],
            "dev": "dev.csv"}  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        from_dict({"tasks": [task | changes]})


def test_the_command_line_can_say_it() -> None:
    spec = "name=own,own_data=true,clients=2,text=a+b,label=c,labels=no+yes,dev=dev.csv,most_rows=9"
    assert parse_task(spec)["labels"] == ["no", "yes"]
    (task,) = build_config(None, {}, [spec]).tasks
    assert (task.own_data, task.labels, task.most_rows) == (True, ("no", "yes"), 9)


def test_rows_from_the_disk_give_the_same_run_and_damage_is_read_anew(
    config: RunConfig, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmask.workspace import _workspace

    for name, settings in (("own", config), ("dealt", make_config(name="dealt"))):
        expected = run_on(InProcessGrid(settings)).summary["vector_sha256"]
        cache = tmp_path / f"cache-{name}"
        monkeypatch.setenv("FEDMASK_CACHE", str(cache))
        for turn in range(3):
            _workspace.cache_clear()  # as a process that starts anew
            assert run_on(InProcessGrid(settings)).summary["vector_sha256"] == expected
            files, (mask,) = sorted(cache.glob("shards/*")), sorted(cache.glob("masks/*"))
            assert len(files) == settings.clients
            assert {path.stat().st_mode & 0o777 for path in (mask, *files)} == {0o600}
            folders = (cache, cache / "shards", cache / "masks")
            assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
            if turn == 1:
                files[0].write_bytes(files[0].read_bytes()[:-3])
                for path in (files[1], mask):
                    data = path.read_bytes()
                    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        monkeypatch.delenv("FEDMASK_CACHE")


def test_cached_rows_are_those_of_what_they_depend_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmask import shard_cache

    monkeypatch.setenv("FEDMASK_CACHE", str(tmp_path / "cache"))
    (task,), place = config.tasks, own_data({})
    first = shard_cache.cache_file(config, task, 0, place)
    other = config.model_copy(update={"seed": 9})
    assert first is not None
    assert len({first, shard_cache.cache_file(other, task, 0, place),
                shard_cache.cache_file(config, task, 1, place)}) == 3  # fmt: skip
    _write(tmp_path / "rows-0.csv", [*_rows(0), ("one more", "up")])
    assert shard_cache.cache_file(config, task, 0, place) != first
    assert shard_cache.cache_file(config, task, 0, OwnData("nothing.csv")) is None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_cache.os, "replace", full)
    shard_cache.write_private(first, b"rows")
    assert list(first.parent.iterdir()) == []  # nothing of it is left, and nothing is raised


def test_a_client_needs_none_of_the_server_s_files(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its labels come from the settings: the server's dev rows are elsewhere."""
    moved = config.tasks[0].model_copy(update={"dev": str(tmp_path / "not here.csv")})
    workspace = get_workspace(config.model_copy(update={"tasks": (moved,), "name": "client"}))
    workspace.use_precision("fp32")
    workspace.use_own_data(own_data({}))
    size = workspace.layout("own").size
    import numpy as np

    assert workspace.local_update(0, 1, np.zeros(size, np.float32)).examples == 22
