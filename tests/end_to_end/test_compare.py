"""``fedmask compare --quick`` from the command line, on a smaller budget still: the real model and texts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.compare import command


@pytest.fixture
def smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quick study with a round of one step, fewer rows, one learning rate and one seed."""
    text = command.QUICK.read_text(encoding="utf-8")
    for pattern, new in (
        (r"rounds = \d+", "rounds = 1"),
        (r"steps = \d+", "steps = 1"),
        (r'"scores.samples" = \d+', '"scores.samples" = 2'),
        (r"train_rows = \d+", "train_rows = 120"),
        (r"(validation|reported)_rows = \d+", r"\1_rows = 30"),
        (r"seeds = .*", 'seeds = [1]\nnarrow = "a test"'),
        (r"lr = \[(.*?),.*\]", r"lr = [\1]"),
    ):
        text, count = re.subn(pattern, new, text)
        assert count, pattern
    path = tmp_path / "quick.toml"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(command, "QUICK", path)
    return path


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    return int(str(ended.value.code))


def test_quick(smaller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    names = ["pafi,pafi+hiwi,lora-7,fish-client", "--only", "head"]
    assert called("--quick", "--out", str(out), "--only", *names, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["variant"]: row for row in printed["tables"]["quality"]}
    assert set(rows) == {"pafi+hiwi", "pafi", "lora-7", "fish-client", "head"}
    for name in ("pafi", "pafi+hiwi", "fish-client"):
        assert rows[name]["sent values"] == "64,604"  # matched
    assert rows["lora-7"]["sent values"] == "64,512"
    assert rows["head"]["sent values"] == "0"
    states = {row["variant"]: row[""] for row in printed["tables"]["state"]}
    assert states["pafi"] == "complete"
    assert states["full"] == "not started"
    assert (out / "report.md").is_file()
    costs = {row["variant"]: row for row in printed["tables"]["cost"]}
    assert costs["fish-client"]["masks up / client"].endswith(" kB")
    assert costs["lora-7"]["masks up / client"] == "0 B"
    assert (out / "figures" / "union_growth.png").is_file()

    assert called("--quick", "--out", str(out), "--report") == 0  # runs nothing, needs no model
    assert "quality" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "or --quick for the embedded one"),
        (["study.toml", "--quick"], "give one of the two"),
        (["--quick", "--jobs", "0"], "--jobs: expected 1 or more, found 0"),
        (["--quick", "--only", "pafy"], "unknown variant 'pafy'; the nearest is 'pafi'"),
        (["nothing.toml"], "nothing.toml: cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*arguments, "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
