"""How large the masks of published methods are, counted as their authors count.

fedmask's density is a share of the eligible entries, with the head beside it. Others count otherwise; to
compare at their sizes, these functions give the number of backbone entries, and ``density_of`` the density
with which a rule here picks exactly as many.
"""

from __future__ import annotations

from torch import nn

from fedmask.errors import ConfigError
from fedmask.masks.base import mask_size
from fedmask.space import backbone_parameters

LT_SFT_ENTRIES = {"xlm-roberta-base": 14_155_776, "bert-base-multilingual-cased": 7_667_712}
"""k of LT-SFT's released masks, by model: ``--ft_params_num`` in cambridgeltl/composable-sft's
examples/text-classification/train_nli.sh and examples/language-modeling/train_mlm.sh."""

_CLASSIFIERS = ("classifier", "score")
"""How transformers names what stands behind the pooler; a pooler itself may be masked by FISH."""


def fish_entries(model: nn.Module, ratio: float = 0.005) -> int:
    """FISH's k = int(ratio x all parameters, head included) - head: the head is charged to the budget.

    ``model``: a transformers model with a classification head (its shapes alone matter; the meta device
    will do). Source: varunnair18/FISH, run_glue_sparse_update.py. ConfigError where the head leaves nothing.
    """
    named = list(model.named_parameters())
    total = sum(p.numel() for _, p in named)
    head = sum(p.numel() for name, p in named if name.split(".")[0] in _CLASSIFIERS)
    entries = int(total * ratio) - head
    if entries < 1:
        raise ConfigError(
            f"fish: ratio {ratio} of {total} parameters is {int(total * ratio)}, and the head alone has "
            f"{head}; give a ratio of at least {(head + 1) / total:.6f}"
        )
    return entries


def lt_sft_eligible(model: nn.Module) -> int:
    """How many backbone entries LT-SFT's scripts choose from: all but LayerNorm's, embeddings included."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    return sum(p.numel() for p in backbone_parameters(model).values() if id(p) not in norms)


def density_of(entries: int, eligible_size: int) -> float:
    """The density with which ``mask_size`` gives exactly ``entries`` of ``eligible_size``.

    ConfigError if there are not as many.
    """
    if not 0 < entries <= eligible_size:
        raise ConfigError(
            f"mask of {entries} entries: expected 1 to {eligible_size}, the size of the eligible set"
        )
    density = entries / eligible_size
    if mask_size(density, eligible_size) != entries:  # only beyond the 2^53 of a float
        raise ConfigError(f"no density gives exactly {entries} of {eligible_size} entries")
    return density
