"""One run on each engine: in this process, on Flower's simulation runtime (Ray), over a SuperLink."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.app import Context, RecordDict

from clients.app import make_client_app
from experiments.inprocess import InProcessGrid
from experiments.states import KeepStates
from experiments.superlink import RemoteRun, run_superlink
from experiments.workers import MakeApp
from fedmask.channel import down_way, up_codec
from fedmask.config import RunConfig
from fedmask.errors import ConfigError, FederationError
from server.app import RunResult, make_server_app
from server.observer import Observer, Several, Silent
from server.record import Existing

__all__ = ["RemoteRun", "RunResult", "default_workers", "run_inprocess", "run_ray", "run_superlink"]

# Each worker holds a model of its own; with more than this, memory ends before cores do.
_MOST_WORKERS = 8


def default_workers(config: RunConfig) -> int:
    """Clients that train at the same time when ``config.workers`` is None: as many as the cores carry."""
    asked = config.server.clients_per_round or config.clients
    return config.workers or max(1, min(asked, _cores() // config.threads, _MOST_WORKERS))


def run_inprocess(
    config: RunConfig,
    observer: Observer | None = None,
    *,
    existing: Existing = "refuse",
    client_evaluation: bool = True,
    make_app: MakeApp = make_client_app,
) -> RunResult:
    """Run a federation here, without SuperLink or Ray.

    With more than one worker (``config.workers``; None: see ``default_workers``) clients train in that many
    processes, so the calling script needs ``if __name__ == "__main__":``. Raises ``FedmaskError``.
    """
    results: list[RunResult] = []
    watching: list[Observer] = [observer or Silent()]
    server = make_server_app(
        config,
        Several(watching),
        engine="inprocess",
        existing=existing,
        client_evaluation=client_evaluation,
        on_result=results.append,
    )
    with InProcessGrid(config, default_workers(config), make_app) as grid, _quiet_log():
        if _clients_keep(config):
            watching.append(KeepStates(grid.states, resume=existing == "resume"))
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        server(grid=grid, context=context)
    return results[0]


def _clients_keep(config: RunConfig) -> bool:
    """Whether clients keep residuals, received vectors or heads from round to round."""
    changes = down_way(config.down).change or config.has_views
    return up_codec(config.up).keeps_state or changes or config.server.sharing == "local-heads"


def run_ray(
    config: RunConfig,
    observer: Observer | None = None,
    *,
    existing: Existing = "refuse",
    client_evaluation: bool = True,
    backend: Mapping[str, Any] | None = None,
    make_app: MakeApp = make_client_app,
) -> RunResult:
    """Run a federation on Flower's simulation runtime.

    Each of Ray's actors loads the backbone once, with its first message, and keeps it.

    ``backend``: Flower's backend config (``client_resources``, ``init_args``), passed on as it is; by default
    each client gets ``config.threads`` CPUs. With RAY_ADDRESS in the environment Ray joins that cluster,
    whose machines must have fedmask, the model and the data. Raises ``FedmaskError``.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "engine 'ray': Ray is not installed; in fedmask's checkout run: pip install -e '.[ray]'"
        )
    from flwr.simulation import run_simulation

    results: list[RunResult] = []
    server = make_server_app(
        config,
        observer,
        engine="ray",
        existing=existing,
        client_evaluation=client_evaluation,
        on_result=results.append,
    )
    with _ray_environment(), _quiet_log():
        run_simulation(
            server_app=server,
            client_app=make_app(config),
            num_supernodes=config.clients,
            backend_config=_backend(config, backend or {}),
        )
    if not results:
        raise FederationError("the simulation runtime ended before the run did; its log says why")
    return results[0]


def _backend(config: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()
    }
    out.setdefault("client_resources", {"num_cpus": config.threads, "num_gpus": 0.0})
    init = out.setdefault("init_args", {})
    # What goes wrong in a client stands in its reply; actors' logs would run through the progress bars.
    init.setdefault("log_to_driver", False)
    if config.workers is not None and "RAY_ADDRESS" not in os.environ:
        init.setdefault("num_cpus", config.workers * config.threads)
    return out


@contextmanager
def _ray_environment() -> Iterator[None]:
    # Flower puts sys.path into PYTHONPATH for Ray's processes; programs started later must not inherit it.
    before = os.environ.get("PYTHONPATH")
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Leave warnings in Flower's log, without the notice that ``run_simulation`` is deprecated.

    There is no other documented call that runs given apps on Ray; ``flwr run`` wants a SuperLink.
    """
    log = logging.getLogger("flwr")
    level = log.level
    log.addFilter(_no_notice)
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeFilter(_no_notice)


def _no_notice(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not ("DEPRECATED FEATURE" in text and "run_simulation" in text)


def _cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
