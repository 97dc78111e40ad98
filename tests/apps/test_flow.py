"""The whole flow of a run through the in-process grid."""

from __future__ import annotations

import json
from collections.abc import Callable

from experiments.engines import run_inprocess
from fedmask.config import RunConfig
from fedmask.ledger import Ledger

MakeConfig = Callable[..., RunConfig]


def test_a_run_writes_its_folder(make_config: MakeConfig) -> None:
    result = run_inprocess(make_config())
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {"config.json", "rounds.jsonl", "ledger.jsonl", "summary.json", "delta.safetensors"}
    rows = [json.loads(line) for line in (result.folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    print(json.dumps(rows, indent=1))
    print((result.folder / "summary.json").read_text())
    print((result.folder / "config.json").read_text()[:3000])
    ledger = Ledger.read_jsonl(result.folder / "ledger.jsonl")
    print(ledger.totals("kind", "direction", "status"))
