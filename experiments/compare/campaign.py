"""A study on its way: what is done, what comes next, and what it has come to so far."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experiments.compare.budget import resolve
from experiments.compare.choose import Winner, choose
from experiments.compare.data import Prepared, from_hub, prepare
from experiments.compare.plan import CELLS, Cell, fingerprint, grid, repeats, run_config, settings_of
from experiments.compare.runner import Task
from experiments.compare.study import Study, Variant
from fedmask.config import RunConfig
from fedmask.errors import ConfigError


class Campaign:
    """The runs of one study in one folder.

    The search over learning rates comes first, a rate of each variant in turn, from the middle of the grids;
    then the other seeds, seed by seed. So what is finished at any time compares. ``only``: names of the
    variants to run (empty: all). ``retry``: run again what has failed.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        data: Path | None,
        only: Collection[str] = (),
        *,
        retry: bool = False,
    ) -> None:
        """Cuts the rows and finds the sizes; raises ConfigError and DataError before anything runs."""
        self.study = study
        self.out = out
        self.wanted = [study.variant(name) for name in only] or list(study.variants)
        self.retry = retry
        if from_hub(study, data):
            self._refuse_other_rows()
        self.prepared: Mapping[str, Prepared] = prepare(study, data, out / "data")
        self.sizes = resolve(study, partial(self._sized, lr=None))
        self._begun: set[Cell] = set()

    def _refuse_other_rows(self) -> None:
        """Runs on fetched rows would take the place of those on files. Nothing is written before."""
        print("no data folder, so rows come from the Hugging Face hub", file=sys.stderr)
        with tempfile.TemporaryDirectory() as cut:
            fetched = prepare(self.study, None, Path(cut))
        others = [one for one in all_results(self.out) if not made_of(self.study, fetched, one)]
        if others:
            raise ConfigError(
                f"{self.out}: {len(others)} results there are of other rows than those that the hub has; name"
                " the data folder of theirs, or another --out"
            )

    def _sized(self, variant: Variant, sizes: Mapping[str, Any], lr: float | None) -> RunConfig:
        settings = settings_of(self.study, variant, lr or variant.lr[0], self.study.seeds[0], sizes)
        return self._config(settings, Cell(variant.name, 0.0, 0))

    def _config(self, settings: Mapping[str, Any], cell: Cell) -> RunConfig:
        files = {name: one.files for name, one in self.prepared.items()}
        name = cell.key.replace("/", ".").replace("+", "-and-")
        return run_config(self.study, settings, files, name=name, runs_dir=self.out / "unfinished")

    def task(self, cell: Cell) -> Task:
        """What a worker needs to run a cell."""
        variant = self.study.variant(cell.variant)
        settings = settings_of(self.study, variant, cell.lr, cell.seed, self.sizes[variant.name])
        return Task(
            study=self.study.name,
            cell=cell,
            config=self._config(settings, cell),
            settings=settings,
            fingerprint=fingerprint(settings, self.study, self.prepared),
            target=cell.path(self.out),
        )

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result, finished or failed; None without one, or for one of other settings or rows."""
        found = read_result(cell.path(self.out))
        if found is None or found.get("fingerprint") != self.task(cell).fingerprint:
            return None
        return found

    def counts(self, result: Mapping[str, Any]) -> bool:
        """Whether a result was made of the rows that are there now, and of tasks as the study states them."""
        return made_of(self.study, self.prepared, result)

    def winner(self, variant: Variant) -> Winner | None:
        """The learning rate of the variant's further seeds; None while its search goes on."""
        found = [self.result(cell) for cell in grid(self.study, variant)]
        results = [one for one in found if one is not None]
        if len(results) < len(found):
            return None
        return choose(results, variant.lr, self.study.select)

    def cells(self) -> Iterator[Cell]:
        """Every cell that can be run by what is known now, in the order in which it should be."""
        searches = [_from_the_middle(grid(self.study, variant)) for variant in self.wanted]
        for number in range(max(map(len, searches))):
            yield from (search[number] for search in searches if number < len(search))
        winners = {variant.name: self.winner(variant) for variant in self.wanted}
        for number in range(len(self.study.seeds) - 1):
            for variant in self.wanted:
                winner = winners[variant.name]
                if winner is not None:
                    yield repeats(self.study, variant, winner.lr)[number]

    def next_task(self) -> Task | None:
        """The next run that is not done and not begun; None when there is none for now."""
        for cell in self.cells():
            if cell in self._begun:
                continue
            found = self.result(cell)
            if found is not None and (found["status"] == "ok" or not self.retry):
                continue
            self._begun.add(cell)
            return self.task(cell)
        return None

    def progress(self) -> tuple[int, int]:
        """(runs with a result, all runs): of searches that go on, the further seeds count too."""
        done = total = 0
        for variant in self.wanted:
            winner = self.winner(variant)
            cells = grid(self.study, variant)
            total += len(cells) + len(self.study.seeds) - 1
            cells += repeats(self.study, variant, winner.lr) if winner else []
            done += sum(self.result(cell) is not None for cell in cells)
        return done, total


def made_of(study: Study, prepared: Mapping[str, Prepared], result: Mapping[str, Any]) -> bool:
    """Whether a result was made of the rows in ``prepared`` and of tasks as the study states them."""
    return bool(result.get("fingerprint") == fingerprint(result["settings"], study, prepared))


def _from_the_middle(cells: list[Cell]) -> list[Cell]:
    """The middle rates first, they are the likeliest; of two as far from it the larger one.

    So an unfinished search says the most: few rounds want large steps.
    """
    middle = (len(cells) - 1) / 2
    return sorted(cells, key=lambda cell: (abs(cells.index(cell) - middle), -cell.lr))


def read_result(path: Path) -> dict[str, Any] | None:
    """A result file as plain values; None when it is not there. Raises ConfigError for a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected a result as JSON ({error}); remove it, and it is run again"
        ) from None
    if not isinstance(value, dict) or "status" not in value:
        raise ConfigError(f"{path}: expected a result, found something else; remove it to run it again")
    return value


def all_results(out: Path) -> list[dict[str, Any]]:
    """Every result in a study's folder, sorted by variant, rate and seed. Raises ConfigError."""
    found = [read_result(path) for path in sorted((out / CELLS).glob("*/*.json"))]
    results = [one for one in found if one is not None]
    return sorted(results, key=lambda one: (one["variant"], one["lr"], one["seed"]))
