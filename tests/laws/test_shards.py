"""Every training row is with exactly one client, whatever the labels, kind and number of clients."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmask.config import PartitionConfig, RunConfig, TaskConfig
from fedmask.errors import ConfigError, DataError
from fedmask.tasks import TaskData, assignments, shards, split_held_out
from fedmask.tasks.partitioners import KINDS

LAW = settings(deadline=None, max_examples=60)


def task_data(labels: list[int] | list[float], sites: list[str | None] | None = None) -> TaskData:
    """A task whose training rows have these labels; a fractional label makes it a regression."""
    regression = any(isinstance(label, float) for label in labels)
    types = {"text": Value("string"), "label": Value("float64" if regression else "int64")}
    columns = {"text": [f"text {row}" for row in range(len(labels))], "label": labels}
    if sites is not None:
        columns["site"], types["site"] = sites, Value("string")
    train = Dataset.from_dict(columns, Features(types))
    names = () if regression else tuple(f"label {number}" for number in range(max(labels) + 1))
    kind = "regression" if regression else "classification"
    return TaskData("mood", kind, names, "accuracy", train=train, dev=train, test=train)


def deal(
    data: TaskData, clients: int, seed: int = 1, name: str = "mood", **settings: object
) -> list[np.ndarray]:
    partition = PartitionConfig(column="site", **settings)
    return shards(TaskConfig(name=name, clients=clients), data, partition, seed)


def assert_exact_cover(found: list[np.ndarray], rows: int, clients: int) -> None:
    assert len(found) == clients and all(len(part) > 0 for part in found)
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(rows))
    assert all(part.dtype == np.int64 and np.array_equal(part, np.sort(part)) for part in found)


@LAW
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=50) | st.lists(st.floats(0, 5), min_size=1, max_size=50),
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 8),
    st.sampled_from([0.05, 0.5, 100.0]),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_exact_cover_or_an_error(
    labels: list, kind: str, clients: int, alpha: float, per: int, seed: int
) -> None:
    sites = [f"site {row % clients}" for row in range(len(labels))]
    data = task_data(labels, sites)
    try:
        found = deal(
            data, clients, seed, kind=kind, alpha=alpha, classes_per_client=per, shards_per_client=per
        )
    except DataError as error:
        # Only these may fail when there are rows enough, and they say what to change.
        assert clients > len(labels) or kind in ("dirichlet", "quantity", "pathological"), error
        assert any(word in str(error) for word in ("alpha", "classes_per_client", "clients"))
    else:
        assert_exact_cover(found, len(labels), clients)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_all_kinds_work_on_an_ordinary_task(kind: str) -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, 997).tolist()
    data = task_data(labels, [f"site {number}" for number in rng.permutation(997) % 7])
    assert_exact_cover(deal(data, 7, kind=kind), 997, 7)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_same_arguments_give_the_same_shards_and_no_global_state_takes_part(kind: str) -> None:
    labels = [row % 4 for row in range(200)]
    data = task_data(labels, [f"site {row % 5}" for row in range(200)])
    np.random.seed(7)
    random.seed(7)
    before = (np.random.get_state()[1].tolist(), random.getstate())
    one = deal(data, 5, kind=kind)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before
    np.random.seed(8)
    two = deal(data, 5, kind=kind)
    assert [part.tolist() for part in one] == [part.tolist() for part in two]
    if kind != "natural":
        for other in (deal(data, 5, seed=2, kind=kind), deal(data, 5, name="other", kind=kind)):
            assert [part.tolist() for part in one] != [part.tolist() for part in other]


def test_the_shards_of_one_seed_stay_what_they_are() -> None:
    data = task_data([row % 3 for row in range(12)], [f"site {row % 3}" for row in range(12)])
    found = {kind: [part.tolist() for part in deal(data, 3, kind=kind, alpha=1.0)] for kind in sorted(KINDS)}
    assert found == GOLDEN


def label_counts(data: TaskData, part: np.ndarray) -> Counter:
    return Counter(np.asarray(data.train["label"][:])[part].tolist())


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    data = task_data([row % 4 for row in range(4000)])

    def spread(alpha: float) -> float:
        shares = [label_counts(data, part)[0] / len(part) for part in deal(data, 5, alpha=alpha)]
        return float(np.std(shares))

    assert spread(1000.0) < 0.02 < 0.1 < spread(0.1)


def test_pathological_clients_hold_exactly_their_classes() -> None:
    data = task_data([row % 6 for row in range(600)])
    found = deal(data, 8, kind="pathological", classes_per_client=3)
    assert [len(label_counts(data, part)) for part in found] == [3] * 8
    # The circle starts elsewhere for another seed.
    starts = {
        tuple(sorted(label_counts(data, deal(data, 8, seed, kind="pathological")[0]))) for seed in range(6)
    }
    assert len(starts) > 1


def test_shards_are_blocks_of_sorted_rows() -> None:
    data = task_data([row % 4 for row in range(400)])
    found = deal(data, 8, kind="shard", shards_per_client=2)
    assert [len(part) for part in found] == [50] * 8
    assert all(len(label_counts(data, part)) <= 2 for part in found)


def test_quantity_skew_leaves_labels_alone() -> None:
    data = task_data([row % 2 for row in range(10_000)])
    found = deal(data, 5, kind="quantity", alpha=1.0)
    assert max(map(len, found)) > 3 * min(map(len, found))
    largest = label_counts(data, max(found, key=len))
    assert largest[0] / largest.total() == pytest.approx(0.5, abs=0.05)


def test_iid_is_equal_parts_in_random_order() -> None:
    data = task_data([0] * 50 + [1] * 50)
    found = deal(data, 3, kind="iid")
    assert sorted(map(len, found)) == [33, 33, 34]
    assert all(label_counts(data, part)[0] > 5 and label_counts(data, part)[1] > 5 for part in found)


def test_natural_clients_follow_the_column(capfd: pytest.CaptureFixture[str]) -> None:
    sites = ["b", "a", "b", "c", "a"]
    found = deal(task_data([0, 1, 0, 1, 1], sites), 3, kind="natural")
    assert [part.tolist() for part in found] == [[1, 4], [0, 2], [3]]
    assert capfd.readouterr() == ("", "")


def test_natural_by_label() -> None:
    task = TaskConfig(name="mood", clients=2, label="stars")
    partition = PartitionConfig(kind="natural", column="stars")
    found = shards(task, task_data([1, 0, 1]), partition, 1)
    assert [part.tolist() for part in found] == [[1], [0, 2]]


def test_regression_labels_are_dealt_by_range() -> None:
    values = [row / 100 for row in range(1000)]
    found = deal(task_data(values), 5, kind="pathological", classes_per_client=6)
    assert_exact_cover(found, 1000, 5)
    tenths = [{row // 100 for row in part.tolist()} for part in found]
    assert [len(found) for found in tenths] == [6] * 5


@pytest.mark.parametrize(
    ("labels", "clients", "settings", "message"),
    [
        ([0, 1], 3, {"kind": "iid"}, "there are only 2 training rows; lower clients to 2"),
        ([0] * 30, 25, {"alpha": 0.01}, r"alpha=0\.01 left a client without .* raise alpha"),
        ([0] * 30, 25, {"kind": "quantity", "alpha": 0.01}, r"alpha=0\.01 left a client without rows"),
        ([0, 1, 0], 2, {"kind": "pathological", "classes_per_client": 3}, "classes_per_client of at most 2"),
        (
            [0, 1, 2, 3, 4] * 3,
            2,
            {"kind": "pathological"},
            "leave labels to no client; raise classes_per_client to 4 or clients to 4",
        ),
        ([0] * 9 + [1], 4, {"kind": "pathological"}, "label 'label 1' has 1 rows for 4 clients"),
        ([0, 1, 0], 2, {"kind": "natural"}, "column 'site' has 3 values; set clients to 3"),
        ([0, 1, 0], 3, {"kind": "natural", "column": "sites"}, "'sites'; the nearest is 'site'"),
    ],
)  # fmt: skip
def test_what_cannot_be_dealt(labels: list[int], clients: int, settings: dict, message: str) -> None:
    data = task_data(labels, [f"site {row}" for row in range(len(labels))])
    partition = PartitionConfig(**({"column": "site"} | settings))
    with pytest.raises(DataError, match=message) as caught:
        shards(TaskConfig(name="mood", clients=clients), data, partition, 1)
    kind = settings.get("kind", "dirichlet")
    assert str(caught.value).startswith(f"task 'mood', partition {kind}, {clients} clients: ")


def test_rows_without_a_natural_client() -> None:
    with pytest.raises(DataError, match="column 'site' has no value in train row 2"):
        deal(task_data([0, 1], ["a", None]), 1, kind="natural")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0, 1], [2]], "found 1 rows that no client holds and 0 that are dealt twice"),
        ([[0, 1, 2], [2, 3]], "found 0 rows that no client holds and 1 that are dealt twice"),
        ([[0, 1, 2, 3], []], r"client 1 has no rows \(alpha=0\.5\); raise alpha"),
    ],
)
def test_a_partitioner_that_drops_or_doubles_rows_is_caught(
    monkeypatch: pytest.MonkeyPatch, parts: list[list[int]], message: str
) -> None:
    found = [np.array(part, dtype=np.int64) for part in parts]
    monkeypatch.setitem(KINDS, "iid", lambda deal: found)
    with pytest.raises(DataError, match=message):
        deal(task_data([0, 1, 0, 1]), 2, kind="iid")


@given(
    st.lists(st.integers(0, 4), max_size=60),
    st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.99]) | st.floats(0, 0.99),
    st.integers(0, 3),
)
def test_held_out_rows_are_a_part_and_never_all(labels: list[int], fraction: float, seed: int) -> None:
    rows = np.arange(len(labels), dtype=np.int64) * 3
    draws = [split_held_out(rows, np.array(labels), fraction, np.random.default_rng(seed)) for _ in range(2)]
    (train, held), again = draws
    assert np.array_equal(np.sort(np.concatenate([train, held])), rows)
    assert np.array_equal(train, again[0]) and np.array_equal(held, again[1])
    if rows.size:
        assert len(train) >= 1
    if not fraction or len(rows) < 2:
        assert len(held) == 0
    else:
        assert len(held) == min(max(1, round(fraction * len(rows))), len(rows) - 1)


def test_held_out_rows_are_spread_over_the_labels() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    for seed in range(5):
        rows = np.arange(100, dtype=np.int64)
        _, held = split_held_out(rows, labels, 0.2, np.random.default_rng(seed))
        counts = np.bincount(labels[held], minlength=3)
        assert np.all(np.abs(counts - [12, 6, 2]) <= 1)


def test_bad_held_out_calls() -> None:
    rng, rows = np.random.default_rng(0), np.arange(3, dtype=np.int64)
    with pytest.raises(ConfigError, match="held_out: expected a number at least 0 and less than 1, found 1"):
        split_held_out(rows, np.zeros(3), 1.0, rng)
    with pytest.raises(DataError, match="expected one label for each of 3 rows, found 2"):
        split_held_out(rows, np.zeros(2), 0.1, rng)


def test_partition_ids_run_over_the_tasks_in_order() -> None:
    config = RunConfig(tasks=(TaskConfig(name="tweets", clients=2), TaskConfig(name="bbc", clients=1)))
    assert assignments(config) == (("tweets", 0), ("tweets", 1), ("bbc", 0))


GOLDEN = {
    "dirichlet": [[7], [0, 1, 5, 8, 9, 10], [2, 3, 4, 6, 11]],
    "iid": [[0, 5, 7, 8], [2, 9, 10, 11], [1, 3, 4, 6]],
    "natural": [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]],
    "pathological": [[5, 7, 8, 10], [0, 2, 9, 11], [1, 3, 4, 6]],
    "quantity": [[0], [5, 7, 8, 11], [1, 2, 3, 4, 6, 9, 10]],
    "shard": [[2, 5, 8, 11], [0, 7, 9, 10], [1, 3, 4, 6]],
}
