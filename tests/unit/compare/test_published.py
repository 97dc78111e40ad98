"""What is published follows from the results that lie beside it, and the page shows the same tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from experiments.compare.report import write_comparison
from experiments.compare.study import load_study
from experiments.options import STUDIES

ROOT = Path(__file__).parents[3]
PUBLISHED = sorted((ROOT / "experiments" / "results" / "compare").glob("*/cells"))


@pytest.mark.parametrize("cells", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_tables_follow_from_the_published_results(cells: Path, tmp_path: Path) -> None:
    folder = cells.parent
    study = load_study(STUDIES / "compare" / f"{folder.name}.toml")
    shutil.copytree(cells, tmp_path / "cells")
    tables = write_comparison(study, tmp_path, "")
    assert tables
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for table in tables:
        for ending, text in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            assert (folder / "tables" / f"{table.name}.{ending}").read_text(encoding="utf-8") == text
        if table.name in ("quality", "search", "state"):
            assert table.markdown() in page, f"docs/results.md: {folder.name}: table {table.name}"


def test_something_is_published() -> None:
    assert PUBLISHED
