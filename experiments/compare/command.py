"""The command ``fedmask compare``: run what is left of a study, then write its tables and figures."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.compare.campaign import Campaign, made_of
from experiments.compare.choose import Result, score_of
from experiments.compare.data import data_folder, prepare
from experiments.compare.jobs import run_all
from experiments.compare.report import PAGE, write_comparison
from experiments.compare.study import Study, load_study
from experiments.compare.tables import Table
from experiments.display import print_json, print_table
from experiments.options import STUDIES
from fedmask.errors import ConfigError, DataError

QUICK = STUDIES / "compare" / "quick.toml"
NOT_CHECKED = (
    "The study's rows were not at hand when this page was written, so it was not checked that the results are"
    " of these rows."
)


def compare(
    path: Path | None,
    *,
    quick: bool,
    data: Path | None,
    out: Path | None,
    only: Sequence[str],
    jobs: int,
    retry: bool,
    report_only: bool,
    as_json: bool,
) -> None:
    """Run, write and print. Raises FedmaskError for what is wrong with the study, before anything runs."""
    if (path is None) == (not quick):
        raise ConfigError(
            "expected a study's TOML file, or --quick for the embedded one; give one of the two"
        )
    if jobs < 1:
        raise ConfigError(f"--jobs: expected 1 or more, found {jobs}")
    source = path or QUICK
    study = load_study(source)
    folder = out or Path("runs") / "compare" / study.name
    if report_only:
        counts, note = _counted(study, data_folder(data))
    else:
        campaign = Campaign(study, folder, data_folder(data), only, retry=retry)
        _run(campaign, jobs)
        counts, note = campaign.counts, ""
    shown = "fedmask compare --quick" if quick else f"fedmask compare {_relative(source)}"
    tables = write_comparison(study, folder, shown, counts, note)
    _show(tables, folder, as_json=as_json)


def _counted(study: Study, data: Path | None) -> tuple[Callable[[Result], bool], str]:
    """Which results the report alone counts: those of the rows that are there now; else all, and a note."""
    try:
        with tempfile.TemporaryDirectory() as cut:
            prepared = prepare(study, data, Path(cut), fetch=False)
    except (ConfigError, DataError) as error:
        _say(f"not checked that the results are of the study's rows, which are not there: {error}")
        return lambda result: True, NOT_CHECKED
    return partial(made_of, study, prepared), ""


def _relative(path: Path) -> str:
    """A path as a reader can type it: below the folder that the command runs in, where that is so."""
    full, here = path.absolute(), Path.cwd()
    return full.relative_to(here).as_posix() if full.is_relative_to(here) else path.name


def _run(campaign: Campaign, jobs: int) -> None:
    done, total = campaign.progress()
    _say(f"study {campaign.study.name}: {done} of {total} runs are done")
    for result in run_all(campaign.next_task, jobs):
        done, total = campaign.progress()
        _say(f"[{done}/{total}] {_line(result)}")


def _line(result: Mapping[str, Any]) -> str:
    what = f"{result['variant']}, lr {result['lr']:g}, seed {result['seed']}"
    if result["status"] != "ok":
        return f"{what}: failed: {result['error']}"
    last = result["curve"][-1]
    scores = f"validation {score_of(last, 'validation'):.3f}, reported {score_of(last, 'reported'):.3f}"
    return f"{what}: {scores}, {result['bytes']['payload'] / 1e6:.1f} MB, {result['seconds']:.0f} s"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(tables: Sequence[Table], folder: Path, *, as_json: bool) -> None:
    if as_json:
        found = {
            table.name: [dict(zip(table.header, row, strict=True)) for row in table.rows] for table in tables
        }
        print_json({"folder": str(folder), "report": str(folder / PAGE), "tables": found})
        return
    for table in tables:
        if table.name in ("quality", "state"):
            print_table(table.title, table.header, table.rows, left=1)
    print(f"Report: {folder / PAGE}")
