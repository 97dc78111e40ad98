"""docs/results.md from the published results: ``python -m experiments.compare.page``.

For each study in ``experiments/results/compare`` its tables and figures are made anew, and those that the
page shows are written between its ``<!-- STUDY:TABLE -->`` and ``<!-- end -->`` marks.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from experiments.compare.report import write_comparison
from experiments.compare.study import load_study
from experiments.options import STUDIES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "experiments" / "results" / "compare"
_BLOCK = re.compile(r"(<!-- ([\w.-]+):(\w+) -->\n).*?(<!-- end -->)", re.S)


def filled(text: str, results: Path) -> str:
    """The page with every block made from the Markdown table of its study in ``results``."""

    def block(match: re.Match[str]) -> str:
        table = (results / match[2] / "tables" / f"{match[3]}.md").read_text(encoding="utf-8")
        return f"{match[1]}{table}{match[4]}"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Write tables, figures and the page."""
    for cells in sorted(RESULTS.glob("*/cells")):
        folder = cells.parent
        file = STUDIES / "compare" / f"{folder.name}.toml"
        command = f"fedmask compare {file.relative_to(ROOT)} --out {folder.relative_to(ROOT)}"
        write_comparison(load_study(file), folder, command)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
