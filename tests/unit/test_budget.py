"""What --budget-bytes chooses, and that it is what a run then sends."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.budget import fit_budget
from experiments.engines import run_inprocess
from fedmask.config import RunConfig, from_dict
from fedmask.errors import ConfigError
from fedmask.ledger import Ledger
from tests.apps.fakes import quick_app
from tests.support import save_two_tasks

Make = Callable[..., RunConfig]
LABELS = {"mood": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_tasks(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Make:
    def build(**changes: object) -> RunConfig:
        task = {
            "name": "mood",
            "source": str(tiny / "mood.tsv"),
            "text": ["text"],
            "label": "label",
            "clients": 3,
        }
        values = {
            "model": str(tiny / "model"),
            "density": 0.2,
            "rounds": 3,
            "workers": 1,
            "eval_rows": 20,
            "overlap_batches": 0,
            "train": {"steps": 1, "max_tokens": 16},
            "tasks": [task],
            "runs_dir": str(tmp_path),
        }
        return from_dict(values | changes)

    return build


def test_a_budget_makes_values_coarser_then_the_mask_smaller(make: Make) -> None:
    config = make()
    found = [fit_budget(config, LABELS, budget)[0] for budget in (40_000, 20_000, 12_000, 7_000, 4_000)]
    assert [(one.up, one.down) for one in found] == [
        ("fp32", "fp32"),
        ("fp16", "fp16"),
        ("int8+ef", "int8+delta"),
        ("int4+ef", "int4+delta"),
        ("int4+ef", "int4+delta"),
    ]
    assert [one.density for one in found[:4]] == [0.2] * 4
    assert 0 < found[4].density < 0.2


@pytest.mark.parametrize("changes", [{}, {"server": {"clients_per_round": 2}}])
@pytest.mark.parametrize("budget", [12_000, 4_000])
def test_no_round_of_a_run_exceeds_the_budget(make: Make, budget: int, changes: dict[str, object]) -> None:
    config, said = fit_budget(make(**changes), LABELS, budget)
    assert said.endswith(f"of {budget:,} bytes a client and round")
    result = run_inprocess(config, make_app=quick_app, client_evaluation=False)
    ledger = Ledger.read_jsonl(result.folder / "ledger.jsonl")
    sums = [one.message_bytes for one in ledger.totals("round", "client", kind="train").values()]
    assert max(sums) <= budget
    if budget == 4_000:  # all is used but for some bytes: this client has fewer metrics than a real one
        assert max(sums) > budget - 60


def test_a_budget_that_is_too_small_names_the_least(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"needs at least ([0-9,]+) bytes") as said:
        fit_budget(make(), LABELS, 1000)
    least = int(str(said.value).split("give ")[1].split()[0])
    assert fit_budget(make(), LABELS, least)[0].density < 0.2
    with pytest.raises(ConfigError):
        fit_budget(make(), LABELS, least - 1)


def test_a_method_without_a_mask_goes_on_to_coarser_codecs(make: Make) -> None:
    config = make(method="full")
    up = [fit_budget(config, LABELS, budget)[0].up for budget in (22_000, 12_000, 7_000)]
    assert up == ["int2+ef", "sign", "topk:0.03/int4"]
    with pytest.raises(ConfigError, match=r"method 'full' needs at least"):
        fit_budget(config, LABELS, 3000)
