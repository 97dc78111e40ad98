"""Scores by the empirical Fisher information: sums of squared per-example gradients.

FISH (Sung, Nair, Raffel, NeurIPS 2021, arXiv 2111.09839): F = sum over samples of (d loss / d w)^2 with the
true label, in evaluation mode, one global top-k. There with one forward and backward pass a row; here with
a batch's, since the weight gradient that one row alone would give is its tokens' share of the layer's:

    y = x W^T    dL/dW = sum over rows r of G_r,    G_r = sum over tokens t of g[r, t]^T x[r, t]

and nothing but rounding (padding to a batch's longest row) tells the two apart. What differs: FISH ranks
all parameters with a random head outside the mask; here the eligible set, and the federation's own start
of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fedmask.config import ScoreConfig
from fedmask.masks.scores import Evidence, Scores
from fedmask.space import ParameterSpace, backbone_parameters, is_conv1d, is_linear
from fedmask.tasks import Tokenized, batches

_TOKENS = 1024
"""Tokens in a batch, padding included: inputs and output gradients of all layers are held for so many."""


def fish(model: nn.Module, space: ParameterSpace, evidence: Evidence, settings: ScoreConfig) -> Scores:
    """Sums of squared gradients of each row's own loss, over ``settings.samples`` rows drawn at random.

    All rows if there are fewer. Memory: N scores, one tensor's gradient, the activations of 1,024 tokens.
    Models whose eligible tensors are not all weights of linear layers that run once (embeddings, norms,
    layers that share weights) go through one row at a time: exact too, several times slower.
    """
    from fedmask.training import batch_loss  # it imports the trainables, which import this package

    drawn = evidence.generator("fisher").permutation(len(evidence.data))[: settings.samples]
    rows = evidence.data.select(np.sort(drawn))

    def loss(part: np.ndarray) -> torch.Tensor:
        return batch_loss(model, rows, part, evidence.pad_id)

    sums = [torch.zeros(shape, dtype=torch.float32) for shape in space.shapes]
    layers = _layers(model, space)
    if layers is None or not _runs_once(layers, loss):
        _row_by_row(model, space, rows, loss, sums)
    else:
        _by_layers(model, dict(zip(layers, sums, strict=True)), rows, loss)
    return Scores(space, sums)


Loss = Callable[[np.ndarray], torch.Tensor]
"""Row numbers -> the mean loss of the model on them."""


def _layers(model: nn.Module, space: ParameterSpace) -> list[nn.Module] | None:
    """The linear layer behind each tensor of the space; None if there is one without, or with several."""
    parameters = backbone_parameters(model)
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    found = []
    for name in space.names:
        owner = owners.get(id(parameters[name]), [])
        if len(owner) != 1 or not is_linear(owner[0]) or owner[0].weight is not parameters[name]:
            return None
        found.append(owner[0])
    return found


def _runs_once(layers: list[nn.Module], loss: Loss) -> bool:
    """Whether two rows pass through each layer in one call whose first dimension is the rows."""
    calls: dict[nn.Module, int] = dict.fromkeys(layers, 0)

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].dim() == 3 and inputs[0].shape[0] == 2
        calls[layer] += 1 if rows else 2

    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            loss(np.zeros(2, np.int64))
    finally:
        for handle in handles:
            handle.remove()
    return all(number == 1 for number in calls.values())


def _row_by_row(
    model: nn.Module, space: ParameterSpace, rows: Tokenized, loss: Loss, sums: list[torch.Tensor]
) -> None:
    parameters = backbone_parameters(model)
    chosen = [parameters[name] for name in space.names]
    with _only(model, chosen):
        for row in range(len(rows)):
            gradients = torch.autograd.grad(loss(np.array([row])), chosen, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()


def _by_layers(model: nn.Module, sums: dict[nn.Module, torch.Tensor], rows: Tokenized, loss: Loss) -> None:
    def forward(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not output.requires_grad:  # nothing before this layer does: the gradient starts here
            output.requires_grad_(True)
        given = inputs[0].detach()
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: _add_squares(layer, given, gradient, sums[layer])
        )

    handles = [layer.register_forward_hook(forward) for layer in sums]
    try:
        with _only(model, []):
            for part in _parts(rows):
                total = loss(part) * len(part)  # of each row its own loss, not its share of a mean
                total.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()


def _add_squares(layer: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> None:
    """Add to ``total`` the squares of each row's weight gradient, from ``[rows, tokens, features]``."""
    left, right = gradient.float(), inputs.float()
    if is_conv1d(layer):  # its weight is [in, out]
        left, right = right, left
    one = torch.empty_like(total)
    for a, b in zip(left, right, strict=True):
        torch.mm(a.t(), b, out=one)
        total.addcmul_(one, one)


def _parts(rows: Tokenized) -> Iterator[np.ndarray]:
    """Every row once, in batches of similar length and at most ``_TOKENS`` tokens (or one row)."""
    order = np.concatenate(batches(rows, len(rows), None))
    lengths, end = rows.lengths[order], len(order)
    while end:  # the longest first: order is by rising length
        start = max(0, end - max(1, _TOKENS // int(lengths[end - 1])))
        yield order[start:end]
        end = start


@contextmanager
def _only(model: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    """``model`` with gradients for the ``chosen`` parameters alone."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
