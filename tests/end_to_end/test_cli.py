"""The command line from start to end on a tiny model, and what a user's mistakes get."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from tests.support import save_two_tasks

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``mood.tsv`` (2 classes) and ``topic.tsv`` (3 classes)."""
    return save_two_tasks(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fedmask(capfd: pytest.CaptureFixture[str]) -> Run:
    """``fedmask(*words)`` -> exit code, stdout, stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def arguments(tiny: Path, runs: Path, name: str = "tiny", **changes: str) -> list[str]:
    values = {
        "--model": str(tiny / "model"),
        "--rounds": "2",
        "--steps": "2",
        "--batch-size": "8",
        "--max-tokens": "16",
        "--density": "0.02",
        "--eval-rows": "40",
        "--partition": "iid",
        "--workers": "1",
        "--name": name,
        "--runs-dir": str(runs),
    } | changes
    tasks = [
        f"--task=name={t},source={tiny / t}.tsv,text=text,label=label,clients=2" for t in ("mood", "topic")
    ]
    return ["run", *tasks, *(word for pair in values.items() for word in pair)]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, runs))
    assert stop.value.code == 0
    return runs / "tiny"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_a_whole_folder(finished: Path) -> None:
    names = set(snapshot(finished))
    assert names == {
        "config.json",
        "rounds.jsonl",
        "ledger.jsonl",
        "summary.json",
        "delta.safetensors",
        "report.md",
        "figures/quality_bytes.png",
        "figures/rounds.png",
        "figures/labels.png",
    }


def test_json_is_the_only_thing_on_stdout_and_agrees_with_the_folder(
    fedmask: Run, tiny: Path, tmp_path: Path
) -> None:
    code, out, err = fedmask(*arguments(tiny, tmp_path / "runs"), "--json")
    assert code == 0
    said = json.loads(out)
    folder = Path(said["folder"])
    assert said["summary"] == json.loads((folder / "summary.json").read_text())
    assert Path(said["report"]).is_file()
    assert said["comparisons"][0]["total"] == sum(
        row["payload_bytes"]
        for row in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
        if row["kind"] != "evaluate"
    )
    # Progress goes to stderr, a line for each round.
    assert [line.split()[1] for line in err.splitlines() if line.startswith("round ")] == [
        "0/2",
        "1/2",
        "2/2",
    ]


def test_the_same_settings_give_the_same_vector(fedmask: Run, finished: Path, tmp_path: Path) -> None:
    code, out, _ = fedmask("run", "--config", finished / "config.json", "--runs-dir", tmp_path, "--json")
    assert code == 0
    summary = json.loads((finished / "summary.json").read_text())
    assert json.loads(out)["summary"]["vector_sha256"] == summary["vector_sha256"]


def test_tables_name_rounds_quality_bytes_and_report(fedmask: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = fedmask(*arguments(tiny, tmp_path / "runs"))
    assert code == 0
    for part in (
        "2 rounds",
        "mood",
        "topic",
        "full fine-tuning",
        "agreed task mask, by votes",
        "a mask per client",
        "Report: ",
    ):
        assert part in out


def test_an_older_run_is_refused_and_kept(fedmask: Run, tiny: Path, finished: Path) -> None:
    before = snapshot(finished)
    code, out, err = fedmask(*arguments(tiny, finished.parent))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "--overwrite" in err
    assert snapshot(finished) == before


def test_overwrite_replaces_a_run_and_nothing_else(fedmask: Run, tiny: Path, tmp_path: Path) -> None:
    words = arguments(tiny, tmp_path)
    assert fedmask(*words)[0] == 0
    (tmp_path / "tiny" / "left.txt").write_text("from before")
    assert fedmask(*words, "--overwrite")[0] == 0
    assert not (tmp_path / "tiny" / "left.txt").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("not a run")
    code, _, err = fedmask(*arguments(tiny, tmp_path, name="mine"), "--overwrite")
    assert (code, (other / "thesis.txt").read_text()) == (2, "not a run")
    assert "mine" in err


def test_report_ledger_and_export(fedmask: Run, finished: Path, tmp_path: Path) -> None:
    report = (finished / "report.md").read_bytes()
    code, out, _ = fedmask("report", finished)
    assert (code, Path(out.strip())) == (0, finished / "report.md")
    assert (finished / "report.md").read_bytes() == report

    code, out, _ = fedmask("ledger", finished, "--by", "client,direction", "--json")
    said = json.loads(out)
    assert sum(row["message_bytes"] for row in said["rows"]) == said["total"]["message_bytes"] > 0
    code, table, _ = fedmask("ledger", finished)
    assert code == 0
    assert f"{said['total']['payload_bytes']:,}" in table

    code, out, _ = fedmask("export", finished, "--to", tmp_path / "out", "--json")
    assert code == 0
    assert [Path(path).name for path in json.loads(out)["folders"]] == ["mood", "topic"]
    code, _, err = fedmask("export", finished, "--to", tmp_path / "out")
    assert code == 2
    assert "--overwrite" in err


def test_mask_prints_what_json_says(fedmask: Run, tiny: Path) -> None:
    code, out, _ = fedmask("mask", tiny / "model", "--density", "0.1", "--json")
    facts = json.loads(out)
    assert code == 0
    # Two layers: four 32 x 32 matrices, one 64 x 32 and one 32 x 64 each.
    assert facts["eligible_size"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert facts["k"] == round(0.1 * facts["eligible_size"]) == sum(row["masked"] for row in facts["tensors"])
    assert facts["recipe_bytes"] < 256
    code, table, _ = fedmask("mask", tiny / "model", "--density", "0.1")
    assert facts["digest"] in table
    assert all(row["tensor"] in table for row in facts["tensors"])


def test_threshold_separates_the_mask_from_the_rest(fedmask: Run, tiny: Path) -> None:
    import numpy as np
    from transformers import AutoModel

    facts = json.loads(fedmask("mask", tiny / "model", "--density", "0.1", "--json")[1])
    model = AutoModel.from_pretrained(tiny / "model")
    weights = {name: p.detach().numpy().ravel() for name, p in model.named_parameters()}
    values = np.sort(np.abs(np.concatenate([weights[row["tensor"]] for row in facts["tensors"]])))
    assert values[facts["k"] - 1] == np.float32(facts["threshold"])


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["rn"], ["rn", "run"]),
    "unknown option": (["run", "--densty", "1"], ["--densty", "--density"]),
    "a word for a number": (["run", "--rounds", "many"], ["--rounds", "many"]),
    "density above one": (["run", "--density", "1.5"], ["density", "at most 1", "1.5"]),
    "density of the mask command": (["mask", "MODEL", "--density", "0"], ["density", "(0, 1]"]),
    "no clients": (["run", "--task", "bbc:0"], ["clients", "at least 1"]),
    "unknown method": (["run", "--method", "pafi+hivi"], ["pafi+hivi", "nearest is 'pafi+hiwi'"]),
    "unknown task": (["run", "--task", "twets:2"], ["twets", "nearest is 'tweets'"]),
    "unknown strategy": (["run", "--strategy", "fedavgg"], ["fedavgg", "nearest is 'fedavg'"]),
    "refused strategy": (["run", "--strategy", "fedprox"], ["fedprox", "proximal"]),
    "unknown option of a strategy": (
        ["run", "--strategy", "fedadam", "--option", "etta=1"],
        ["nearest is 'eta'"],
    ),
    "unknown setting": (["run", "--set", "train.lrr=1"], ["nearest is 'lr'"]),
    "unknown engine": (["run", "--engine", "rai"], ["nearest is 'ray'"]),
    "an option of another engine": (["run", "--backend", "{}"], ["--backend", "--engine ray"]),
    "backend that is no JSON": (["run", "--engine", "ray", "--backend", "x"], ["--backend", "JSON"]),
    "missing config": (["run", "--config", "absent.toml"], ["absent.toml", "cannot be read"]),
    "missing model": (["run", "--model", "./absent"], ["absent", "not found"]),
    "missing data": (
        ["run", "--task", "name=a,source=absent.csv,text=t,label=l,clients=2"],
        ["absent.csv"],
    ),
    "missing label column": (
        ["run", "--task", "name=mood,source=MOOD,text=text,label=lable,clients=2"],
        ["lable", "nearest is 'label'"],
    ),
    "more clients than rows": (
        ["run", "--task", "name=mood,source=MOOD,text=text,label=label,clients=9999", "--partition", "iid"],
        ["9999", "rows"],
    ),
    "a text file": (
        ["run", "--task", "name=a,source=absent.txt,text=t,label=l,clients=2"],
        [".txt", ".parquet"],
    ),
    "more tokens than positions": (["run", "--task", "bbc:1", "--max-tokens", "41"], ["at most 40", "41"]),
    "a word for a strategy's number": (["run", "--option", "eta=x"], ["eta: expected a number", "eta=0.1"]),
    "no such run": (["report", "runs/absent"], ["runs/absent", "found none"]),
    "unknown ledger key": (["ledger", "RUN", "--by", "rund"], ["rund", "nearest is 'round'"]),
    "clients and tasks": (["estimate", "--clients", "3", "--task", "bbc:2"], ["--clients"]),
    "no link": (["estimate", "--clients", "3", "--link", "fast"], ["--link", "10/50", "fast"]),
    "labels of no task": (["estimate", "--clients", "3", "--labels", "tusk=2"], ["nearest is 'task'"]),
    "unknown eligible set": (["mask", "MODEL", "--eligible", "liner"], ["liner", "nearest is 'linear'"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    case: str, fedmask: Run, tiny: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, parts = MISTAKES[case]
    places = {"MODEL": str(tiny / "model"), "MOOD": str(tiny / "mood.tsv"), "RUN": str(finished)}
    real = [re.sub("MODEL|MOOD|RUN", lambda m: places[m.group()], word) for word in words]
    if words[0] == "run" and "--model" not in words:
        real += ["--model", places["MODEL"], "--workers", "1"]
    if words[0] == "run" and "--max-tokens" not in words:
        real += ["--max-tokens", "16"]  # more than the tiny model reads would be a mistake of its own
    code, out, err = fedmask(*real)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    for part in parts:
        assert part in err
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing behind"


def test_an_estimate_in_words_and_as_json(fedmask: Run) -> None:
    words = ["estimate", "--model", "roberta-large", "--clients", "100", "--rounds", "2", "--up", "int8"]
    code, out, _ = fedmask(*words, "--link", "10/50")
    assert code == 0
    assert "1,632,829 of 354,310,144 backbone values" in out and "10 Mbit/s up and 50 down" in out
    code, out, _ = fedmask(*words, "--json")
    said = json.loads(out)
    values = 1_632_829 + 2 * 1025
    assert 1.0 < said["per_client_round"]["up"]["payload_bytes"] / values < 1.02
    assert said["per_client_round"]["down"]["payload_bytes"] == 4 * values
    # The slowest client's own link: down at 50 Mbit/s, up at 10.
    sizes = {way: one["message_bytes"] for way, one in said["per_client_round"].items()}
    assert said["seconds"]["round"] == pytest.approx(8e-6 * (sizes["up"] / 10 + sizes["down"] / 50), rel=1e-6)


def in_a_new_process(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys, json\n"
        "from experiments.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'flwr', 'transformers', 'numpy', 'matplotlib')\n"
        "print(json.dumps([m for m in heavy if m in sys.modules]))"
    )
    assert in_a_new_process(code) == []


def test_no_words_at_all_get_the_help(fedmask: Run) -> None:
    code, out, err = fedmask()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ") and "fine-tune a pre-trained" in err.lower()
    assert {"run", "mask", "report"} <= set(err.split())


def test_every_command_has_help(fedmask: Run) -> None:
    for words in ([], ["run"], ["mask"], ["export"], ["report"], ["ledger"], ["estimate"]):
        code, out, _ = fedmask(*words, "--help")
        assert code == 0
        assert "--help" in out
