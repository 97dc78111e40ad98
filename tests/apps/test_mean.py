"""The strategy ``mean`` in a federation: FedAvg's values, no replies held, any order of arrival."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from flwr.app import Message

from experiments.engines import run_inprocess
from experiments.inprocess import InProcessGrid
from fedmask.config import RunConfig, ServerConfig
from fedmask.errors import ConfigError, FederationError
from server.catalogue import resolve
from server.strategy import Contribution, ServerStrategy
from server.streaming import StreamingMean, make_strategy
from tests.apps.fakes import quick_app
from tests.apps.grids import ShuffledGrid, TamperedGrid, read_rows, run_on

MakeConfig = Callable[..., RunConfig]
MEAN = {"strategy": "mean"}


def _replies(seed: int = 0, count: int = 9) -> list[Contribution]:
    rng = np.random.default_rng(seed)
    return [
        Contribution(
            client,
            f"task{client % 2}",
            int(rng.integers(1, 90)),
            (0.01 * rng.standard_normal(46)).astype(np.float32),
        )
        for client in range(count)
    ]


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_it_is_fedavg_to_rounding(weighting: str) -> None:
    shared = np.random.default_rng(5).standard_normal(40).astype(np.float32)
    heads = {f"task{i}": np.full(6, i, np.float32) for i in range(3)}
    flower = ServerStrategy("fedavg", {}, weighting).combine(1, shared, heads, _replies())
    found = []
    for turn in range(9):
        tally = StreamingMean({}, weighting).start(1, shared, heads, 9 * 90)  # type: ignore[arg-type]
        for reply in _replies()[turn:] + _replies()[:turn]:
            tally.add(reply)
        combined = tally.result()
        np.testing.assert_allclose(combined.shared, flower.shared, rtol=2e-6, atol=1e-7)
        for task, head in flower.heads.items():
            np.testing.assert_allclose(combined.heads[task], head, rtol=1e-6, atol=1e-8)
        assert (combined.selected, combined.note) == (flower.selected, "")
        assert combined.shared.dtype == np.float32
        found.append((combined.shared.tobytes(), *(head.tobytes() for head in combined.heads.values())))
    assert len(set(found)) == 1


def test_replies_are_let_go_at_once() -> None:
    tally = StreamingMean().start(1, np.zeros(40, np.float32), {"task0": np.zeros(6, np.float32)}, 100)
    (reply,) = _replies(count=1)
    held = weakref.ref(reply.change)
    tally.add(reply)
    del reply
    gc.collect()
    assert held() is None


def test_no_replies_keep_the_vector() -> None:
    shared, heads = np.ones(3, np.float32), {"a": np.ones(1, np.float32)}
    kept = StreamingMean().start(1, shared, heads, 10).result()
    assert kept.shared is shared and kept.selected == () and "no replies" in kept.note


def test_what_leaves_the_range_is_an_error() -> None:
    shared = np.full(1, np.finfo(np.float32).max, np.float32)
    tally = StreamingMean().start(1, shared, {"a": np.zeros(0, np.float32)}, 10)
    tally.add(Contribution(0, "a", 1, np.array([1e4], np.float32)))
    assert np.isfinite(tally.result().shared).all()
    tally = StreamingMean().start(1, np.array([np.inf], np.float32), {"a": np.zeros(0, np.float32)}, 10)
    tally.add(Contribution(0, "a", 1, np.array([1.0], np.float32)))
    with pytest.raises(FederationError, match="range of float32"):
        tally.result()


def test_it_is_chosen_by_name() -> None:
    assert isinstance(make_strategy(ServerConfig(strategy="Mean")), StreamingMean)
    assert isinstance(make_strategy(ServerConfig()), ServerStrategy)
    assert resolve("mean") == "mean" and StreamingMean().state() == {}
    with pytest.raises(ConfigError, match="'mean' takes no options, found 'eta'"):
        make_strategy(ServerConfig(strategy="mean", options={"eta": 1.0}))
    with pytest.raises(ConfigError, match="none of Flower's strategies"):
        ServerStrategy("mean")


def test_the_order_leaves_no_trace(make_config: MakeConfig) -> None:
    def run(grid: InProcessGrid) -> str:
        with grid:
            return str(run_on(grid).summary["vector_sha256"])

    config = make_config(server=MEAN)
    found = {run(ShuffledGrid(config, seed)) for seed in (1, 2)}
    found.add(run(InProcessGrid(config)))
    assert len(found) == 1
    flower = run_on(InProcessGrid(make_config(name="flower"))).state
    mean = run_on(InProcessGrid(config)).state
    np.testing.assert_allclose(mean.shared, flower.shared, rtol=1e-3, atol=1e-5)


def test_bad_replies_are_refused_as_ever(make_config: MakeConfig) -> None:
    def tamper(client: int, number: int, reply: Message) -> list[Message]:
        if client == 1:
            reply.content.metric_records["metrics"]["num-examples"] = 10**9
        return [reply, reply] if client == 2 else [reply]

    config = make_config(server=MEAN)
    result = run_on(TamperedGrid(config, tamper, quick_app))  # type: ignore[arg-type]
    for row in read_rows(result.folder, "rounds")[1:]:
        assert row["replied"] == row["selected"] == [0, 2, 3, 4]
        assert {one["client"] for one in row["rejected"]} == {1, 2}
    with pytest.raises(FederationError, match="at least 5 usable replies"):
        run_on(TamperedGrid(make_config(server={**MEAN, "min_replies": 5}), tamper, quick_app))  # type: ignore[arg-type]


def test_a_run_from_settings(make_config: MakeConfig) -> None:
    result = run_inprocess(make_config(method="head", server=MEAN), client_evaluation=False)
    assert result.state.shared.size == 0
    assert all(float(np.abs(head).max()) > 0 for head in result.state.heads.values())


def test_any_number_of_workers_gives_the_same_bits(make_config: MakeConfig) -> None:
    one, two = (
        run_inprocess(
            make_config((3,), name=f"by-{workers}", rounds=2, workers=workers, server=MEAN),
            client_evaluation=False,
        )
        for workers in (1, 2)
    )
    assert one.summary["vector_sha256"] == two.summary["vector_sha256"]
    assert float(np.abs(two.state.shared).max()) > 0
