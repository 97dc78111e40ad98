"""What the same run would have cost otherwise: payload bytes by formula, from shapes and the schedule.

The same rules for every way, so that they compare:

- a client that takes part in a round receives the current values and sends its own, head included; the
  first round is charged like any other, unless changes are sent down: before it nothing has changed;
- every value costs ``up_value_bytes`` or ``down_value_bytes``, whatever the way: all are allowed this run's
  codecs; indices cost the best code known, rounded up to whole bytes a message, and are charged whenever the
  set is new to the one who reads it. Released formats of indices (``INDEX_FORMATS``) stand beside it;
- only bytes are charged: no data passes, scores, memory or trust. ``Cost.not_charged`` says what that hides.

``this-run``      what this run sends, by the same rules: its own values, and what brings a client its mask.
``shared-mask``   the mask is a function of the checkpoint (PaFi, arXiv 2305.16742): a recipe, once a client.
``agreed-mask``   one task-specific mask (such as FISH, arXiv 2111.09839, or LT-SFT, arXiv 2110.07560) of the
                  same k on which all clients agree: each client sends its own choice once and receives the
                  agreed one once, at its first round; then values alone. By votes: where scores are sent
                  with the choice (``agree_by = "scores"``) a client sends 2 bytes an entry more, once.
``client-masks``  a mask of the same k for each client, fixed: up its k values every round and its indices
                  once; down the values of the union of the masks of all who took part before, and the
                  union's indices whenever it grew since this client last received it. What it received
                  already is not charged again: the new ones are a choice among those not yet in it.
                  Before round 1 that union is empty, so its first download is the head (and ``beside``).
``full``          federated averaging (McMahan et al., arXiv 1602.05629) of the whole backbone.
``lora``          both factors of LoRA (arXiv 2106.09685): r (d_in + d_out) values for each adapted matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from fedmask.amounts import independent_union, lora_values, query_value_shapes, union_sizes
from fedmask.codecs import index_entropy_bytes
from fedmask.errors import ConfigError

__all__ = [
    "INDEX_FORMATS",
    "Cost",
    "RunFacts",
    "compare",
    "independent_union",
    "lora_values",
    "query_value_shapes",
    "union_sizes",
]

INDEX_FORMATS = {"two-int32": 8, "coo-int64": 16}
"""Bytes an index of a matrix's entry in released formats: PEFT's SHiRA stores two int32, torch's sparse COO
tensors (which FL4Health exchanges) two int64. Charged like the best code: only when the set is new."""


@dataclass(frozen=True)
class RunFacts:
    """What a run's payload depends on. Raises ``ConfigError`` for facts that contradict each other.

    - ``k``: masked values that a client sends, out of ``eligible_size`` (N) that a mask chooses from
    - ``backbone_size``: values of full fine-tuning, heads outside
    - ``client_heads``: head values of each client; ``schedule``: the clients of each round
    - ``beside``: further shared values that travel with any mask, such as feed-forward biases
    - ``down_alone``: values that this run sends down and never up (``fedmask.products``)
    - ``up_value_bytes``, ``down_value_bytes``: bytes a value each way (``fedmask.channel.value_bytes``)
    - ``changes_down``: what is sent down is the change since the version before, in every way
    - ``recipe_bytes``: what a client receives to derive the shared mask
    - ``once_up_bytes``, ``once_down_bytes``: what each client of this run exchanges once for its mask
    - ``mask_bytes``: measured bytes of a packed k-mask; None: the entropy bound
    - ``unions``: measured size of the union that each round's clients receive (``union_sizes``); None: the
      expectation for independent random masks (``independent_union``)
    - ``lora_values``: see the function of that name; 0 leaves LoRA out
    """

    k: int
    eligible_size: int
    backbone_size: int
    client_heads: Sequence[int]
    schedule: Sequence[Sequence[int]]
    beside: int = 0
    down_alone: int = 0
    up_value_bytes: float = 4.0
    down_value_bytes: float = 4.0
    changes_down: bool = False
    recipe_bytes: int = 256
    once_up_bytes: int = 0
    once_down_bytes: int = 0
    mask_bytes: int | None = None
    unions: Sequence[int] | None = None
    lora_values: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.eligible_size:
            raise ConfigError(f"costs: expected k in [0, {self.eligible_size}], found {self.k}")
        clients = len(self.client_heads)
        for number, sampled in enumerate(self.schedule, start=1):
            if len(set(sampled)) != len(sampled) or not all(0 <= c < clients for c in sampled):
                raise ConfigError(
                    f"costs: expected distinct clients below {clients}, found round {number}: {sampled}"
                )
        if self.unions is not None and len(self.unions) != len(self.schedule):
            raise ConfigError(f"costs: expected {len(self.schedule)} unions, found {len(self.unions)}")
        for size in self.unions or ():
            if not 0 <= size <= self.eligible_size:
                raise ConfigError(f"costs: expected unions in [0, {self.eligible_size}], found {size}")


@dataclass(frozen=True)
class Cost:
    """Payload bytes of a whole run in one way. Index and head bytes are part of the up and down bytes.

    ``mask_index_bytes``: bytes of packed indices alone, both directions, without recipes; ``mask_indices``:
    how many indices those are.
    ``not_charged``: what the bytes do not show; ``assumes``: what stands in for a size not measured.
    """

    way: str
    up_bytes: int = 0
    down_bytes: int = 0
    index_up_bytes: int = 0
    index_down_bytes: int = 0
    head_up_bytes: int = 0
    head_down_bytes: int = 0
    mask_index_bytes: int = 0
    mask_indices: int = 0
    client_rounds: int = 0
    not_charged: str = ""
    assumes: str = ""

    @property
    def total_bytes(self) -> int:
        """Both directions."""
        return self.up_bytes + self.down_bytes

    @property
    def up_bytes_per_client_round(self) -> float:
        """Mean over all times that a client took part."""
        return self.up_bytes / max(1, self.client_rounds)

    @property
    def down_bytes_per_client_round(self) -> float:
        """Mean over all times that a client took part."""
        return self.down_bytes / max(1, self.client_rounds)

    @property
    def index_share(self) -> float:
        """Share of what says which entries (indices, recipes) in all bytes of the whole run, 0 to 1."""
        return (self.index_up_bytes + self.index_down_bytes) / max(1, self.total_bytes)

    @property
    def head_share(self) -> float:
        """Share of the heads in all bytes, 0 to 1."""
        return (self.head_up_bytes + self.head_down_bytes) / max(1, self.total_bytes)

    def total_bytes_with(self, index_format: str) -> int:
        """Both directions, with the indices in one of ``INDEX_FORMATS`` instead of the best code."""
        return self.total_bytes - self.mask_index_bytes + self.mask_indices * INDEX_FORMATS[index_format]

    def index_share_with(self, index_format: str) -> float:
        """``index_share`` in that format."""
        index = self.index_up_bytes + self.index_down_bytes - self.mask_index_bytes
        index += self.mask_indices * INDEX_FORMATS[index_format]
        return index / max(1, self.total_bytes_with(index_format))

    def to_dict(self) -> dict[str, object]:
        """All fields and derived figures, for JSON."""
        return asdict(self) | {
            "total_bytes": self.total_bytes,
            "up_bytes_per_client_round": self.up_bytes_per_client_round,
            "down_bytes_per_client_round": self.down_bytes_per_client_round,
            "index_share": self.index_share,
            "head_share": self.head_share,
            "index_formats": {
                name: {"total_bytes": self.total_bytes_with(name), "index_share": self.index_share_with(name)}
                for name in INDEX_FORMATS
            },
        }


def compare(facts: RunFacts) -> dict[str, Cost]:
    """The run's payload in each way, by the names above.

    The mask ways are left out when nothing is masked (k = 0), LoRA when ``lora_values`` is 0.
    """
    ways = {"this-run": _once("this-run", facts, facts.once_up_bytes, facts.once_down_bytes, "")}
    if facts.k:
        ways["shared-mask"] = _shared_mask(facts)
        ways["agreed-mask"] = _agreed_mask(facts)
        ways["client-masks"] = _client_masks(facts)
    ways["full"] = _dense("full", facts, facts.backbone_size, "memory and compute of training every weight")
    if facts.lora_values:
        ways["lora"] = _dense("lora", facts, facts.lora_values, "the bias of averaging the two factors apart")
    return ways


def _indices(k: int, size: int) -> int:
    return math.ceil(index_entropy_bytes(k, size))


def _mask_bytes(facts: RunFacts) -> int:
    return _indices(facts.k, facts.eligible_size) if facts.mask_bytes is None else facts.mask_bytes


class _Sum:
    """Adds up a run message by message."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        names = ("up", "down", "index_up", "index_down", "head_up", "head_down", "mask_index")
        self._sums, self._indices, self._number = dict.fromkeys(names, 0), 0, 0

    def rounds(self) -> Iterator[Sequence[int]]:
        """The clients of each round, one round after the other."""
        for number, sampled in enumerate(self._facts.schedule):
            self._number = number
            yield sampled

    def message(self, direction: str, values: int, client: int, index: int = 0, indices: int = 0) -> None:
        """``index`` bytes say which entries; ``indices``: how many packed indices they are (0: a recipe)."""
        head = self._facts.client_heads[client]
        width = self._facts.up_value_bytes if direction == "up" else self._facts.down_value_bytes
        if direction == "down" and self._facts.changes_down and self._number == 0:
            width = 0.0  # nothing has changed yet
        self._sums[direction] += math.ceil((values + head) * width) + index
        self._sums[f"index_{direction}"] += index
        self._sums[f"head_{direction}"] += math.ceil(head * width)
        self._sums["mask_index"] += index * bool(indices)
        self._indices += indices

    def cost(self, way: str, not_charged: str, assumes: str = "") -> Cost:
        sums = {f"{name}_bytes": value for name, value in self._sums.items()}
        rounds = sum(len(sampled) for sampled in self._facts.schedule)
        return Cost(
            way,
            **sums,
            mask_indices=self._indices,
            client_rounds=rounds,
            not_charged=not_charged,
            assumes=assumes,
        )


def _dense(way: str, facts: RunFacts, values: int, not_charged: str) -> Cost:
    total = _Sum(facts)
    for sampled in total.rounds():
        for client in sampled:
            total.message("down", values, client)
            total.message("up", values, client)
    return total.cost(way, not_charged)


def _once(way: str, facts: RunFacts, up: int, down: int, not_charged: str, indices: int = 0) -> Cost:
    """Values both ways; ``up`` and ``down`` bytes of indices when a client takes part for the first time.

    ``indices``: how many packed ones that is each way.
    """
    total = _Sum(facts)
    seen: set[int] = set()
    for sampled in total.rounds():
        for client in sampled:
            new = client not in seen
            seen.add(client)
            values = facts.k + facts.beside
            total.message("down", values + facts.down_alone, client, down * new, indices * new)
            total.message("up", values, client, up * new, indices * new)
    return total.cost(way, not_charged)


def _shared_mask(facts: RunFacts) -> Cost:
    return _once("shared-mask", facts, 0, facts.recipe_bytes, "reading the checkpoint once to find the mask")


def _agreed_mask(facts: RunFacts) -> Cost:
    index = _mask_bytes(facts)
    hidden = (
        "passes over local data to score the weights, the scores' memory, scores that are sent with the votes"
        " (2 bytes an entry, once), telling the server about the data"
    )
    return _once("agreed-mask", facts, index, index, hidden, facts.k)


def _client_masks(facts: RunFacts) -> Cost:
    total = _Sum(facts)
    own = _mask_bytes(facts)
    seen: set[int] = set()
    holds: dict[int, int] = {}  # client -> size of the union that it received last
    for number, sampled in enumerate(total.rounds()):
        if facts.unions is None:
            union = independent_union(facts.k, facts.eligible_size, len(seen))
        else:
            union = facts.unions[number]
        for client in sampled:
            before = min(holds.get(client, 0), union)
            index = _indices(union - before, facts.eligible_size - before)
            holds[client] = union
            new = client not in seen
            total.message("down", union + facts.beside, client, index, union - before)
            total.message("up", facts.k + facts.beside, client, own * new, facts.k * new)
        seen.update(sampled)
    hidden = "passes over local data to score the weights, the scores' memory, merging unequal masks"
    assumes = (
        "masks independent of each other, so the largest union" if facts.unions is None else "measured unions"
    )
    return total.cost("client-masks", hidden, assumes)
