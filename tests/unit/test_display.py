"""Progress on a terminal and in a pipe, and tables that keep their cells whole."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.display import RunProgress, print_json, print_table


def watch(console: Console) -> str:
    """Feed a made-up run of two rounds to the progress display; returns all that was written."""
    with RunProgress({"tweets": "accuracy"}, console) as progress:
        progress.on_start(Path("runs/made"), 2, 3)
        for round in range(3):
            progress.on_round_start(round, (0, 1, 2))
            for client in range(3):
                progress.on_reply(client)
            row: dict[str, Any] = {"round": round, "seconds": 1.25, "rejected": []}
            row["dev"] = {"tweets": {"loss": 1.0, "accuracy": 0.25 * round}}
            if round == 2:
                row["rejected"] = [{"client": 1, "reason": "no"}]
                row |= {"replied": [0, 2], "selected": [2]}
            progress.on_round_end(row)
        for client in range(3):  # the final evaluation
            progress.on_reply(client)
        progress.on_end({})
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_one_line_a_round() -> None:
    assert watch(Console(file=io.StringIO(), width=100)).splitlines() == [
        "3 clients, 2 rounds, writing to runs/made",
        "round 0/2  tweets accuracy 0.000  1.2 s",
        "round 1/2  tweets accuracy 0.250  1.2 s",
        "round 2/2  tweets accuracy 0.500  1.2 s  1 reply not used  the strategy used 1 of 2 replies",
    ]


def test_a_terminal_gets_bars_for_rounds_and_clients_too() -> None:
    text = watch(Console(file=io.StringIO(), force_terminal=True, width=100))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"rounds +━+ +2/2", plain)
    assert re.findall(r"clients +━+ +(\d+/\d+)", plain)[-1] == "3/3"
    assert "round 1/2  tweets accuracy 0.250" in plain


def test_bars_end_when_a_run_fails() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with pytest.raises(RuntimeError), RunProgress({}, console) as progress:
        raise RuntimeError
    assert progress.progress.live.is_started is False


def test_a_table_in_a_pipe_keeps_long_cells_whole(capsys: pytest.CaptureFixture[str]) -> None:
    digest = "0123456789abcdef" * 4
    print_table("Title", ("name", "value"), [("digest", digest), ("[b]", 3)])
    out = capsys.readouterr().out
    assert digest in out
    assert "[b]" in out, "a value is text, not markup"


def test_json_refuses_what_json_cannot_say(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        print_json({"a": float("nan")})
