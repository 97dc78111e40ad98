"""The benchmarks run, and what they count without a clock is what is promised. Timings are never asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from experiments.benchmarks import __main__ as everything
from experiments.benchmarks import latency, linked, memory, precision, step, tables
from experiments.benchmarks.measuring import _others_seconds, in_turns, ratios
from experiments.competitors import CONTENDERS

SMALL = ["--models", "minilm", "--rows", "1", "--tokens", "8", "--threads", "1", "--repeats", "1"]
K = 53_084  # 0.5 % of MiniLM's linear weights


def result(main: Any, arguments: list[str], path: Path) -> dict[str, Any]:
    assert main([*arguments, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    assert {"processor", "cores", "amx", "load", "torch", "threads"} <= set(found["machine"])
    return found


def test_memory_that_a_step_needs(tmp_path: Path) -> None:
    """With so few tokens what counts is what belongs to the weights: k values, or all of them."""
    rows = {
        (row["method"], row["precision"]): row for row in result(memory.main, SMALL, tmp_path / "m")["memory"]
    }
    ours, dense, whole = rows["fedmask", "fp32"], rows["dense-mask", "fp32"], rows["full", "fp32"]
    assert ours["trained"] == dense["trained"] == K
    assert ours["state_bytes"] == 16 * K
    assert dense["state_bytes"] == 16 * 10_616_832
    scratch = 32 * 4 * (1536 + 384) + 2 * 4 * 3_000  # a block of the widest layer's tokens, and its sums
    assert ours["kept_above_floor"] == dense["kept_above_floor"]
    assert ours["rest_above_floor"] <= 16 * K + scratch
    assert dense["rest_above_floor"] > 4 * 10_000_000 * 0.9
    assert whole["rest_above_floor"] > 4 * 22_000_000 * 0.9
    assert rows["fedmask", "bf16"]["kept_bytes"] < 0.6 * ours["kept_bytes"]
    assert rows["lora", "fp32"]["state_bytes"] == 16 * 73_728


def test_steps_of_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = result(step.main, SMALL, tmp_path / "s")["steps"]
    assert [row["method"] for row in rows] == list(CONTENDERS)
    assert rows[0]["ratio_to_floor"] == 1.0
    assert all(row["ms"] > 0 for row in rows)
    assert "53,084" in capsys.readouterr().out


def test_precisions(tmp_path: Path) -> None:
    rows = result(precision.main, SMALL, tmp_path / "p")["steps"]
    assert len(rows) == len(precision.WAYS)
    (base,) = [row for row in rows if row["way"] == precision.BASE]
    assert base["times_faster"] == 1.0


def test_latency(tmp_path: Path) -> None:
    arguments = ["--models", "minilm", "--threads", "1", "--repeats", "1"]
    rows = result(latency.main, arguments, tmp_path / "l")["latency"]
    assert {row["variant"] for row in rows} == {"original", "merged", "lora unmerged"}


def test_functions_take_turns_and_medians_are_compared() -> None:
    calls: list[str] = []
    functions = {name: partial(calls.append, name) for name in "ab"}
    found = in_turns(functions, repeats=3, others=lambda: 0.0)
    assert "".join(calls) == "abababab"
    assert [len(times) for times in found.values()] == [3, 3]
    assert found.others == {"a": 0.0, "b": 0.0}
    slow = {"a": [1.0, 10.0, 1.0], "b": [2.0, 2.0, 2.0]}
    assert ratios(slow, "a") == {"a": 1.0, "b": 2.0}


def test_calls_that_other_processes_disturb_are_made_again() -> None:
    """By the others' time alone: a slow call on a quiet machine counts."""
    spent, made = [0.0], 0

    def call() -> None:
        nonlocal made
        made += 1
        spent[0] += 5.0 if made in (2, 4) else 0.0  # the first of the counted calls, and the third
        sleep(0.05 if made == 3 else 0.0)

    found = in_turns({"a": call}, repeats=2, others=lambda: spent[0])
    assert made == 5 and found.others["a"] == 0.0
    assert found["a"][0] >= 0.05

    def busy() -> None:
        spent[0] += 5.0

    made = 0
    found = in_turns({"a": busy}, repeats=2, others=lambda: spent[0], tries=3)
    assert len(found["a"]) == 2 and found.others["a"] > 100  # nothing better was to be had, and it says so


def test_other_processes_are_seen() -> None:
    before = _others_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert not Path("/proc/stat").exists() or _others_seconds() - before > 0.2


def test_one_command_runs_the_named_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 3 if command[2].endswith("one") else 0)

    monkeypatch.setattr(everything, "NAMES", ("one", "two"))
    monkeypatch.setattr(everything.subprocess, "run", run)
    assert everything.main(["--to", str(tmp_path / "new"), "two"]) == 0
    assert everything.main(["--to", str(tmp_path)]) == 3  # the first that fails ends it
    assert [command[2:] for command in ran] == [
        ["experiments.benchmarks.two", "--json", str(tmp_path / "new" / "two.json")],
        ["experiments.benchmarks.one", "--json", str(tmp_path / "one.json")],
    ]
    with pytest.raises(SystemExit):
        everything.main(["speed"])


def test_every_benchmark_is_in_the_command() -> None:
    folder = Path(everything.__file__).parent
    helpers = {"__init__", "__main__", "backbones", "clocked", "linked", "measuring", "small", "tables"}
    alone = {"codec_quality"}  # with options and results of their own
    assert {path.stem for path in folder.glob("*.py")} - helpers - alone == set(everything.NAMES)


def test_a_message_s_way_is_taken_apart_without_a_rest() -> None:
    """Notes come in the order of their processes' writing; messages are counted in the order of sending."""
    join = {"kind": "query.join", "message": "j", "began": 0.5, "entered": 1.0, "pulled": 1.0, "loaded": 1.0,
            "worked": 1.0, "pushed": 1.5}  # fmt: skip
    second = {"kind": "train", "message": "b", "began": 23.0, "entered": 24.0, "pulled": 24.5, "loaded": 25.0,
              "worked": 29.0, "pushed": 29.25}  # fmt: skip
    first = {name: value if isinstance(value, str) else value - 10 for name, value in second.items()}
    notes = [{"sent": ["j"], "at": 0.0}, join, {"got": "j", "at": 2.0}, {"peak": 50.0},
             {**second, "message": "b"}, {"sent": ["b"], "at": 20.0}, {**first, "message": "a"},
             {"got": "b", "at": 32.0}, {"sent": ["a"], "at": 10.0}, {"got": "a", "at": 24.0}]  # fmt: skip
    one, two = linked.parts_of(notes)
    assert list(one.values()) == [3.0, 1.0, 0.5, 0.5, 4.0, 0.25, 4.75, 14.0]
    assert list(two.values()) == [3.0, 1.0, 0.5, 0.5, 4.0, 0.25, 2.75, 12.0]
    assert list(one)[:-1] == list(linked.PARTS)


def test_results_without_a_message_s_way_are_shown_too() -> None:
    seconds = {"without": {"all": 8.0}, "with": {"all": 6.0}}
    old = tables.message({"seconds": seconds})
    assert "| all | 8.00 | 6.00 |" in old and "memory" not in old
    way = {"seconds": {"pull": 0.25}, "memory": {"flower-superlink": 111.4}}
    new = tables.message({"seconds": seconds, "linked": way})
    assert new.startswith(old) and "| pull | 0.25 |" in new and "| `flower-superlink` | 111 |" in new


def test_the_pages_show_the_published_results() -> None:
    text = ""
    for page in tables.PAGES:
        own = page.read_text(encoding="utf-8")
        assert tables.filled(own, tables.RESULTS) == own, page.name
        text += own
    published = {path.stem for path in tables.RESULTS.glob("*.json")} | {"goals"}
    for name in tables.TABLES:
        shown = f"<!-- {name} -->\n| " in text
        assert shown == (tables.SOURCES.get(name, name) in published), f"the table of {name}"
