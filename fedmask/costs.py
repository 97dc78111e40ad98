"""What the same run would have cost otherwise: payload bytes by formula, from shapes and the schedule.

The same rules for every way, so that they compare:

- a client that takes part in a round receives the current values and sends its own, head included; the
  first round is charged like any other;
- every value costs ``value_bytes``, whatever the way; indices cost the best code known, rounded up to whole
  bytes a message, and are charged whenever the set is new to the one who reads it;
- only bytes are charged: no data passes, scores, memory or trust. ``Cost.not_charged`` says what that hides.

``shared-mask``   the mask is a function of the checkpoint (PaFi, arXiv 2305.16742): a recipe, once a client.
``agreed-mask``   one task-specific mask (such as FISH, arXiv 2111.09839, or LT-SFT, arXiv 2110.07560) of the
                  same k on which all clients agree: each client sends its own choice once and receives the
                  agreed one once, at its first round; then values alone.
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
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from fedmask.codecs.indices import index_entropy_bytes
from fedmask.errors import ConfigError

_QUERY_VALUE = re.compile(
    r"(^|\.)(query|value|q_proj|v_proj|q_lin|v_lin|q|v|c_attn|query_key_value)\.weight$"
)


@dataclass(frozen=True)
class RunFacts:
    """What a run's payload depends on. Raises ``ConfigError`` for facts that contradict each other.

    - ``k``: masked values that a client sends, out of ``eligible_size`` (N) that a mask chooses from
    - ``backbone_size``: values of full fine-tuning, heads outside
    - ``client_heads``: head values of each client; ``schedule``: the clients of each round
    - ``beside``: further shared values that travel with any mask, such as feed-forward biases
    - ``value_bytes``: bytes a value: 4 for fp32, 2 for fp16
    - ``recipe_bytes``: what a client receives to derive the shared mask
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
    value_bytes: float = 4.0
    recipe_bytes: int = 256
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

    ``not_charged``: what the bytes do not show; ``assumes``: what stands in for a size not measured.
    """

    way: str
    up_bytes: int = 0
    down_bytes: int = 0
    index_up_bytes: int = 0
    index_down_bytes: int = 0
    head_up_bytes: int = 0
    head_down_bytes: int = 0
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

    def to_dict(self) -> dict[str, object]:
        """All fields and derived figures, for JSON."""
        return asdict(self) | {
            "total_bytes": self.total_bytes,
            "up_bytes_per_client_round": self.up_bytes_per_client_round,
            "down_bytes_per_client_round": self.down_bytes_per_client_round,
            "index_share": self.index_share,
            "head_share": self.head_share,
        }


def compare(facts: RunFacts) -> dict[str, Cost]:
    """The run's payload in each way, by the names above.

    The mask ways are left out when nothing is masked (k = 0), LoRA when ``lora_values`` is 0.
    """
    ways: dict[str, Cost] = {}
    if facts.k:
        ways["shared-mask"] = _shared_mask(facts)
        ways["agreed-mask"] = _agreed_mask(facts)
        ways["client-masks"] = _client_masks(facts)
    ways["full"] = _dense("full", facts, facts.backbone_size, "memory and compute of training every weight")
    if facts.lora_values:
        ways["lora"] = _dense("lora", facts, facts.lora_values, "the bias of averaging the two factors apart")
    return ways


def union_sizes(
    masks: Mapping[int, NDArray[np.integer]], schedule: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Measured unions, one a round: distinct indices in the masks of all clients of earlier rounds."""
    known: NDArray[np.integer] = np.empty(0, np.int64)
    seen: set[int] = set()
    sizes = []
    for sampled in schedule:
        sizes.append(int(known.size))
        for client in sampled:
            if client not in seen:
                known = np.union1d(known, masks[client])
                seen.add(client)
    return tuple(sizes)


def independent_union(k: int, eligible_size: int, clients: int) -> int:
    """Expected union of independent random masks, N (1 - (1 - k/N)^clients), rounded up.

    An upper bound for masks that favour the same entries: scores of related data overlap more than chance.
    """
    if not k or not clients:
        return 0
    if k == eligible_size:
        return k
    return math.ceil(-eligible_size * math.expm1(clients * math.log1p(-k / eligible_size)))


def lora_values(shapes: Iterable[Sequence[int]], rank: int = 8) -> int:
    """Values of both factors over the adapted matrices [d_out, d_in]: sum of rank x (d_out + d_in)."""
    return sum(rank * (shape[0] + shape[1]) for shape in shapes)


def query_value_shapes(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Shapes of the query and value projections among named weights, LoRA's usual targets.

    A fused projection (``c_attn``, ``query_key_value``) counts as one matrix, as the PEFT library adapts it.
    """
    pairs = zip(names, shapes, strict=True)
    return [shape for name, shape in pairs if len(shape) == 2 and _QUERY_VALUE.search(name)]


def _indices(k: int, size: int) -> int:
    return math.ceil(index_entropy_bytes(k, size))


def _mask_bytes(facts: RunFacts) -> int:
    return _indices(facts.k, facts.eligible_size) if facts.mask_bytes is None else facts.mask_bytes


class _Sum:
    """Adds up a run message by message."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._sums = dict.fromkeys(("up", "down", "index_up", "index_down", "head_up", "head_down"), 0)

    def message(self, direction: str, values: int, client: int, index: int = 0) -> None:
        head = self._facts.client_heads[client]
        head_bytes = math.ceil(head * self._facts.value_bytes)
        all_bytes = math.ceil((values + head) * self._facts.value_bytes)
        self._sums[direction] += all_bytes + index
        self._sums[f"index_{direction}"] += index
        self._sums[f"head_{direction}"] += head_bytes

    def cost(self, way: str, not_charged: str, assumes: str = "") -> Cost:
        sums = {f"{name}_bytes": value for name, value in self._sums.items()}
        rounds = sum(len(sampled) for sampled in self._facts.schedule)
        return Cost(way, **sums, client_rounds=rounds, not_charged=not_charged, assumes=assumes)


def _dense(way: str, facts: RunFacts, values: int, not_charged: str) -> Cost:
    total = _Sum(facts)
    for sampled in facts.schedule:
        for client in sampled:
            total.message("down", values, client)
            total.message("up", values, client)
    return total.cost(way, not_charged)


def _once(way: str, facts: RunFacts, up: int, down: int, not_charged: str) -> Cost:
    """Values both ways; ``up`` and ``down`` bytes of indices when a client takes part for the first time."""
    total = _Sum(facts)
    seen: set[int] = set()
    for sampled in facts.schedule:
        for client in sampled:
            new = client not in seen
            seen.add(client)
            total.message("down", facts.k + facts.beside, client, down * new)
            total.message("up", facts.k + facts.beside, client, up * new)
    return total.cost(way, not_charged)


def _shared_mask(facts: RunFacts) -> Cost:
    return _once("shared-mask", facts, 0, facts.recipe_bytes, "reading the checkpoint once to find the mask")


def _agreed_mask(facts: RunFacts) -> Cost:
    index = _mask_bytes(facts)
    hidden = (
        "passes over local data to score the weights, the scores' memory, telling the server about the data"
    )
    return _once("agreed-mask", facts, index, index, hidden)


def _client_masks(facts: RunFacts) -> Cost:
    total = _Sum(facts)
    own = _mask_bytes(facts)
    seen: set[int] = set()
    holds: dict[int, int] = {}  # client -> size of the union that it received last
    for number, sampled in enumerate(facts.schedule):
        if facts.unions is None:
            union = independent_union(facts.k, facts.eligible_size, len(seen))
        else:
            union = facts.unions[number]
        for client in sampled:
            before = min(holds.get(client, 0), union)
            index = _indices(union - before, facts.eligible_size - before)
            holds[client] = union
            total.message("down", union + facts.beside, client, index)
            total.message("up", facts.k + facts.beside, client, own * (client not in seen))
        seen.update(sampled)
    hidden = "passes over local data to score the weights, the scores' memory, merging unequal masks"
    assumes = (
        "masks independent of each other, so the largest union" if facts.unions is None else "measured unions"
    )
    return total.cost("client-masks", hidden, assumes)
