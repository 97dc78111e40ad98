"""What the clients of a federation of several tasks share (setting ``server.sharing``).

``all``          one vector for the backbone, a head a task.
``local-heads``  one vector for the backbone; a head never leaves its client (as in FedPer, Arivazhagan et
                 al., arXiv 1912.00818, whose personal layers these are).
``by-task``      nothing across tasks: each task's clients average the backbone's vector among themselves,
                 so a task is a cluster. The mask is the same all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fedmask.errors import ConfigError
from fedmask.layout import Layout

if TYPE_CHECKING:
    from fedmask.config import RunConfig

Sharing = Literal["all", "local-heads", "by-task"]
_AVERAGES = ("fedavg", "mean")


def check_sharing(config: RunConfig) -> None:
    """ConfigError for settings that do not go together with ``server.sharing``."""
    sharing = config.server.sharing
    if sharing != "all" and config.has_views:
        raise ConfigError(
            f"server.sharing {sharing!r}: expected one fixed mask, found one that moves or a mask a client; "
            "use server.sharing 'all' with it"
        )
    if sharing == "by-task" and config.server.strategy.lower() not in _AVERAGES:
        raise ConfigError(
            f"server.sharing 'by-task' averages each task on its own, found server.strategy"
            f" {config.server.strategy!r}; use one of {', '.join(_AVERAGES)}"
        )


def travelling(layout: Layout, sharing: Sharing) -> Layout:
    """The segments of a client's vector that travel."""
    if sharing != "local-heads":
        return layout
    return Layout(tuple(segment for segment in layout.segments if segment.shared))


def common_size(layout: Layout, sharing: Sharing) -> int:
    """How many values at the start of the vector the clients of all tasks have in common."""
    return 0 if sharing == "by-task" else layout.shared_size


def stored_names(layout: Layout, task: str, sharing: Sharing) -> dict[str, str]:
    """By segment, its name in a run's delta file: where tasks share none, each has its own."""
    return {
        segment.name: f"{segment.name}/{task}" if segment.shared and sharing == "by-task" else segment.name
        for segment in layout.segments
    }
