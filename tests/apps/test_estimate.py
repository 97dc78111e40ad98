"""An estimate from shapes alone against what the run then measures, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from experiments.engines import run_inprocess
from experiments.estimate import estimate, label_counts, parse_link
from fedmask.config import RunConfig, from_dict
from fedmask.errors import ConfigError
from fedmask.ledger import Ledger

MakeConfig = Callable[..., RunConfig]
LABELS = {"mood": 2, "topic": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "pafi+hiwi"},
        {"method": "pafi", "up": "fp16", "mask_transport": "packed", "density": 0.05},
        {"method": "hiwi", "up": "topk:0.1/int8", "down": "int4+delta", "server": {"clients_per_round": 2}},
        {"method": "gradient", "up": "int8", "down": "int4+delta", "rounds": 3},
        {"method": "lora", "up": "sign", "down": "fp16"},
        {"method": "fedex-lora", "up": "fp16", "lora": {"rank": 2}},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_an_estimate_is_within_a_percent_of_the_run(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    config = make_config(train={"steps": 1, "batch_size": 4, "max_tokens": 8}, **changes)
    said = estimate(config, label_counts(config, None), (10.0, 50.0))
    assert label_counts(config, "mood=2,topic=3") == label_counts(config, None) == LABELS
    result = run_inprocess(config)
    ledger = Ledger.read_jsonl(result.folder / "ledger.jsonl")
    for row in said["rows"]:
        found = ledger.total(kind=row["kind"], direction=row["direction"])
        assert row["messages"] == found.messages
        for key in ("payload_bytes", "message_bytes"):
            assert row[key] == pytest.approx(getattr(found, key), rel=0.01), (row["kind"], key)
    total = ledger.total()
    assert said["total"]["payload_bytes"] == pytest.approx(total.payload_bytes, rel=0.01)
    assert said["total"]["message_bytes"] == pytest.approx(total.message_bytes, rel=0.01)
    assert said["per_client_round"]["up"]["payload_bytes"] == pytest.approx(
        ledger.total(kind="train", direction="up").payload_bytes / said["rows"][2]["messages"], rel=0.01
    )
    for way, cost in result.summary["costs"].items():
        if way != "client-masks":  # its unions are measured only by the run
            assert said["costs"][way]["total_bytes"] == pytest.approx(cost["total_bytes"], rel=0.01)


def test_seconds_on_a_link_are_those_of_the_slowest_client(make_config: MakeConfig) -> None:
    config = make_config(rounds=3)
    said = estimate(config, LABELS, parse_link("8/80"))
    rows = {(row["kind"], row["direction"]): row["message_bytes"] / row["messages"] for row in said["rows"]}
    topic = said["seconds"]["round"]  # three labels: the longer vector
    mean = rows["train", "up"] / 1e6 + rows["train", "down"] / 1e7
    assert mean < topic < 1.1 * mean
    assert 3 * topic < said["seconds"]["run"] < 5 * topic
    twice = estimate(config, LABELS, parse_link("4/40"))
    assert twice["seconds"]["run"] == pytest.approx(2 * said["seconds"]["run"])
    assert parse_link("lan") == (1000.0, 1000.0)


def test_a_vector_too_long_to_be_made_costs_in_proportion() -> None:
    config = from_dict({"model": "gpt2", "method": "full", "tasks": [{"name": "task", "clients": 2}]})
    said = estimate(config, {"task": 2}, (10.0, 50.0))
    values = 124_439_808 + 2 * 769
    assert said["per_client_round"]["up"]["payload_bytes"] == pytest.approx(4 * values, rel=1e-4)
    assert 4 * values < said["per_client_round"]["up"]["message_bytes"] < 4.01 * values


def test_masks_that_differ_are_not_estimated(make_config: MakeConfig) -> None:
    for changes in (
        {"method": "gradient", "placement": "client"},
        {"method": "pafi", "mask_schedule": "rotate"},
    ):
        with pytest.raises(ConfigError, match="expected one fixed mask"):
            estimate(make_config(**changes), LABELS, (10.0, 50.0))
    with pytest.raises(ConfigError, match="only the run knows what that is"):
        estimate(make_config(method="fedex-lora", server={"clients_per_round": 2}), LABELS, (10.0, 50.0))


@pytest.mark.parametrize("text", ["10", "0/5", "a/b", "10/50/1", "inf/5", "wifi"])
def test_links_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--link"):
        parse_link(text)


@pytest.mark.parametrize("text", ["", "two", "mood=2", "mood=0,topic=3", "mode=2,topic=3"])
def test_labels_that_are_none(make_config: MakeConfig, text: str) -> None:
    with pytest.raises(ConfigError, match="--labels"):
        label_counts(make_config(), text)
