"""The components for ``flwr run``: the same apps, with the demo as the default and a report at the end."""

from __future__ import annotations

import fedmask._env  # noqa: F401  (before flwr is imported)

from clients.app import make_client_app
from experiments.options import DEMO
from fedmask.config import RunConfig, load_config
from server.app import RunResult, make_server_app

__all__ = ["client_app", "server_app"]


def _demo() -> RunConfig:
    return load_config(DEMO)


def _report(result: RunResult) -> None:
    # Imported when needed: every message to a client starts a process that imports this module.
    from experiments.report import report_of_complete

    report_of_complete(result.folder)


client_app = make_client_app(default=_demo)
# Nobody can be asked on a SuperLink's host, so an older run of the same name is kept and numbered past.
server_app = make_server_app(default=_demo, existing="number", on_result=_report)
