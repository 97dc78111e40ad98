"""bfloat16 through the whole flow: workers and fresh processes agree, and clients use the server's choice."""

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
from fedmask.precision import PRECISIONS
from fedmask.workspace import Workspace
from server.app import RunResult
from server.observer import Silent

MakeConfig = Callable[..., RunConfig]


def forgetful(config: RunConfig) -> Callable[[Message, Context], Message]:
    """A client app that finds an empty process at each message, as under a SuperNode."""
    app = make_client_app(config)

    def answer(message: Message, context: Context) -> Message:
        workspaces._workspace.cache_clear()
        try:
            return app(message, context)
        finally:
            workspaces._workspace.cache_clear()

    return answer


def run(config: RunConfig, **options: Any) -> RunResult:
    return run_inprocess(config, existing="overwrite", client_evaluation=False, **options)


def digest(result: RunResult) -> str:
    assert result.summary["steps"] > 0
    return str(result.summary["vector_sha256"])


def settle_on(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """The measurement comes out for ``precision``."""

    def settle(workspace: Workspace) -> dict[str, float]:
        workspace.use_precision(precision)
        return {one: 0.1 if one == precision else 0.2 for one in PRECISIONS}

    monkeypatch.setattr("server.app.settle_precision", settle)


def test_fresh_processes_agree_in_bfloat16(make_config: MakeConfig) -> None:
    stated = make_config(precision="bf16")
    expected = digest(run(stated))
    assert digest(run(stated, make_app=forgetful)) == expected
    assert digest(run(make_config())) != expected


@pytest.mark.parametrize("chosen", PRECISIONS)
def test_clients_use_the_choice_of_the_server(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    expected = digest(run(make_config(precision=chosen)))
    settle_on(monkeypatch, chosen)
    auto = make_config(precision="auto")
    assert digest(run(auto)) == expected
    assert digest(run(auto, make_app=forgetful)) == expected
    if chosen == "bf16":  # the worker processes are told, too
        assert digest(run(auto.model_copy(update={"workers": 2}))) == expected


def test_a_choice_that_was_measured_is_recorded_and_repeated(make_config: MakeConfig) -> None:
    first = run(make_config(precision="auto"))
    path = first.folder / "config.json"
    record = json.loads(path.read_text())
    facts = record["precision"]
    assert facts["asked"] == "auto"
    assert set(facts["seconds_per_step"]) == set(PRECISIONS)
    assert facts["used"] == min(PRECISIONS, key=facts["seconds_per_step"].get)
    assert record["config"]["precision"] == facts["used"]
    again = run(RunConfig(**record["config"] | {"name": "again"}))
    assert digest(again) == digest(first)
    stated = json.loads((again.folder / "config.json").read_text())["precision"]
    assert stated == facts | {"asked": facts["used"], "seconds_per_step": {}}


def test_a_client_that_was_told_no_precision_says_so(make_config: MakeConfig) -> None:
    """Without a join message there is no choice to follow, and guessing would change the result."""

    def deaf(config: RunConfig) -> Callable[[Message, Context], Message]:
        app = make_client_app(config)

        def answer(message: Message, context: Context) -> Message:
            context.state.pop("precision", None)
            return app(message, context)

        return answer

    from fedmask.errors import FederationError

    with pytest.raises(FederationError, match="expected a join message with the precision"):
        run(make_config(precision="auto"), make_app=deaf)


@pytest.mark.parametrize("chosen", PRECISIONS)
def test_a_resumed_run_keeps_its_choice(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    expected = digest(run(make_config(precision=chosen, rounds=2)))
    settle_on(monkeypatch, chosen)
    auto = make_config(name="cut", precision="auto", rounds=2)

    class Stops(Silent):
        def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
            if round == 2:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run_inprocess(auto, Stops(), client_evaluation=False)
    settle_on(monkeypatch, "nothing: it must not be asked again")
    result = run_inprocess(auto, existing="resume", client_evaluation=False)
    assert digest(result) == expected
    assert json.loads((result.folder / "config.json").read_text())["precision"]["used"] == chosen
