"""Who takes part: recipes, refusals, packed masks, wrong partitions, missing nodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.app import make_client_app
from clients.link import received
from experiments.inprocess import InProcessGrid
from fedmask.channel import Behind, advance, frame_for, start_public
from fedmask.codecs import codec_for, index_entropy_bytes
from fedmask.config import RunConfig
from fedmask.errors import FederationError
from fedmask.flower import ARRAYS, CONFIG, KERNEL, MASK, PRECISION, RECIPE, record_bytes
from fedmask.workspace import get_workspace
from tests.apps.grids import read_rows, run_on
from tests.support import save_checkpoint

MakeConfig = Callable[..., RunConfig]


class RecordingGrid(InProcessGrid):
    """Keeps the messages that were sent."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.sent = [*getattr(self, "sent", []), *sent]
        return super().push_messages(sent)


def _joining(grid: RecordingGrid, kind: str) -> list[Message]:
    return [message for message in grid.sent if message.metadata.message_type == kind]


def test_the_offer_is_one_recipe_of_less_than_256_bytes(make_config: MakeConfig) -> None:
    grid = RecordingGrid(make_config(rounds=1))
    result = run_on(grid)
    offers = _joining(grid, "query.join")
    assert len(offers) == 5
    for message in offers:
        assert set(message.content) == {CONFIG}
        assert set(message.content[CONFIG]) == {KERNEL, PRECISION, RECIPE}
        assert len(str(message.content[CONFIG][RECIPE]).encode()) < 256
    assert not _joining(grid, "query.mask")
    down = [
        row
        for row in read_rows(result.folder, "ledger")
        if (row["kind"], row["direction"]) == ("mask", "down")
    ]
    assert all(0 < row["payload_bytes"] < 256 < row["message_bytes"] for row in down)
    # One array a message, and nothing but the round beside it.
    for message in _joining(grid, "train"):
        arrays = message.content.array_records[ARRAYS]
        assert [array.dtype for array in arrays.values()] == ["uint8"]
        assert dict(message.content.config_records[CONFIG]) == {"round": 1}


def test_packed_masks_cost_their_entropy_and_give_the_same_run(make_config: MakeConfig) -> None:
    plain = run_on(InProcessGrid(make_config()))
    grid = RecordingGrid(make_config(mask_transport="packed"))
    packed = run_on(grid)
    assert packed.summary["vector_sha256"] == plain.summary["vector_sha256"]
    sent = _joining(grid, "query.mask")
    assert len(sent) == 5
    mask = get_workspace(grid.config).mask
    assert mask is not None
    size = len(record_bytes(sent[0].content[ARRAYS], MASK))  # type: ignore[arg-type]
    # The bound holds for large masks; 328 indices of 16,384 leave a few bytes of header.
    assert size <= 1.05 * index_entropy_bytes(mask.k, mask.space.size) + 8
    rows = read_rows(packed.folder, "ledger")
    assert sum(
        row["payload_bytes"] for row in rows if (row["kind"], row["direction"]) == ("mask", "down")
    ) == (5 * size + sum(len(str(m.content[CONFIG][RECIPE])) for m in _joining(grid, "query.join")))


def test_a_client_that_derives_another_mask_gets_it_and_keeps_it(make_config: MakeConfig) -> None:
    """Every message meets a new workspace, as on a SuperNode, that derives a random mask by itself."""
    count = 0

    def forgetful(config: RunConfig) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            nonlocal count
            count += 1
            other = {"method": "random", "name": f"process-{count}"}
            if context.node_config["partition-id"] != 2:
                other = {}
            return make_client_app(config.model_copy(update=other))(message, context)

        return app

    config = make_config(method="pafi")
    grid = RecordingGrid(config, make_app=forgetful)  # type: ignore[arg-type]
    run = run_on(grid)
    assert [grid._partitions[message.metadata.dst_node_id] for message in _joining(grid, "query.mask")] == [2]
    assert [row["rejected"] for row in read_rows(run.folder, "rounds")] == [[], [], []]
    assert run.summary["vector_sha256"] == run_on(InProcessGrid(config)).summary["vector_sha256"]
    assert len(grid.states) == 1  # the others keep nothing between messages


def test_a_vector_of_another_mask_is_not_built_on(make_config: MakeConfig) -> None:
    """Where nothing was to be sent, nothing that is sent names the mask of what the client holds."""
    config = make_config(method="pafi", down="fp32+delta")
    workspace = get_workspace(config)
    other = get_workspace(config.model_copy(update={"method": "random", "name": "restarted"}))
    context, terms = Context(1, 1, {}, RecordDict(), {}), workspace.change_terms(0, 1)
    start = start_public(terms.layout.size)
    public = advance(start, np.ones(terms.layout.size, np.float32), terms, codec_for("fp32"))
    received(workspace, context, 0, frame_for(public, 0, terms), 1)
    nothing = frame_for(public, 1, terms)
    assert received(workspace, context, 0, nothing, 1).tolist() == public.vector.tolist()
    with pytest.raises(Behind, match="expected to hold version 1, found 0"):
        received(other, context, 0, nothing, 1)


def test_another_checkpoint_is_refused_by_name(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    other = config.model_copy(update={"model": str(save_checkpoint(tmp_path / "other", seed=9))})

    def mixed(config: RunConfig) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            mine = other if context.node_config["partition-id"] == 3 else config
            return make_client_app(mine)(message, context)

        return app

    with pytest.raises(FederationError) as caught:
        run_on(InProcessGrid(config, make_app=mixed))  # type: ignore[arg-type]
    text = str(caught.value)
    assert "client 3" in text
    assert get_workspace(config).checkpoint_digest in text
    assert get_workspace(other).checkpoint_digest in text


@pytest.mark.parametrize("method", ["head", "full"])
def test_methods_without_a_mask_still_compare_checkpoints(
    make_config: MakeConfig, tmp_path: Path, method: str
) -> None:
    config = make_config(method=method, rounds=1)
    other = config.model_copy(update={"model": str(save_checkpoint(tmp_path / "other", seed=9))})
    with pytest.raises(FederationError, match=r"client \d refuses"):
        run_on(InProcessGrid(config, make_app=lambda _config: make_client_app(other)))


class RenumberedGrid(InProcessGrid):
    """Nodes with the partitions of ``numbers``."""

    def __init__(self, config: RunConfig, numbers: list[int]) -> None:
        super().__init__(config)
        self._partitions = {1000 + i: number for i, number in enumerate(numbers)}


def test_two_nodes_with_one_partition(make_config: MakeConfig) -> None:
    with pytest.raises(FederationError, match=r"two nodes hold partition 2 \(ids 1002 and 1003\)"):
        run_on(RenumberedGrid(make_config(), [0, 1, 2, 2, 3, 4]))


def test_spare_nodes_are_left_alone(make_config: MakeConfig) -> None:
    config = make_config()
    run = run_on(RenumberedGrid(config, [7, 4, 3, 2, 1, 0, 6, 5]))
    assert run.summary["vector_sha256"] == run_on(InProcessGrid(config)).summary["vector_sha256"]
    assert {row["client"] for row in read_rows(run.folder, "ledger") if row["kind"] == "train"} == set(
        range(5)
    )


def test_a_partition_that_nobody_holds(make_config: MakeConfig) -> None:
    with pytest.raises(FederationError, match="5 nodes answered, but none holds partition 1"):
        run_on(RenumberedGrid(make_config(), [0, 2, 3, 4, 5]))


def test_too_few_nodes_is_said_in_time(make_config: MakeConfig) -> None:
    with pytest.raises(FederationError, match=r"expected 5 nodes, found 2 after 0\.2 s.*num-supernodes=5"):
        run_on(RenumberedGrid(make_config(), [0, 1]), node_timeout=0.2)


def test_a_client_that_cannot_join_is_named_and_left_out(make_config: MakeConfig) -> None:
    def broken(config: RunConfig) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            if context.node_config["partition-id"] == 1:
                raise OSError("no space left")
            return make_client_app(config)(message, context)

        return app

    run = run_on(InProcessGrid(make_config(), make_app=broken))  # type: ignore[arg-type]
    rows = read_rows(run.folder, "rounds")
    assert [one["client"] for one in rows[0]["rejected"]] == [-1]
    assert re.fullmatch(r"node \d+: OSError: no space left", rows[0]["rejected"][0]["reason"])
    assert rows[1]["sampled"] == [0, 2, 3, 4]

    def none(_config: RunConfig) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            raise OSError("no space left")

        return app

    with pytest.raises(FederationError, match=r"at least 1 clients.*0 joined.*no space left"):
        run_on(InProcessGrid(make_config(name="none"), make_app=none))  # type: ignore[arg-type]


def test_a_node_without_a_partition_is_told_how_to_get_one(make_config: MakeConfig) -> None:
    grid = RenumberedGrid(make_config(), [0, 1, 2, 3, "x"])  # type: ignore[list-item]
    run = run_on(grid)
    assert (
        "--node-config 'partition-id=0 num-partitions=5'"
        in read_rows(run.folder, "rounds")[0]["rejected"][0]["reason"]
    )


def test_state_is_kept_once_for_all_clients(make_config: MakeConfig) -> None:
    grid = InProcessGrid(make_config(mask_transport="packed", rounds=1))
    run_on(grid)
    assert len(grid.states) == 5
    assert grid.states.pieces == len(grid.states.get(next(iter(grid.get_node_ids()))).objects)  # type: ignore[union-attr]


def test_nonsense_instead_of_a_partition_is_rejected(make_config: MakeConfig) -> None:
    answers = [
        RecordDict({CONFIG: ConfigRecord({"partition": "4", "status": "ok"})}),
        RecordDict({CONFIG: ConfigRecord({"partition": -4, "status": "ok", "checkpoint": "", "digest": ""})}),
        RecordDict({CONFIG: ConfigRecord({"partition": 0, "status": 1})}),
        RecordDict({"other": ConfigRecord({"partition": 0})}),
    ]

    def confused(config: RunConfig) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            partition = int(context.node_config["partition-id"])
            if partition < 4:
                return Message(answers[partition], reply_to=message)
            return make_client_app(config)(message, context)

        return app

    run = run_on(InProcessGrid(make_config(rounds=1), make_app=confused))  # type: ignore[arg-type]
    rows = read_rows(run.folder, "rounds")
    reasons = " ".join(one["reason"] for one in rows[0]["rejected"])
    assert len(rows[0]["rejected"]) == 4
    for part in (
        "whole number, found '4'",
        "no client has the partition -4",
        "texts for status",
        "the records",
    ):
        assert part in reasons
    assert rows[1]["replied"] == [4]


def test_what_a_node_says_of_itself_is_cut_and_digests_are_digests(make_config: MakeConfig) -> None:
    """However much it sends: the record holds lines of a bounded length."""
    long = "no\nroom " * 20_000
    sound = {"status": "ok", "digest": "ab" * 32, "checkpoint": "ab" * 32}
    answers = [
        {"partition": 0, **sound, "status": "unable", "reason": long},
        {"partition": 1, **sound, "checkpoint": long},
        {"partition": 2, **sound, "digest": "AB" * 32},
        {"partition": 3, **sound, "status": "refused", "checkpoint": f"{'ab' * 32}; log in at"},
    ]

    def talkative(config: RunConfig) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            partition = int(context.node_config["partition-id"])
            if partition < 4:
                return Message(RecordDict({CONFIG: ConfigRecord(answers[partition])}), reply_to=message)  # type: ignore[arg-type]
            return make_client_app(config)(message, context)

        return app

    run = run_on(InProcessGrid(make_config(rounds=1), make_app=talkative))  # type: ignore[arg-type]
    rows = read_rows(run.folder, "rounds")
    unable, *unread = sorted((one["reason"] for one in rows[0]["rejected"]), key=len, reverse=True)
    assert unable.startswith("no room no room") and len(unable) == 4000
    assert len(unread) == 3 and all(len(reason) < 200 for reason in unread)
    assert sum("checkpoint: expected 64 hex digits, found '" in reason for reason in unread) == 2
    assert sum("digest: expected 64 hex digits, found '" in reason for reason in unread) == 1
    assert rows[1]["replied"] == [4]
