"""The ten strategies: what they see, what they give, and what heads make of their selection."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError
from fedmask.flower import ensure_identity
from server.catalogue import REFUSED, STRATEGIES
from server.strategy import Contribution, ServerStrategy
from tests.apps.fakes import quick_app
from tests.apps.grids import read_rows, run_on

MakeConfig = Callable[..., RunConfig]
SHARED, HEAD = 40, 6

OPTIONS: dict[str, dict[str, float]] = {
    "fedavg": {},
    "fedavgm": {"server_learning_rate": 0.5, "server_momentum": 0.9},
    "fedadam": {"eta": 0.01, "beta_1": 0.8, "tau": 0.01},
    "fedyogi": {"eta": 0.02},
    "fedadagrad": {"eta": 0.05},
    "fedmedian": {},
    "fedtrimmedavg": {"beta": 0.3},
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "bulyan": {"num_malicious_nodes": 1},
}
SELECTED = {"krum": 1, "multikrum": 3, "bulyan": 5}


def _replies(round: int, clients: int = 7, tasks: int = 2) -> list[Contribution]:
    rng = np.random.default_rng(round)
    return [
        Contribution(
            client,
            f"task{client % tasks}",
            int(rng.integers(5, 50)),
            rng.standard_normal(SHARED + HEAD).astype(np.float32),
        )
        for client in range(clients)
    ]


def _heads(tasks: int = 2) -> dict[str, np.ndarray]:
    return {f"task{i}": np.full(HEAD, i, np.float32) for i in range(tasks)}


def _plain_flower(name: str, rounds: int) -> list[np.ndarray]:
    """The same strategy as Flower runs it itself: whole vectors, weights of the equal-task rule."""

    class NoGrid:
        def get_node_ids(self) -> list[int]:
            return []

    ensure_identity()
    inner = STRATEGIES[name].cls(
        fraction_train=1.0, min_train_nodes=0, min_available_nodes=0, **OPTIONS[name]
    )
    vector, out = np.zeros(SHARED, np.float32), []
    for round in range(1, rounds + 1):
        replies = _replies(round)
        totals = {task: sum(r.examples for r in replies if r.task == task) for task in _heads()}
        list(inner.configure_train(round, ArrayRecord({"v": Array(vector)}), ConfigRecord(), NoGrid()))  # type: ignore[arg-type]
        messages = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord({"v": Array(vector + r.change[:SHARED])}),
                        "m": MetricRecord(
                            {"num-examples": r.examples * (sum(totals.values()) / 2) / totals[r.task]}
                        ),
                    }
                ),
                dst_node_id=1,
                message_type="train",
            )
            for r in replies
        ]
        arrays, _ = inner.aggregate_train(round, messages)
        assert arrays is not None
        vector = arrays["v"].numpy().astype(np.float32)
        out.append(vector)
    return out


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_shared_values_are_what_flower_gives(name: str) -> None:
    wanted = _plain_flower(name, rounds=3)
    strategy = ServerStrategy(name, OPTIONS[name])
    shared, heads = np.zeros(SHARED, np.float32), _heads()
    for round in range(1, 4):
        combined = strategy.combine(round, shared, heads, _replies(round)[::-1])
        assert combined.shared.dtype == np.float32
        assert combined.note == ""
        np.testing.assert_array_equal(combined.shared, wanted[round - 1])
        assert len(combined.selected) == SELECTED.get(name, 7)
        chosen = [r for r in _replies(round) if r.client in combined.selected]
        for task, head in heads.items():
            mine = [r for r in chosen if r.task == task]
            total = sum(r.examples for r in mine)
            mean = sum(r.examples * r.change[SHARED:].astype(np.float64) for r in mine) / max(1, total)
            expected = head + mean if mine else head
            np.testing.assert_allclose(combined.heads[task], expected, rtol=1e-6, atol=1e-6)
            assert combined.heads[task].dtype == np.float32
        shared, heads = combined.shared, combined.heads


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_order_of_replies_does_not_matter(name: str) -> None:
    found = []
    for turn in range(7):
        replies = _replies(1)
        replies = replies[turn:] + replies[:turn]
        combined = ServerStrategy(name, OPTIONS[name]).combine(
            1, np.zeros(SHARED, np.float32), _heads(), replies
        )
        found.append(
            (combined.shared.tobytes(), combined.selected, *(h.tobytes() for h in combined.heads.values()))
        )
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_state_goes_on_where_it_stopped(name: str) -> None:
    one, shared = ServerStrategy(name, OPTIONS[name]), np.zeros(SHARED, np.float32)
    states = []
    for round in range(1, 4):
        states.append((shared, {key: value.copy() for key, value in one.state().items()}))
        shared = one.combine(round, shared, _heads(), _replies(round)).shared
    assert states[2][1], "nothing is carried"
    two = ServerStrategy(name, OPTIONS[name])
    two.load_state(states[2][1])
    again = two.combine(3, states[2][0], _heads(), _replies(3)).shared
    np.testing.assert_array_equal(again, shared)


def test_hand_computed_mean() -> None:
    """Two tasks, three clients: tasks weigh equally, rows within a task."""
    change = {0: 1.0, 1: 4.0, 2: 10.0}
    replies = [
        Contribution(0, "a", 10, np.array([change[0], 1.0], np.float32)),
        Contribution(1, "a", 30, np.array([change[1], 5.0], np.float32)),
        Contribution(2, "b", 200, np.array([change[2], 7.0], np.float32)),
    ]
    heads = {"a": np.array([0.5], np.float32), "b": np.array([-1.0], np.float32)}
    start = np.array([2.0], np.float32)
    equal = ServerStrategy("FedAvg").combine(1, start, heads, replies)
    # a: (10 x 1 + 30 x 4) / 40 = 3.25; b: 10; mean of both 6.625
    np.testing.assert_allclose(equal.shared, [2.0 + 6.625], rtol=1e-6)
    np.testing.assert_allclose(equal.heads["a"], [0.5 + (10 * 1 + 30 * 5) / 40])
    np.testing.assert_allclose(equal.heads["b"], [6.0])
    rows = ServerStrategy("fed-avg", task_weighting="examples").combine(1, start, heads, replies)
    np.testing.assert_allclose(rows.shared, [2.0 + (10 * 1 + 30 * 4 + 200 * 10) / 240], rtol=1e-6)
    np.testing.assert_array_equal(rows.heads["a"], equal.heads["a"])


def test_one_attacker_does_not_reach_the_heads() -> None:
    """Krum leaves the outlier out of the shared values, and so of the heads."""
    replies = [
        Contribution(i, "task0", 10, np.full(SHARED + HEAD, 0.1 + 0.001 * i, np.float32)) for i in range(6)
    ]
    replies.append(Contribution(6, "task0", 10, np.full(SHARED + HEAD, 1000.0, np.float32)))
    for name in SELECTED:
        combined = ServerStrategy(name, OPTIONS[name]).combine(
            1, np.zeros(SHARED, np.float32), _heads(1), replies
        )
        assert 6 not in combined.selected
        assert float(np.abs(combined.heads["task0"]).max()) < 1.0


def test_heads_alone() -> None:
    replies = [Contribution(i, "a", 1 + i, np.array([float(i)], np.float32)) for i in range(3)]
    combined = ServerStrategy("fedavg").combine(
        1, np.zeros(0, np.float32), {"a": np.zeros(1, np.float32)}, replies
    )
    assert combined.shared.shape == (0,)
    np.testing.assert_allclose(combined.heads["a"], [(0 * 1 + 1 * 2 + 2 * 3) / 6])
    with pytest.raises(ConfigError, match="'krum' works on what all clients share"):
        ServerStrategy("krum").check(clients=7, shared=0)


@pytest.mark.parametrize(("name", "least"), [("krum", 5), ("multikrum", 5), ("bulyan", 7)])
def test_too_few_replies(name: str, least: int) -> None:
    strategy = ServerStrategy(name, OPTIONS[name])
    with pytest.raises(ConfigError, match=f"at least {least} replies a round, found {least - 1}"):
        strategy.check(clients=least - 1, shared=SHARED)
    strategy.check(clients=least, shared=SHARED)
    start, heads = np.ones(SHARED, np.float32), _heads()
    kept = strategy.combine(1, start, heads, _replies(1)[: least - 1])
    assert kept.shared is start
    assert kept.selected == ()
    assert f"needs {least} replies, found {least - 1}: the old vector stays" in kept.note
    np.testing.assert_array_equal(kept.heads["task0"], heads["task0"])


@pytest.mark.parametrize(
    "name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedmedian", "fedtrimmedavg"]
)
def test_one_reply_is_enough(name: str) -> None:
    combined = ServerStrategy(name, OPTIONS[name]).combine(
        1, np.zeros(SHARED, np.float32), _heads(), _replies(1)[:1]
    )
    assert np.isfinite(combined.shared).all()
    assert combined.note == ""


def test_a_strategy_without_a_result_keeps_the_old_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = ServerStrategy("fedavg")
    monkeypatch.setattr(strategy.inner, "aggregate_train", lambda *_: (None, None))
    start = np.ones(SHARED, np.float32)
    kept = strategy.combine(1, start, _heads(), _replies(1))
    assert (kept.shared is start, kept.note) == (True, "fedavg gave no result: the old vector stays")


def test_a_strategy_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = ServerStrategy("fedavg")

    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(strategy.inner, "aggregate_train", fail)
    with pytest.raises(FederationError, match="fedavg failed in round 4: division by zero"):
        strategy.combine(4, np.ones(SHARED, np.float32), _heads(), _replies(1))


def test_values_that_overflow_are_an_error() -> None:
    strategy = ServerStrategy("fedadam", {"eta": 1e42})
    with pytest.raises(FederationError, match="finite numbers in round 1; check its options"):
        strategy.combine(1, np.zeros(SHARED, np.float32), _heads(), _replies(1))


def test_every_other_strategy_is_refused_by_name() -> None:
    offered = {name.lower() for name in flower.__all__ if name not in ("Strategy", "Result")}
    assert set(STRATEGIES) | set(REFUSED) >= offered
    for name, why in REFUSED.items():
        with pytest.raises(ConfigError, match=f"{name!r} cannot be used: {why[:20]}"):
            ServerStrategy(name)
    with pytest.raises(ConfigError, match=r"unknown server\.strategy 'fedavgg'; the nearest is 'fedavg'"):
        ServerStrategy("fedavgg")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fedadam", {"etta": 1.0}, "unknown option of 'fedadam' 'etta'; the nearest is 'eta'"),
        ("fedavg", {"eta": 1.0}, "'fedavg' takes no options, found 'eta'"),
        ("fedtrimmedavg", {"beta": 0.5}, "server.options.beta: expected a number at least 0.0 and below 0.5"),
        ("krum", {"num_malicious_nodes": 1.5}, "expected a whole number at least 0"),
        ("krum", {"num_malicious_nodes": -1}, "found -1"),
        ("fedyogi", {"eta": 0.0}, "expected a number greater than 0.0"),
        ("fedadam", {"eta": float("nan")}, "found nan"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerStrategy(name, options)
    assert said in str(caught.value)


def test_flower_says_nothing_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flwr"):
        ServerStrategy("fedadam").combine(1, np.zeros(SHARED, np.float32), _heads(), _replies(1))
    assert caplog.records == []


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_two_rounds_of_a_federation(make_config: MakeConfig, name: str) -> None:
    config = make_config(clients=(5, 2), server={"strategy": name, "options": OPTIONS[name]}, name=name)
    result = run_on(InProcessGrid(config, make_app=quick_app))  # type: ignore[arg-type]
    rows = read_rows(result.folder, "rounds")
    assert [row["note"] for row in rows] == ["", "", ""]
    assert all(len(row["selected"]) == SELECTED.get(name, 7) for row in rows[1:])
    assert float(np.abs(result.state.shared).max()) > 0.0


def test_heads_of_a_federation_without_shared_values(make_config: MakeConfig) -> None:
    result = run_on(InProcessGrid(make_config(method="head")))
    assert result.state.shared.size == 0
    assert all(float(np.abs(head).max()) > 0 for head in result.state.heads.values())
    config = make_config(method="head", name="refused", server={"strategy": "fedmedian"})
    with pytest.raises(ConfigError, match="use 'fedavg'"):
        run_on(InProcessGrid(config))
    assert not (result.folder.parent / "refused").exists()
