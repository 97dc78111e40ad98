"""The exact mean of LoRA's products: what two averaged factors miss of it goes into the frozen weights.

Source: Singhal, Ponkshe, Vepakomma 2024, FedEx-LoRA (arXiv 2410.09432). Clients start from the mean factors
A, B and come back with A_i, B_i; the mean of what they have learned is that of the products, so beside the
new means the residual mean(B_i A_i) - mean(B) mean(A) is added to the weights, by all parties. With weights
w_i that add up to 1 it is

    sum_i w_i (B_i - mean(B)) (A_i - A_n)          for any A_n, since the B_i - mean(B) cancel out:

n - 1 products of rank r for n replies, without any decomposition. That is what is sent, or the residual's
change as a whole where that is fewer values. Different here: clients weigh by their rows, a client that
comes late gets the sum of all residuals once, and all parties add the products up in one fixed order, so that
they hold the same bits. ``down`` codecs that round a value alone are allowed; the others would lose more of a
residual than is ever made up for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedmask.channel.terms import Terms
from fedmask.channel.ways import down_way
from fedmask.codecs import MAX_ABS
from fedmask.codecs.base import Vector
from fedmask.errors import ConfigError
from fedmask.layout import RESIDUAL, Layout, Segment

if TYPE_CHECKING:
    from fedmask.config import RunConfig
    from fedmask.trainables import Trainable

METHOD = "fedex-lora"
_AVERAGES, _CODECS = ("fedavg", "mean"), ("fp32", "fp16", "bf16")
_LARGEST = MAX_ABS / 4  # as in server.bounds: no sound value comes near


def check_products(config: RunConfig) -> None:
    """ConfigError for settings under which this method would not be what its name says."""
    if config.method != METHOD:
        return
    if config.server.strategy.lower() not in _AVERAGES:
        raise ConfigError(
            f"server.strategy {config.server.strategy!r}: method {METHOD!r} makes a mean exact, so use one of"
            f" {', '.join(_AVERAGES)}, or method 'lora'"
        )
    if config.server.sharing == "by-task":
        raise ConfigError(f"server.sharing 'by-task': method {METHOD!r} has one residual for all; use 'all'")
    if down_way(config.down).codec.name not in _CODECS:
        raise ConfigError(
            f"down: method {METHOD!r} sends factors that are never sent again, so use one of"
            f" {', '.join(_CODECS)} (and '+delta'), found {config.down!r}"
        )


@dataclass(frozen=True)
class Products:
    """LoRA's layers as the vector has them: A ``[rank, inputs]``, B ``[outputs, rank]``, layer by layer.

    ``sides``: (outputs, inputs) of each; ``turned``: whether its weight is stored as [inputs, outputs];
    ``scale``: alpha / rank; ``clients``: replies of a round at most.
    """

    sides: tuple[tuple[int, int], ...]
    turned: tuple[bool, ...]
    rank: int
    scale: float
    clients: int

    @property
    def residual_size(self) -> int:
        """Number of values of the adapted weights."""
        return sum(outputs * inputs for outputs, inputs in self.sides)

    @property
    def sent_rank(self) -> int:
        """Rank of a round's residual at most."""
        return self.rank * (self.clients - 1)

    @property
    def sent_size(self) -> int:
        """Number of values of a round's residual as factors."""
        return self.sent_rank * sum(map(sum, self.sides))

    def sends_factors(self, changes: bool) -> bool:
        """Whether clients are sent factors: where ``changes`` go down, and are fewer values that way."""
        return changes and self.sent_size < self.residual_size

    def down_size(self, changes: bool) -> int:
        """Values of the residual in a message: of its ``changes``, or of the whole of it each time."""
        return self.sent_size if self.sends_factors(changes) else self.residual_size

    def stacked(self, changes: Sequence[Vector], weights: Sequence[float], mean: Vector) -> Vector:
        """A round's residual as factors, float32 ``[sent_size]``: memory of O(n f) for n replies.

        ``changes``: the clients' factors, float32 ``[f]`` each, as changes from any one start, as is their
        ``mean``; ``weights`` add up to 1. Replies that are missing give zeros.
        """
        out = np.zeros(self.sent_size, np.float32)
        layers = self._factors(out)
        for layer, reply, left, right in self._terms(changes, weights, mean):
            rows = slice(reply * self.rank, (reply + 1) * self.rank)
            layers[layer][0][rows], layers[layer][1][rows] = left, right
        return out

    def added(self, residual: Vector, factors: Vector) -> Vector:
        """``residual`` (float32 ``[residual_size]``) plus the products of ``factors`` (``stacked``)."""
        out = residual.copy()
        for matrix, (lefts, rights) in zip(self._matrices(out), self._factors(factors), strict=True):
            _add_products(matrix, lefts, rights)
        return np.clip(out, -_LARGEST, _LARGEST, out=out)

    def summed(
        self, residual: Vector, changes: Sequence[Vector], weights: Sequence[float], mean: Vector
    ) -> Vector:
        """The bits of ``added(residual, stacked(changes, ...))``, with the factors of one reply at a time."""
        out = residual.copy()
        matrices = self._matrices(out)
        for layer, _, left, right in self._terms(changes, weights, mean):
            _add_products(matrices[layer], left, right)
        return np.clip(out, -_LARGEST, _LARGEST, out=out)

    def _terms(
        self, changes: Sequence[Vector], weights: Sequence[float], mean: Vector
    ) -> Iterator[tuple[int, int, Vector, Vector]]:
        """(layer, reply, float32 ``[rank, rows]``, float32 ``[rank, columns]``), layer by layer."""
        start = 0
        for layer, (outputs, inputs) in enumerate(self.sides):
            middle, stop = start + self.rank * inputs, start + self.rank * (inputs + outputs)
            for i, change in enumerate(changes[:-1]):
                up = change[middle:stop].astype(np.float64) - mean[middle:stop]
                up = self.scale * weights[i] * up.reshape(outputs, self.rank).T
                down = change[start:middle].astype(np.float64) - changes[-1][start:middle]
                down = down.reshape(self.rank, inputs)
                left, right = (down, up) if self.turned[layer] else (up, down)
                yield layer, i, _narrowed(left), _narrowed(right)
            start = stop

    def _stored(self) -> list[tuple[int, int]]:
        """(rows, columns) of each adapted weight as it is stored."""
        return [(i, o) if turned else (o, i) for (o, i), turned in zip(self.sides, self.turned, strict=True)]

    def _matrices(self, residual: Vector) -> list[np.ndarray]:
        """Each layer's part of the residual, ``[rows, columns]``: views."""
        out, start = [], 0
        for rows, columns in self._stored():
            out.append(residual[start : start + rows * columns].reshape(rows, columns))
            start += rows * columns
        return out

    def _factors(self, factors: Vector) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each layer's part of the factors, ``[sent_rank, rows]`` and ``[sent_rank, columns]``: views."""
        out, start = [], 0
        for rows, columns in self._stored():
            middle = start + self.sent_rank * rows
            stop = middle + self.sent_rank * columns
            left, right = factors[start:middle], factors[middle:stop]
            out.append((left.reshape(self.sent_rank, rows), right.reshape(self.sent_rank, columns)))
            start = stop
        return out

    def rounded(self, factors: Vector, down: str) -> Vector:
        """``factors`` (float32 ``[sent_size]``) as the clients read them, where changes are sent ``down``."""
        codec = down_way(down).codec
        return codec.decode(memoryview(codec.encode(factors, None, None)[0]), factors.size)

    def change(self, whole: Terms, factors: Vector | None = None) -> Terms:
        """The terms of a change, from those of a whole vector; ``factors``: what the sender puts in it."""
        if not self.sends_factors(True):
            return whole
        segments = [
            Segment(RESIDUAL, self.sent_size) if segment.name == RESIDUAL else segment
            for segment in whole.layout.segments
        ]
        return replace(whole, layout=Layout(tuple(segments)), step=ByProducts(self, factors))


def _narrowed(values: np.ndarray) -> Vector:
    out: Vector = np.clip(values, -_LARGEST, _LARGEST).astype(np.float32)
    return out


def _add_products(matrix: np.ndarray, lefts: np.ndarray, rights: np.ndarray) -> None:
    """Add the outer product of each pair of rows to ``matrix`` (float32 ``[rows, columns]``), in place.

    Product by product, not by a matrix product: its order of summing is the machine's own.
    """
    product = np.empty_like(matrix)
    for left, right in zip(lefts, rights, strict=True):
        np.multiply.outer(left, right, out=product)
        matrix += product


def products_of(trainables: Iterable[Trainable], config: RunConfig) -> Products:
    """The products of a run whose models train ``trainables``, LoRA's factors among them."""
    from fedmask.trainables import LoRA

    lora = next(trainable for trainable in trainables if isinstance(trainable, LoRA))
    clients = config.server.clients_per_round or config.clients
    return Products(tuple(lora.sides), tuple(lora.turned), lora.rank, lora.scale, clients)


@dataclass(frozen=True, eq=False)
class ByProducts:
    """The step of a vector that begins with the residual: products are added to it, changes to the rest."""

    products: Products
    factors: Vector | None = None

    def grown(self, vector: Vector) -> Vector:
        """See ``fedmask.channel.terms.Step``."""
        return vector

    def taken(self, difference: Vector) -> Vector:
        """See ``fedmask.channel.terms.Step``."""
        factors = np.zeros(self.products.sent_size, np.float32) if self.factors is None else self.factors
        return np.concatenate([factors, difference[self.products.residual_size :]])

    def moved(self, grown: Vector, change: Vector) -> Vector:
        """See ``fedmask.channel.terms.Step``."""
        size, sent = self.products.residual_size, self.products.sent_size
        residual = self.products.added(grown[:size], change[:sent])
        return np.concatenate([residual, grown[size:] + change[sent:]])
