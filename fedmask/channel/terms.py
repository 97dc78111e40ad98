"""What the values of one message stand for."""

from __future__ import annotations

from dataclasses import dataclass

from fedmask.layout import Layout


@dataclass(frozen=True)
class Terms:
    """The segments of a message's values and the digest of the mask (64 hex digits) that they live on.

    The down-link's and the up-link's may differ, by client and by round.
    """

    layout: Layout
    digest: str
