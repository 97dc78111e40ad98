"""Masks from the magnitude of pre-trained weights: no data, no gradient, no task.

PaFi (Liao, Meng, Monz, ACL 2023, arXiv 2305.16742) trains the weights of smallest magnitude under
one global threshold. ``largest`` is its opposite, kept as a control. Here k = round(density x N)
where implementations round down, and ties are broken so that every party agrees.
"""

from __future__ import annotations

from torch import nn

from fedmask.masks.base import Mask, Rule
from fedmask.masks.select import choose
from fedmask.space import backbone_parameters, parameter_space
from fedmask.stored import stored_reader


def magnitude(model: nn.Module, rule: Rule) -> Mask:
    """The k entries of smallest absolute stored value; ties by tensor order, then flat index."""
    return _ranked(model, rule, largest=False)


def largest(model: nn.Module, rule: Rule) -> Mask:
    """The k entries of largest absolute stored value; ties by tensor order, then flat index."""
    return _ranked(model, rule, largest=True)


def _ranked(model: nn.Module, rule: Rule, *, largest: bool) -> Mask:
    space = parameter_space(model, rule.eligible)
    read = stored_reader(model, backbone_parameters(model))
    return Mask(choose(space, read, rule, largest=largest), space, rule)
