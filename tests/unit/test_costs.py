import json
from dataclasses import replace

import numpy as np
import pytest

from fedmask.channel import value_bytes
from fedmask.costs import (
    RunFacts,
    compare,
    independent_union,
    lora_values,
    query_value_shapes,
    union_sizes,
)
from fedmask.errors import ConfigError

# Two clients, three rounds; client 1 joins in the second.
# 4 of 64 entries take log2 C(64, 4) = 19.3 bits: 3 bytes.
TINY = RunFacts(
    k=4,
    eligible_size=64,
    backbone_size=100,
    client_heads=(2, 3),
    schedule=((0,), (0, 1), (0, 1)),
    recipe_bytes=10,
    once_down_bytes=10,
    unions=(0, 4, 7),
    lora_values=16,
)
VALUES = 3 * (4 + 2) * 4 + 2 * (4 + 3) * 4  # client 0 three times, client 1 twice
HEADS = 3 * 2 * 4 + 2 * 3 * 4


def test_shared_mask_by_hand() -> None:
    cost = compare(TINY)["shared-mask"]
    assert VALUES == 128 and HEADS == 48
    assert (cost.up_bytes, cost.down_bytes) == (VALUES, VALUES + 2 * 10)
    assert (cost.index_up_bytes, cost.index_down_bytes) == (0, 20)
    assert (cost.head_up_bytes, cost.head_down_bytes) == (HEADS, HEADS)
    assert cost.client_rounds == 5
    assert cost.up_bytes_per_client_round == pytest.approx(25.6)
    assert cost.index_share == pytest.approx(20 / 276)
    assert cost.head_share == pytest.approx(96 / 276)


def test_agreed_mask_by_hand() -> None:
    cost = compare(TINY)["agreed-mask"]
    assert (cost.up_bytes, cost.down_bytes) == (VALUES + 2 * 3, VALUES + 2 * 3)
    assert cost.index_share == pytest.approx(12 / 268)
    assert "passes over local data" in cost.not_charged


def test_client_masks_by_hand() -> None:
    cost = compare(TINY)["client-masks"]
    assert cost.up_bytes == VALUES + 2 * 3
    # Round 2: a union of 4, new to both, 3 bytes. Round 3: 3 more out of the other 60, 15.1 bits: 2 bytes.
    first = 2 * 4
    second = (4 + 2) * 4 + 3 + (4 + 3) * 4 + 3
    third = (7 + 2) * 4 + 2 + (7 + 3) * 4 + 2
    assert cost.down_bytes == first + second + third == 146
    assert cost.index_down_bytes == 10
    assert cost.head_down_bytes == HEADS


def test_a_union_that_a_client_holds_already_is_not_charged_again() -> None:
    facts = RunFacts(4, 64, 100, (0, 0), ((0, 1), (0, 1), (0, 1), (0, 1)), unions=(0, 7, 7, 7))
    # log2 C(64, 7) = 29.2 bits: 4 bytes for each client, once
    assert compare(facts)["client-masks"].index_down_bytes == 8


def test_full_and_lora_by_hand() -> None:
    ways = compare(TINY)
    assert ways["full"].up_bytes == ways["full"].down_bytes == 3 * 102 * 4 + 2 * 103 * 4
    assert ways["lora"].up_bytes == 3 * 18 * 4 + 2 * 19 * 4
    assert ways["full"].index_share == 0.0


def test_half_precision_and_biases_count_in_every_way() -> None:
    facts = RunFacts(
        4, 64, 100, (2, 3), TINY.schedule, beside=5, up_value_bytes=2, down_value_bytes=2, mask_bytes=11,
        unions=(0, 4, 7),
    )  # fmt: skip
    ways = compare(facts)
    up = 3 * (4 + 5 + 2) * 2 + 2 * (4 + 5 + 3) * 2
    assert ways["shared-mask"].up_bytes == up
    assert ways["agreed-mask"].up_bytes == up + 22
    assert (
        ways["client-masks"].down_bytes
        == (5 + 2) * 2 + (9 + 2) * 2 + (9 + 3) * 2 + 6 + (12 + 2 + 12 + 3) * 2 + 4
    )
    assert ways["full"].up_bytes == 3 * 102 * 2 + 2 * 103 * 2
    assert "lora" not in ways


def test_quarter_bytes_round_up_by_message() -> None:
    facts = RunFacts(3, 64, 9, (0,), ((0,), (0,)), up_value_bytes=0.25)
    assert compare(facts)["shared-mask"].up_bytes == 2
    assert compare(facts)["full"].up_bytes == 6
    assert compare(facts)["full"].down_bytes == 2 * 9 * 4  # the other direction has its own


def test_where_changes_are_sent_down_round_one_brings_none() -> None:
    whole, changes = compare(TINY), compare(replace(TINY, changes_down=True))
    for way in ("this-run", "agreed-mask", "full", "lora"):
        values = {"full": 100, "lora": 16}.get(way, 4)
        assert whole[way].down_bytes - changes[way].down_bytes == (values + 2) * 4  # client 0 alone
        assert whole[way].index_down_bytes == changes[way].index_down_bytes
    assert whole["client-masks"].down_bytes - changes["client-masks"].down_bytes == 2 * 4  # only its head
    assert all(whole[way].up_bytes == changes[way].up_bytes for way in whole)


def test_without_a_mask_only_dense_ways_remain() -> None:
    ways = compare(RunFacts(0, 64, 100, (1,), ((0,),), beside=7))
    assert list(ways) == ["this-run", "full"]
    assert (ways["this-run"].up_bytes, ways["this-run"].down_bytes) == (32, 32)  # no recipe


def test_released_formats_of_indices_by_hand() -> None:
    ways = compare(TINY)
    agreed = ways["agreed-mask"]
    assert (agreed.mask_indices, agreed.mask_index_bytes) == (2 * 2 * 4, 12)  # two clients, both ways, k = 4
    assert agreed.total_bytes_with("two-int32") == 268 - 12 + 16 * 8
    assert agreed.index_share_with("coo-int64") == pytest.approx(256 / (256 + 256))
    # Down: 4 to each client in round 2, 3 more in round 3; up: 4 of each client once.
    assert ways["client-masks"].mask_indices == 8 + 6 + 8
    for way in ("this-run", "shared-mask", "full"):  # a recipe is no index
        assert ways[way].total_bytes_with("coo-int64") == ways[way].total_bytes
    assert ways["this-run"].total_bytes == ways["shared-mask"].total_bytes
    assert ways["this-run"].index_share == ways["this-run"].index_share_with("two-int32") > 0


@pytest.mark.parametrize(
    ("codec", "most"), [("fp32", 4.0), ("fp16", 2.0), ("int8", 1.02), ("int4+ef", 0.53), ("sign", 0.14)]
)
def test_bytes_a_value_are_those_of_the_codec(codec: str, most: float) -> None:
    assert 0.94 * most < value_bytes(codec) <= most


def test_figures_are_json() -> None:
    cost = compare(TINY)["shared-mask"].to_dict()
    assert json.loads(json.dumps(cost))["total_bytes"] == 276
    assert cost["way"] == "shared-mask" and cost["client_rounds"] == 5


def test_unions_are_measured_from_the_masks() -> None:
    masks = {0: np.array([1, 2, 3]), 1: np.array([3, 4, 5]), 2: np.array([9])}
    assert union_sizes(masks, ((0,), (0, 1), (0,), (2,))) == (0, 3, 5, 5)


def test_independent_union() -> None:
    assert independent_union(4, 64, 1) == 4
    assert independent_union(4, 64, 2) == 8  # 64 x (1 - (60/64)^2) = 7.75
    assert independent_union(4, 64, 0) == independent_union(0, 64, 3) == 0
    assert independent_union(64, 64, 3) == 64
    rng = np.random.default_rng(0)
    drawn = [rng.choice(10_000, 500, replace=False) for _ in range(8)]
    measured = np.unique(np.concatenate(drawn)).size
    assert measured == pytest.approx(independent_union(500, 10_000, 8), rel=0.03)


def test_without_measured_unions_the_independent_bound_is_charged() -> None:
    facts = RunFacts(4, 64, 100, (2, 3), TINY.schedule)
    bound = RunFacts(4, 64, 100, (2, 3), TINY.schedule, unions=(0, 4, 8))
    assumed, measured = compare(facts)["client-masks"], compare(bound)["client-masks"]
    assert assumed.total_bytes == measured.total_bytes
    assert "independent" in assumed.assumes and "measured" in measured.assumes


def test_lora_of_known_models() -> None:
    assert lora_values([(384, 384)] * 12) == 73_728  # MiniLM-L6: 6 layers of query and value
    assert lora_values([(768, 768)] * 24) == 294_912  # RoBERTa-base
    assert lora_values([(6, 4)], rank=2) == 20


def test_query_and_value_are_found_by_name() -> None:
    names = ["layer.0.attention.self.query.weight", "layer.0.attention.self.query.bias",
             "layer.0.attention.self.key.weight", "layers.1.self_attn.v_proj.weight", "revalue.weight",
             "h.0.attn.c_attn.weight", "h.0.ln_1.weight"]  # fmt: skip
    shapes = [(4, 4), (4,), (4, 4), (2, 4), (4, 4), (4, 12), (4,)]
    assert query_value_shapes(names, shapes) == [(4, 4), (2, 4), (4, 12)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 65}, r"k in \[0, 64\], found 65"),
        ({"schedule": ((0, 0),), "unions": (0,)}, "distinct clients"),
        ({"schedule": ((2,),), "unions": (0,)}, "below 2"),
        ({"unions": (0, 4)}, "expected 3 unions, found 2"),
        ({"unions": (0, 4, 65)}, "found 65"),
    ],
)
def test_facts_that_contradict_each_other(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]
