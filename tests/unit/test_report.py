"""The report says what the run's folder says: checked against figures added up by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments import figures
from experiments.beside import beside, read_beside
from experiments.figures import cumulative_megabytes, scores
from experiments.report import render, write_report
from experiments.results import comparisons, measured_bytes, quality, size, traffic, trained
from experiments.runs import read_run
from fedmask.costs import RunFacts, compare
from fedmask.errors import ConfigError

# Of tests/conftest.py: a mask of 200 B to each of 3 clients, then two rounds in which the clients of
# tweets get and send 504 B and the one of bbc 516 B.
MASKS = 3 * 200
ROUND = 2 * (504 + 504 + 516)


def test_sums_by_hand(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert measured_bytes(run) == MASKS + 2 * ROUND
    assert cumulative_megabytes(run) == {n: (MASKS + n * ROUND) / 1e6 for n in (0, 1, 2)}
    up, down = traffic(run)
    # One reply was refused, so five of six count.
    assert up == {"direction": "up", "payload": (3 * 504 + 2 * 516) / 5, "message": (3 * 1504 + 2 * 1516) / 5}
    assert down["payload"] == (4 * 504 + 2 * 516) / 6


def test_comparison_is_against_what_was_measured(run_folder: Path) -> None:
    this, full = comparisons(read_run(run_folder))
    assert (this["total"], this["ratio"]) == (MASKS + 2 * ROUND, 1.0)
    assert full["ratio"] == 1440000 / (MASKS + 2 * ROUND)


def test_quality_before_end_and_test(run_folder: Path) -> None:
    tweets, bbc = quality(read_run(run_folder))
    assert (tweets["before"], tweets["dev"], tweets["test"], tweets["personal"]) == (0.33, 0.7, 0.69, 0.75)
    assert (bbc["metric"], bbc["test"]) == ("f1", 0.91)
    assert scores(read_run(run_folder), "global", "tweets") == [(1, 0.5), (2, 0.6)]


def test_what_trains(run_folder: Path) -> None:
    text = trained(read_run(run_folder))
    assert text == (
        "120 of 30,000 backbone values (0.4 %: mask 100, bias 20), and a head a task (tweets 6, bbc 9)"
    )


def change(run_folder: Path, name: str, **values: object) -> None:
    path = run_folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_rounds(run_folder: Path, **values: list[object]) -> None:
    """Other values for all rounds, one a round."""
    path = run_folder / "rounds.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for key, found in values.items():
        for row, value in zip(rows, found, strict=True):
            row[key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(run_folder: Path) -> str:
    return " ".join(render(read_run(run_folder)).split())


ALL_USED = "every reply of every round was used"


def test_replies_that_the_strategy_left_out_are_said(run_folder: Path) -> None:
    change_rounds(run_folder, rejected=[[], [], []], replied=[[], [0, 1, 2], [0, 1, 2]],
                  selected=[[], [0, 1, 2], [0, 1, 2]])  # fmt: skip
    assert ALL_USED in said(run_folder)
    change_rounds(run_folder, selected=[[], [1], [2]])
    assert "used 2 of 6 usable replies: it left out 4" in said(run_folder)
    assert ALL_USED not in said(run_folder)
    change_rounds(
        run_folder, selected=[[], [0, 1, 2], []], note=["", "", "krum needs 5: the old vector stays"]
    )
    assert "- Round 2: krum needs 5: the old vector stays." in said(run_folder)
    assert ALL_USED not in said(run_folder)


def test_clients_that_could_not_be_scored_are_said(run_folder: Path) -> None:
    change_rounds(run_folder, rejected=[[], [], []], replied=[[], [0, 1, 2], [0, 1, 2]],
                  selected=[[], [0, 1, 2], [0, 1, 2]])  # fmt: skip
    change(run_folder, "summary.json", unscored=[{"client": 1, "reason": "no answer within 9 s"}])
    assert "| end | 1 | no answer within 9 s |" in render(read_run(run_folder))
    assert ALL_USED not in said(run_folder)


def test_what_an_interruption_cost_stands_apart(run_folder: Path) -> None:
    with (run_folder / "ledger.jsonl").open("a") as file:
        for row in (
            {"round": 2, "kind": "train", "payload_bytes": 7000, "status": "aborted"},
            {"round": -1, "kind": "mask", "payload_bytes": 500, "status": "ok"},
        ):
            row |= {"client": 0, "direction": "down", "message_bytes": 9000}
            file.write(json.dumps(row) + "\n")
    change(run_folder, "config.json", resumed=[{"after_round": 1}])
    test_sums_by_hand(run_folder)
    assert "went on after round 1. Rounds that broke off and joining again moved 7.5 kB" in said(run_folder)


def test_remarks_and_what_flatters(run_folder: Path) -> None:
    assert "In round 1 that union is still empty" in said(run_folder)
    assert "weighted by held-out rows" in said(run_folder)
    change(run_folder, "summary.json", notes=["the overlap was not measured (MemoryError: )"])
    assert "Note: the overlap was not measured (MemoryError: )." in said(run_folder)


def test_the_legend_of_the_rounds_has_the_lines_markers(run_folder: Path) -> None:
    figure = Figure()
    figures._rounds(read_run(run_folder), figure)
    drawn = figure.axes[0].lines
    (legend,) = figure.legends
    keys = [line for line in legend.legend_handles if isinstance(line, Line2D)]
    assert len(keys) == len(drawn) == 3
    for key, line in zip(keys, drawn, strict=True):
        assert key.get_marker() == line.get_marker() == "o"
        for name in ("linestyle", "fillstyle", "markersize"):
            assert getattr(key, f"get_{name}")() == getattr(line, f"get_{name}")()


def test_the_closing_evaluation_is_named_beside_the_table(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.launch import _show

    _show(read_run(run_folder), run_folder / "report.md", as_json=False)
    out = capsys.readouterr().out
    assert "Not in it: 1.5 kB of payload for the closing evaluation" in out
    assert "(tweets 6, bbc 9)" in out


def test_report_and_figures_are_written_and_agree(run_folder: Path) -> None:
    path = write_report(run_folder)
    text = path.read_text()
    assert "| tweets | accuracy | 0.330 | 0.700 | 0.690 | 0.750 |" in text
    assert "| 2 | 1 | a value is not finite |" in text
    assert "Not counted: HTTP" in text
    assert "|  |" not in text.replace("| |\n|---|---|", "")  # no empty cell
    for line in text.splitlines():
        if line.startswith("!["):
            picture = run_folder / line.split("(")[1].rstrip(")")
            assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (run_folder / "figures").iterdir()) == [
        "labels.png",
        "quality_bytes.png",
        "rounds.png",
    ]


def test_tables_of_markdown_are_whole(run_folder: Path) -> None:
    width = 0
    for line in render(read_run(run_folder)).splitlines():
        cells = line.count("|") - line.count("\\|")
        if line.startswith("|"):
            assert width in (0, cells), line
        width = cells if line.startswith("|") else 0


def test_how_unequal_masks_overlap_is_measured_or_said_to_be_a_bound(run_folder: Path) -> None:
    assert "2.50 x k" in " ".join(render(read_run(run_folder)).split())
    path = run_folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overlap": {}}))
    assert "an upper bound" in render(read_run(run_folder))


def test_half_a_table_is_no_table(run_folder: Path) -> None:
    text = render(read_run(run_folder))
    section = text.split("## Replies that did not count")[1].split("## ")[0]
    assert section.strip().splitlines()[-1] == "| 2 | 1 | a value is not finite |"


def test_a_reason_cannot_break_a_table(run_folder: Path) -> None:
    path = run_folder / "rounds.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["rejected"][0]["reason"] = "expected a | b"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| 2 | 1 | expected a \\| b |" in render(read_run(run_folder))


def test_many_labels_and_none(run_folder: Path) -> None:
    path = run_folder / "config.json"
    record = json.loads(path.read_text())
    first, second, third = record["facts"]["partitions"]
    first["labels"] = {f"label {i}": 5 for i in range(18)}
    second["labels"], third["labels"] = {}, {}
    path.write_text(json.dumps(record))
    assert write_report(run_folder).is_file()


def test_a_report_can_be_written_again(run_folder: Path) -> None:
    first = write_report(run_folder).read_bytes()
    assert write_report(run_folder).read_bytes() == first


@pytest.mark.parametrize("name", ["config.json", "rounds.jsonl", "ledger.jsonl", "summary.json"])
def test_an_unfinished_run_is_named(run_folder: Path, name: str) -> None:
    (run_folder / name).unlink()
    with pytest.raises(ConfigError, match=f"finished run, found no {name}"):
        read_run(run_folder)


def test_no_run_names_those_that_are_there(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"found none.*made"):
        read_run(run_folder.parent / "mda")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (212336, "212.3 kB"),
        (1.7e6, "1.70 MB"),
        (5e9, "5.00 GB"),
    ],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert size(count) == text


def test_bytes_beside_the_formula_and_other_ways(run_folder: Path) -> None:
    facts = RunFacts(100, 20000, 30000, (6, 6, 9), ((0, 1, 2),) * 2, beside=20, once_down_bytes=200)
    change(run_folder, "summary.json", costs={way: one.to_dict() for way, one in compare(facts).items()})
    (run_folder / "wire.json").write_text(json.dumps({"run_id": "1", "inbound": 5000, "outbound": 7000}))
    text = render(read_run(run_folder))
    assert "| down | 3.6 kB | 3.6 kB | 11.1 kB |" in text  # 600 + 3048, and 9 messages
    assert "5.0 kB from the SuperNodes, 7.0 kB to them" in text
    agreed = next(line for line in text.splitlines() if line.startswith("| one agreed task mask, by votes"))
    # 678 of 6,774 bytes; 600 indices of 8 and of 16 bytes instead of 678 bytes
    assert agreed.endswith("| 6.8 kB | 1.01 | 10.0% | 10.9 kB (44%) | 15.7 kB (61%) |")


def other_run(run_folder: Path) -> Path:
    """The same federation with a mask a client and one round more."""
    folder = run_folder.with_name("other")
    shutil.copytree(run_folder, folder)
    config = json.loads((folder / "config.json").read_text())["config"]
    change(folder, "config.json", config=config | {"method": "fish", "placement": "client"})
    own = {"rule": "fish", "batches": 0, "clients": 3, "k": 100, "union": 250, "mean_jaccard": 0.1}
    change(folder, "summary.json", overlap=own, rounds=3)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(read_run(run_folder).rounds[-1] | {"round": 3}) + "\n")
    with (folder / "ledger.jsonl").open("a") as file:
        row = {"client": 0, "direction": "down", "message_bytes": 9000, "kind": "train", "status": "ok"}
        for round, payload in ((2, 700), (3, 8000)):
            file.write(json.dumps(row | {"round": round, "payload_bytes": payload}) + "\n")
    return folder


def test_another_run_stands_beside_up_to_the_last_round_of_both(run_folder: Path) -> None:
    other = other_run(run_folder)
    one, two = beside(read_run(run_folder), read_beside(read_run(run_folder), other))
    lost = 504  # the one reply that was refused
    assert (one["label"], one["values"], one["times"]) == ("pafi+hiwi", 120, 1)
    assert one["total"] == MASKS + 2 * ROUND - lost
    assert (one["down"], one["last_down"]) == ((4 * 504 + 2 * 516) / 6, (504 + 504 + 516) / 3)
    assert one["union"] == 0
    assert two["label"] == "fish, a mask a client" and two["union"] == 2.5
    assert two["total"] == one["total"] + 700  # what came after round 2 does not count
    assert two["last_down"] == (504 + 504 + 516 + 700) / 4
    assert two["dev"] == {"tweets": 0.7, "bbc": 0.9}
    text = write_report(run_folder, other).read_text()
    assert "## Another run on the same shards" in text and "| fish, a mask a client | 120 |" in text
    assert "2.50 x k | 0.700 | 0.900 |" in text
    assert "Another run" not in write_report(run_folder).read_text()


def test_a_run_on_other_shards_is_refused(run_folder: Path) -> None:
    other = other_run(run_folder)
    record = read_run(other).record
    change(other, "config.json", facts=record["facts"] | {"partitions": []})
    with pytest.raises(ConfigError, match="other was run on other rows than"):
        write_report(run_folder, other)
    change(other, "config.json", config=record["config"] | {"seed": 2})
    with pytest.raises(ConfigError, match="another 'seed' than"):
        write_report(run_folder, other)
