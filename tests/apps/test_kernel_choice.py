"""The kernel of a run is the server's choice: recorded, sent, followed; a node that cannot says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from flwr.app import Context, Message

from clients.app import make_client_app
from experiments.engines import run_inprocess
from fedmask import workspace as workspaces
from fedmask.config import RunConfig
from fedmask.errors import FederationError
from fedmask.kernels import available_kernels
from fedmask.workspace import Workspace
from server.app import RunResult

MakeConfig = Callable[..., RunConfig]
LACKS = ("dense",)


def run(config: RunConfig, **options: Any) -> RunResult:
    return run_inprocess(config, existing="overwrite", client_evaluation=False, **options)


def record(result: RunResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.folder / "config.json").read_text())
    return found


def digest(result: RunResult) -> str:
    assert result.summary["steps"] > 0
    return str(result.summary["vector_sha256"])


def app_on(patch: pytest.MonkeyPatch, lacking: set[int]) -> Callable[[RunConfig], Any]:
    """Client apps each message of which finds an empty process; without numba on the nodes ``lacking``."""

    def make(config: RunConfig) -> Callable[[Message, Context], Message]:
        app = make_client_app(config)

        def answer(message: Message, context: Context) -> Message:
            workspaces._workspace.cache_clear()
            with patch.context() as here:
                if context.node_config["partition-id"] in lacking:
                    here.setattr(workspaces, "available_kernels", lambda: LACKS)
                try:
                    return app(message, context)
                finally:
                    workspaces._workspace.cache_clear()

        return answer

    return make


@pytest.fixture
def wide(make_config: MakeConfig) -> MakeConfig:
    """Batches so large that the fixed rule takes the sampled kernel in some layer of the tiny model."""
    if "sampled" not in available_kernels():  # pragma: no cover
        pytest.fail("these tests need numba: install fedmask[fast]")
    plan = {"steps": 2, "batch_size": 32, "max_tokens": 16}
    return lambda **changes: make_config(**{"density": 0.002, "train": plan} | changes)


def test_the_choice_is_recorded_and_repeats_the_run(wide: MakeConfig) -> None:
    sampled, dense = run(wide(kernel="sampled")), run(wide(kernel="dense", name="dense"))
    assert digest(sampled) != digest(dense)  # the last bits: else the tests below would prove nothing
    auto = run(wide())
    assert record(auto)["config"]["kernel"] == record(auto)["precision"]["kernel"] == "sampled"
    assert digest(auto) == digest(sampled)
    again = run(RunConfig(**record(dense)["config"] | {"name": "again"}))
    assert digest(again) == digest(dense)


def test_a_server_without_numba_settles_for_everybody(
    wide: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digest(run(wide(kernel="dense")))
    workspaces._workspace.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "own_kernel", property(lambda _self: "dense"))
        assert record(run(wide(name="there")))["config"]["kernel"] == "dense"
    workspaces._workspace.cache_clear()

    def told(config: RunConfig) -> Callable[[Message, Context], Message]:
        """A client that has numba, and hears of the server's choice."""
        app = app_on(monkeypatch, set())(config)

        def answer(message: Message, context: Context) -> Message:
            if message.metadata.message_type == "query.join":
                message.content["config"]["kernel"] = "dense"  # type: ignore[index]
            return app(message, context)

        return answer

    assert digest(run(wide(), make_app=told)) == expected


def test_a_node_without_numba_is_left_out_with_the_reason(
    wide: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = wide(server={"min_replies": 2})
    result = run(config, make_app=app_on(monkeypatch, {1}))
    rows = [json.loads(line) for line in (result.folder / "ledger.jsonl").read_text().splitlines()]
    refused = [row for row in rows if row["status"] == "rejected"]
    assert {row["client"] for row in refused} == {1}
    trained = {row["client"] for row in rows if row["kind"] == "train" and row["status"] == "ok"}
    assert trained == {0, 2, 3, 4}
    config = wide(name="all", server={"min_replies": 5})
    with pytest.raises(FederationError, match=r"client 1: this run's kernel.* pip install numba"):
        run(config, make_app=app_on(monkeypatch, {1}))


def test_methods_without_a_mask_ask_for_no_kernel(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(make_config(method="hiwi", rounds=1), make_app=app_on(monkeypatch, {0, 1, 2, 3, 4}))
    assert record(result)["config"]["kernel"] == "dense"
    assert result.summary["steps"] > 0
