"""A whole small study: what runs, what is skipped, what goes on, what fails, and what is written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import experiments.compare.runner as runner
from experiments.compare.campaign import Campaign, all_results
from experiments.compare.command import NOT_CHECKED, compare
from experiments.compare.jobs import run_all
from experiments.compare.plan import Cell
from experiments.compare.report import write_comparison
from experiments.compare.study import Study, study_from
from fedmask.errors import ConfigError, FederationError
from tests.support import save_two_tasks


def study_of(folder: Path, **changes: Any) -> Study:
    task = {"train_rows": 80, "validation_rows": 40, "reported_rows": 60, "clients": 2}
    found: dict[str, Any] = {
        "name": "small",
        "narrow": "a test",
        "seeds": [1, 2],
        "run": {
            "model": str(folder / "model"),
            "rounds": 2,
            "density": 0.05,
            "overlap_batches": 0,
            "partition": {"held_out": 0.0},
            "train": {"max_tokens": 16, "batch_size": 8, "steps": 2},
        },
        "tasks": [
            task | {"name": "mood", "train": "mood.tsv", "reported": "mood.tsv"},
            task | {"name": "topic", "train": "topic.tsv", "reported": "topic.tsv"},
        ],
        "variants": [
            {"name": "full", "method": "full", "lr": [1e-3, 1e-2]},
            {"name": "pafi", "method": "pafi", "lr": [1e-2]},
        ],
    }
    return study_from(found | changes)


def run(campaign: Campaign, jobs: int = 1) -> list[str]:
    return [f"{r['variant']}/{r['lr']:g}/{r['seed']}" for r in run_all(campaign.next_task, jobs)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_two_tasks(tmp_path)


def test_a_study_runs_once_and_its_results_say_everything(folder: Path) -> None:
    out = folder / "out"
    campaign = Campaign(study_of(folder), out, folder)
    assert run(campaign)[:3] == ["full/0.01/1", "pafi/0.01/1", "full/0.001/1"]
    assert campaign.progress() == (5, 5)
    assert run(Campaign(study_of(folder), out, folder)) == []  # finished ones are skipped

    result = json.loads((out / "cells" / "pafi" / "lr-0.01.seed-2.json").read_text())
    assert result["status"] == "ok"
    assert [point["round"] for point in result["curve"]] == [0, 1, 2]
    assert set(result["curve"][0]["reported"]) == {"mood", "topic"}
    sent = 4 * (result["sent_values"] + result["head_values"]["mood"])
    assert result["sent_values"] == result["trained_values"]
    assert result["bytes"]["up_per_client_round"] >= sent
    assert result["bytes"]["payload"] == result["curve"][-1]["payload_bytes"]
    assert result["client_seconds"] > 0
    assert result["stored_bytes"] > 4 * result["sent_values"]
    assert result["versions"]["fedmask"]
    assert str(folder) not in json.dumps(result["config"]["tasks"])  # no path of this machine
    assert not any((out / "unfinished").iterdir())  # what a run leaves behind is gone

    write_comparison(study_of(folder), out, "fedmask compare small.toml")
    page = (out / "report.md").read_text()
    for table in ("quality", "cost", "budgets", "tasks", "search", "state"):
        assert (out / "tables" / f"{table}.md").read_text() in page
        assert (out / "tables" / f"{table}.csv").stat().st_size
        assert "tabular" in (out / "tables" / f"{table}.tex").read_text()
    assert "| pafi | pafi | 1 of 1 | 2 of 2 | complete |" in page
    for figure in ("quality_bytes", "bytes_to_goal"):
        assert (out / "figures" / f"{figure}.png").stat().st_size > 5000


def test_searches_begin_in_the_middle_of_the_grids_and_go_through_the_variants_in_turn(folder: Path) -> None:
    variants = [{"name": name, "method": name, "lr": [1e-4, 1e-3, 1e-2]} for name in ("pafi", "random")]
    campaign = Campaign(study_of(folder, variants=variants, reference="pafi"), folder / "out", folder)
    begun = [(cell.variant, cell.lr) for cell in campaign.cells()]
    assert begun == [(name, lr) for lr in (1e-3, 1e-2, 1e-4) for name in ("pafi", "random")]


def test_processes_give_the_same_results_as_none(folder: Path) -> None:
    study = study_of(folder, seeds=[1], tasks=study_of(folder).model_dump()["tasks"][:1])
    for jobs, out in ((1, folder / "one"), (2, folder / "two")):
        run(Campaign(study, out, folder), jobs)
    one, two = (all_results(folder / name) for name in ("one", "two"))
    assert len(one) == len(two) == 3
    assert [(r["curve"], r["bytes"]) for r in one] == [(r["curve"], r["bytes"]) for r in two]


def test_a_broken_run_goes_on_and_comes_to_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # CPU time by the number of answers: each takes a second
    monkeypatch.setattr("experiments.compare.clock.time", SimpleNamespace(process_time=ticks.__next__))
    study, cell = study_of(folder), Cell("pafi", 1e-2, 1)
    whole = runner.run_cell(Campaign(study, folder / "whole", folder).task(cell))

    class Broken(BaseException):
        """Not an error of the run: the machine stops here."""

    class Stopping(runner.Clock):
        def on_round_end(self, row: Any) -> None:
            super().on_round_end(row)
            if row["round"] == 1:
                raise Broken

    task = Campaign(study, folder / "broken", folder).task(cell)
    with monkeypatch.context() as patched:
        patched.setattr(runner, "Clock", Stopping)
        with pytest.raises(Broken):
            runner.run_cell(task)
    assert not task.target.exists()
    again = runner.run_cell(task)
    assert again["resumed"]
    assert [p["reported"] for p in again["curve"]] == [p["reported"] for p in whole["curve"]]
    # What came before the break counts, too: four clients joined, trained, joined again and trained.
    assert (whole["client_seconds"], again["client_seconds"]) == (4 + 2 * 4, 4 + 4 + 4 + 4)


def test_what_an_interruption_cost_is_in_no_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, cell = study_of(folder), Cell("pafi", 1e-2, 1)
    whole = runner.run_cell(Campaign(study, folder / "whole", folder).task(cell))

    class Stopping(runner.Clock):
        """Stops between the replies of round 2, whose messages are sent."""

        asked = 0

        def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
            self.asked = round if clients else 0

        def on_reply(self, client: int) -> None:
            if self.asked == 2:
                raise KeyboardInterrupt

    task = Campaign(study, folder / "broken", folder).task(cell)
    with monkeypatch.context() as patched:
        patched.setattr(runner, "Clock", Stopping)
        with pytest.raises(KeyboardInterrupt):
            runner.run_cell(task)
    again = runner.run_cell(task)
    assert again["resumed"]
    assert again["bytes"] == whole["bytes"]
    assert [p["payload_bytes"] for p in again["curve"]] == [p["payload_bytes"] for p in whole["curve"]]


def test_a_failed_run_is_recorded_and_the_others_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner.run_inprocess

    def fails(config: Any, *args: Any, **more: Any) -> Any:
        if config.method == "full" and config.train.lr == 1e-2:
            raise ConfigError("it does not converge")
        return real(config, *args, **more)

    monkeypatch.setattr(runner, "run_inprocess", fails)
    out = folder / "out"
    campaign = Campaign(study_of(folder, seeds=[1]), out, folder)
    assert len(run(campaign)) == 3
    (failed,) = [result for result in all_results(out) if result["status"] == "failed"]
    assert failed["error"] == "fedmask.errors.ConfigError: it does not converge"
    winner = campaign.winner(campaign.study.variant("full"))
    assert winner is not None
    assert (winner.lr, winner.edge) == (1e-3, True)
    write_comparison(campaign.study, out, "x")
    assert "it does not converge" in (out / "report.md").read_text()
    monkeypatch.undo()
    assert run(Campaign(campaign.study, out, folder)) == []  # failures are not repeated by themselves
    assert run(Campaign(campaign.study, out, folder, retry=True)) == ["full/0.01/1"]


def test_a_full_disk_is_no_result_and_the_run_goes_on_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(runner.Clock):
        def on_round_end(self, row: Any) -> None:
            super().on_round_end(row)
            if row["round"] == 1:
                raise OSError(28, "No space left on device")

    task = Campaign(study_of(folder), folder / "out", folder).task(Cell("pafi", 1e-2, 1))
    with monkeypatch.context() as patched:
        patched.setattr(runner, "Clock", Full)
        with pytest.raises(FederationError, match=r"run pafi/lr-0\.01\.seed-1: .*No space left .* goes on"):
            runner.run_cell(task)
    assert not task.target.exists()
    assert runner.run_cell(task)["resumed"]


def test_a_process_passes_on_what_stops_a_study(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "cells").write_text("no folder")  # so no result can be written
    campaign = Campaign(study_of(folder, seeds=[1]), folder / "out", folder, ["pafi"])
    campaign.result = lambda cell: None  # type: ignore[method-assign, assignment]
    with pytest.raises(FederationError, match="nothing is recorded of it"):
        run(campaign, jobs=2)


def test_a_study_needs_a_model_that_the_server_can_score(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"variant 'full': server\.sharing: expected 'all' or 'by-task'"):
        study_of(folder, run=study_of(folder).run | {"server": {"sharing": "local-heads"}})


def test_results_of_other_settings_or_rows_do_not_count(folder: Path) -> None:
    out = folder / "out"
    study = study_of(folder, seeds=[1])
    run(Campaign(study, out, folder, ["pafi"]))
    (result,) = all_results(out)
    assert Campaign(study, out, folder).counts(result)
    other = study_of(folder, seeds=[1], run=study.run | {"rounds": 1})
    assert Campaign(other, out, folder, ["pafi"]).progress() == (0, 1)
    lines = (folder / "mood.tsv").read_text().splitlines()
    (folder / "mood.tsv").write_text(
        "\n".join([lines[0], *(f"{line[:5]}x{line[5:]}" for line in lines[1:])]) + "\n"
    )
    changed = Campaign(study, out, folder, ["pafi"])
    assert changed.progress() == (0, 1)
    assert not changed.counts(result)
    rows = {row.name: row for row in write_comparison(study, out, "x", changed.counts) if row.name == "state"}
    assert ["pafi", "pafi", "0 of 1", "0 of 1", "not started", ""] in [list(r) for r in rows["state"].rows]


def test_an_unknown_variant_and_a_damaged_result_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown variant 'paffi'; the nearest is 'pafi'"):
        Campaign(study_of(folder), folder / "out", folder, ["paffi"])
    path = folder / "out" / "cells" / "pafi" / "lr-0.01.seed-1.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"expected a result as JSON .* remove it"):
        Campaign(study_of(folder), folder / "out", folder).progress()


def test_missing_files_are_named_with_where_to_get_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"name": "t", "train": "trec6/train.tsv", "reported": "trec6/dev.tsv", "fetch": "CogComp/trec",
            "clients": 1, "train_rows": 5}  # fmt: skip
    study = study_of(folder, tasks=[task])
    monkeypatch.delenv("FEDMASK_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"--data or FEDMASK_DATA; to make: trec6: CogComp/trec"):
        Campaign(study, folder / "out", None)
    with pytest.raises(
        ConfigError, match=r"found no trec6/train\.tsv, trec6/dev\.tsv; to make: trec6: CogComp/trec"
    ):
        Campaign(study, folder / "out", folder)


def test_masks_of_any_placement_come_to_a_result(folder: Path) -> None:
    grid = {"lr": [1e-2], "budget": {"values": 400}}
    variants = [
        grid | {"name": "pafi", "method": "pafi"},
        grid | {"name": "rotate", "method": "pafi", "settings": {"mask_schedule": "rotate"}},
        grid | {"name": "agreed", "method": "gradient", "settings": {"placement": "agreed"}},
        grid | {"name": "client", "method": "gradient", "settings": {"placement": "client"}},
    ]
    out = folder / "out"
    campaign = Campaign(study_of(folder, seeds=[1], variants=variants, full="pafi"), out, folder)
    assert len(run(campaign)) == 4
    found = {result["variant"]: result for result in all_results(out)}
    assert {name: result.get("error") for name, result in found.items()} == dict.fromkeys(found)
    assert {result["sent_values"] for result in found.values()} == {400}
    assert {result["trained_values"] for result in found.values()} == {400}
    shared, agreed, client = (found[name]["bytes"] for name in ("pafi", "agreed", "client"))
    assert shared["mask_up_per_client"] == 0 < agreed["mask_up_per_client"]
    assert agreed["payload"] > shared["payload"]
    assert client["payload"] > shared["payload"]  # its indices, and a union that grows
    assert found["rotate"]["bytes"]["up_per_client_round"] == pytest.approx(
        shared["up_per_client_round"], rel=0.05
    )


def test_a_report_alone_leaves_out_results_of_other_rows_or_says_that_it_cannot_tell(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""
name = "small"
narrow = "a test"
seeds = [1]
[run]
model = "{folder / "model"}"
rounds = 1
overlap_batches = 0
partition = {{ held_out = 0.0 }}
train = {{ max_tokens = 16, batch_size = 8, steps = 1 }}
[[tasks]]
name = "mood"
train = "mood.tsv"
reported = "mood.tsv"
clients = 2
train_rows = 80
validation_rows = 40
reported_rows = 60
[[variants]]
name = "pafi"
method = "pafi"
lr = [1e-2]
"""
    study, out = folder / "small.toml", folder / "out"
    study.write_text(text, encoding="utf-8")

    def report(data: Path | None, *, only_report: bool = True) -> str:
        compare(study, quick=False, data=data, out=out, only=(), jobs=1, retry=False,
                report_only=only_report, as_json=True)  # fmt: skip
        tables = json.loads(capsys.readouterr().out)["tables"]
        return str(tables["state"][0][""])

    assert report(folder, only_report=False) == report(folder) == "complete"
    page = out / "report.md"
    assert NOT_CHECKED not in page.read_text()
    assert report(folder / "elsewhere") == "complete"
    assert NOT_CHECKED in page.read_text()
    rows = (folder / "mood.tsv").read_text().replace("\tyes", "\tno", 1)
    (folder / "mood.tsv").write_text(rows)
    assert report(folder) == "not started"
