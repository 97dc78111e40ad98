"""One function a kind of partition, around partitioners of flwr-datasets that drop no row.

The partitioners see a table of row numbers and classes in a random order of the run's seed, so the
order of a file does not decide who gets what.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmask.config import PartitionConfig, TaskConfig
from fedmask.errors import DataError, unknown
from fedmask.tasks.columns import LABEL, TEXT, TEXT_PAIR
from fedmask.tasks.data import TaskData

RowNumbers = npt.NDArray[np.int64]
# As many as flwr-datasets makes for Dirichlet label skew before it gives up.
_DRAWS = 11
_ROW, _GROUP = "row", "group"


@dataclass(frozen=True)
class Deal:
    """Rows to deal out. ``classes`` int64 [n], numbered without gaps, and their names; ``order``
    int64 [n], the random order of dealing; ``seed`` for the partitioner, ``rng`` for the rest."""

    task: TaskConfig
    partition: PartitionConfig
    data: TaskData
    classes: RowNumbers
    class_names: tuple[str, ...]
    order: RowNumbers
    rng: np.random.Generator
    seed: int

    @property
    def clients(self) -> int:
        """Number of parts."""
        return self.task.clients

    def error(self, message: str) -> DataError:
        """A DataError that names the task and the partition."""
        return DataError(
            f"task {self.task.name!r}, partition {self.partition.kind}, {self.clients} clients: {message}"
        )


def dirichlet(deal: Deal) -> list[RowNumbers]:
    """Label skew: each class is cut by a draw from Dirichlet(alpha), again while a client has no row."""
    from flwr_datasets.partitioner import DirichletPartitioner

    alpha = deal.partition.alpha
    partitioner = DirichletPartitioner(
        deal.clients, _GROUP, alpha, min_partition_size=1, self_balancing=False, shuffle=False, seed=deal.seed
    )
    with warnings.catch_warnings():
        # It warns of each repeated draw; only that all draws failed is of interest.
        warnings.filterwarnings("ignore", message="The specified min_partition_size")
        try:
            return _parts(deal, partitioner, deal.classes)
        except ValueError:
            raise _empty_client(deal) from None


def quantity(deal: Deal) -> list[RowNumbers]:
    """Quantity skew: sizes from one draw of Dirichlet(alpha), again while a client has no row."""
    from flwr_datasets.partitioner import SizePartitioner

    for _ in range(_DRAWS):
        shares = deal.rng.dirichlet(np.full(deal.clients, deal.partition.alpha))
        ends = (np.cumsum(shares) * len(deal.order)).astype(np.int64)
        ends[-1] = len(deal.order)
        sizes = np.diff(ends, prepend=0)
        if sizes.min() > 0:
            return _parts(deal, SizePartitioner(sizes.tolist()), deal.classes)
    raise _empty_client(deal)


def pathological(deal: Deal) -> list[RowNumbers]:
    """``classes_per_client`` classes each: client i has those at i, i + 1, ... on a circle.

    The circle is a random order of the classes. The partitioner's mode with random classes can
    leave a class with no client; on the circle that depends on the numbers alone, and is refused.
    """
    from flwr_datasets.partitioner import PathologicalPartitioner

    width, count = deal.partition.classes_per_client, len(deal.class_names)
    if width > count:
        raise deal.error(
            f"expected classes_per_client of at most {count}, as many labels as there are, found {width}"
        )
    if deal.clients + width - 1 < count:
        raise deal.error(
            f"{count} labels with classes_per_client={width} leave labels to no client; raise"
            f" classes_per_client to {count - deal.clients + 1} or clients to {count - width + 1}"
        )
    circle = deal.rng.permutation(count)  # class -> its place
    owners = np.bincount(
        (np.arange(deal.clients)[:, None] + np.arange(width)).ravel() % count, minlength=count
    )
    for name, rows, needed in zip(
        deal.class_names, np.bincount(deal.classes, minlength=count), owners[circle], strict=True
    ):
        if rows < needed:
            raise deal.error(
                f"label {name!r} has {rows} rows for {needed} clients that should hold it;"
                f" lower clients or classes_per_client"
            )
    partitioner = PathologicalPartitioner(
        deal.clients, _GROUP, width, class_assignment_mode="deterministic", shuffle=False, seed=deal.seed
    )
    return _parts(deal, partitioner, circle[deal.classes])


def shard(deal: Deal) -> list[RowNumbers]:
    """Blocks of the rows sorted by class, about ``shards_per_client`` each, dealt at random.

    The partitioner drops the remainder unless it is given the block's size and told to keep the
    last, shorter block.
    """
    from flwr_datasets.partitioner import ShardPartitioner

    rows, wanted = len(deal.order), deal.clients * deal.partition.shards_per_client
    size = -(-rows // wanted)
    if -(-rows // size) < wanted:  # few rows: blocks this large would be fewer than wanted
        size = max(1, rows // wanted)
    partitioner = ShardPartitioner(
        deal.clients, _GROUP, shard_size=size, keep_incomplete_shard=True, shuffle=False, seed=deal.seed
    )
    with warnings.catch_warnings():
        # It sorts through datasets, which sorts through an option of pyarrow that pyarrow 25 renamed.
        warnings.filterwarnings("ignore", message="Specifying null_placement", category=FutureWarning)
        return _parts(deal, partitioner, deal.classes)


def iid(deal: Deal) -> list[RowNumbers]:
    """Random parts whose sizes differ by one at most, the larger ones first, as IidPartitioner cuts them."""
    return [np.sort(part) for part in np.array_split(deal.order, deal.clients)]


def natural(deal: Deal) -> list[RowNumbers]:
    """One client for each value of a column, in sorted order."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    name = deal.partition.column
    column = LABEL if name == deal.task.label else name
    choices = [name for name in deal.data.train.column_names if name not in (TEXT, TEXT_PAIR)]
    if column not in choices:
        raise deal.error(unknown("column", column, choices))
    values = deal.data.train[column][:]
    if None in values:
        raise deal.error(f"column {name!r} has no value in train row {values.index(None) + 1}")
    present, groups = np.unique(np.asarray(values), return_inverse=True)
    if len(present) != deal.clients:
        raise deal.error(f"column {name!r} has {len(present)} values; set clients to {len(present)}")
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar for every row
        return _parts(deal, NaturalIdPartitioner(_GROUP), groups)


def _parts(deal: Deal, partitioner: Any, groups: Iterable[int]) -> list[RowNumbers]:
    """The rows that a partitioner gives to each client when ``groups`` [n] is what it goes by.

    Read from the partitioner's own table: ``load_partition`` makes a data set a client, a millisecond each.
    """
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({_ROW: deal.order, _GROUP: np.asarray(groups)[deal.order]})
    partitioner.load_partition(0)  # fills the table; some sort the data set first
    rows, places = np.asarray(partitioner.dataset[_ROW][:]), partitioner._partition_id_to_indices
    return [np.sort(rows[np.asarray(places[client], np.int64)]) for client in range(deal.clients)]


def _empty_client(deal: Deal) -> DataError:
    return deal.error(
        f"alpha={deal.partition.alpha} left a client without rows in each of {_DRAWS} draws over"
        f" {len(deal.order)} rows; raise alpha or lower clients"
    )


KINDS: dict[str, Callable[[Deal], list[RowNumbers]]] = {
    "dirichlet": dirichlet,
    "pathological": pathological,
    "shard": shard,
    "quantity": quantity,
    "iid": iid,
    "natural": natural,
}
