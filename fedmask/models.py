"""Loading a pre-trained backbone and putting a task's head on it.

A process keeps one backbone; the model of each task shares its tensors and has its own head.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

import fedmask._env  # noqa: F401  (no service in the net is asked to convert a model)

from fedmask.attention import use_plain_attention
from fedmask.bundled import bundled_model_path
from fedmask.dropout import Dropout
from fedmask.errors import ConfigError
from fedmask.precision import Precision, cast
from fedmask.rng import rng_for, seed_for
from fedmask.space import backbone_of, backbone_parameters

HeadKind = Literal["mean", "hf"]
BUNDLED_MODEL = "minilm"
_INIT_DEVIATION = 0.02  # of the head's weights, as BERT initialises its own
_NO_SAFETENSORS = re.compile(r"(no|have a) file named [^ ]*safetensors")


@dataclass(frozen=True)
class Backbone:
    """A pre-trained model without a head, its tokenizer, and where both came from."""

    model: nn.Module
    tokenizer: Any
    source: str

    @property
    def pad_id(self) -> int:
        """The token that fills up a batch."""
        return int(self.tokenizer.pad_token_id)

    def copy_in(self, precision: Precision) -> Backbone:
        """A copy rounded to ``precision`` (see ``fedmask.precision``). For a backbone in float32."""
        return Backbone(cast(copy.deepcopy(self.model), precision), self.tokenizer, self.source)

    @property
    def most_tokens(self) -> int | None:
        """How many tokens of one text the model can read; None where its config sets no limit."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        for name, module in self.model.named_modules():
            if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                return int(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from there
        return int(positions) if positions else None


def load_backbone(name: str) -> Backbone:
    """Load ``minilm`` (bundled), a local folder or a Hugging Face hub name, in float32.

    ConfigError if it is not there or its architecture cannot be used.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    source = model_source(name)
    with _quiet(), _load_errors(name), torch.random.fork_rng(devices=[]):
        # transformers would open its pickled weights where peft is installed, and ignore it elsewhere
        adapter = find_adapter_config_file(source) is not None
    if adapter:
        raise ConfigError(
            f"model {name!r}: expected a model, found a PEFT adapter with it (adapter_config.json); merge"
            " it by merge_and_unload() and save the result, or remove it"
        )
    with _quiet(), _load_errors(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the checkpoint lacks is drawn: a pooler, which is no part of the backbone
        model, report = AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    lacking = sorted(set(report["missing_keys"]) & backbone_parameters(model).keys())
    if lacking:  # they would be random, and nobody would know
        raise ConfigError(
            f"model {name!r}: its checkpoint lacks {lacking[0]} and {len(lacking) - 1} more tensors that its "
            "config.json asks for; use the weights and config of one model"
        )
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:  # made up from the model's type alone
        raise ConfigError(
            f"model {name!r}: its tokenizer knows no words; save the tokenizer's files beside the model's"
        )
    if tokenizer.pad_token is None:  # GPT-2 and its kin have none; attention ignores it anyway
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"model {name!r}: its tokenizer has no padding token; set one in its tokenizer_config.json"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.eval()
    return Backbone(model, tokenizer, source)


def model_source(name: str) -> str:
    """What ``from_pretrained`` takes for ``name``. ConfigError for a folder that is missing or no model."""
    if name == BUNDLED_MODEL:
        return str(bundled_model_path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model folder {name}: expected a config.json in it; save a model with save_pretrained"
            )
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"model folder {name}: not found; give an existing folder, a hub name or {BUNDLED_MODEL!r}"
        )
    return name


class MeanHead(nn.Module):
    """A task's model with the default head: dropout and a linear layer on the mean of the last hidden states.

    ``forward(input_ids, attention_mask, ...)`` (``[batch, tokens]``) gives logits ``[batch, outputs]``;
    padding does not count in the mean.
    """

    def __init__(self, backbone: nn.Module, outputs: int, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(int(backbone.config.hidden_size), outputs)  # type: ignore[union-attr,arg-type]

    @property
    def base_model(self) -> nn.Module:
        """The pre-trained part, under the name that transformers gives it."""
        return self.backbone

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: torch.Tensor
    ) -> torch.Tensor:
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        states = states.to(self.head.weight.dtype)  # heads are float32 in every precision
        weight = attention_mask[:, :, None].to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: torch.Tensor = self.head(self.dropout(mean))
        return logits


class OwnHead(nn.Module):
    """A task's model with the architecture's own classification head, pooler included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base_model(self) -> nn.Module:
        """The pre-trained part, under the name that transformers gives it."""
        return backbone_of(self.model)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits
        return logits


def task_model(
    backbone: Backbone, task: str, outputs: int, *, head: HeadKind, seed: int, dropout: float
) -> MeanHead | OwnHead:
    """The model of one task: the backbone's tensors shared, a head drawn from (seed, task).

    ``outputs``: number of classes, or 1 for regression. ``dropout``: the probability of every dropout
    layer. The head's start is the same on every machine. Comes in evaluation mode.
    """
    if head == "hf":
        return _for_training(_own_head(backbone, task, outputs, seed), dropout)
    if getattr(backbone.model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"model {backbone.source}: an encoder-decoder has no single last state; use --head hf"
        )
    # A copy of the modules around the same tensors, so that each task can be patched on its own.
    shared = {id(t): t for t in [*backbone.model.parameters(), *backbone.model.buffers()]}
    with torch.random.fork_rng(devices=[]):  # torch draws a start of its own, which is not ours
        model = MeanHead(copy.deepcopy(backbone.model, shared), outputs, dropout)
    numbers = rng_for(seed, -1, -1, f"head/{task}").standard_normal(tuple(model.head.weight.shape))
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(numbers * _INIT_DEVIATION))
        model.head.bias.zero_()
    return _for_training(model, dropout)


M = TypeVar("M", bound=nn.Module)


def _for_training(model: M, dropout: float) -> M:
    use_plain_attention(backbone_of(model))
    set_dropout(model, dropout)
    return model.eval()


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout of ``model`` the same probability and our random numbers, inside attention too."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, nn.Dropout | Dropout):
                module._modules[name] = Dropout(probability)
        for name in ("attention_dropout", "dropout"):  # plain numbers, as several architectures keep them
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, probability)


def _own_head(backbone: Backbone, task: str, outputs: int, seed: int) -> OwnHead:
    from transformers import AutoModelForSequenceClassification

    with _quiet(), _load_errors(backbone.source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, -1, -1, f"head/{task}"))  # what the checkpoint lacks is drawn
        model = AutoModelForSequenceClassification.from_pretrained(
            backbone.source,
            num_labels=outputs,
            dtype=torch.float32,
            pad_token_id=backbone.pad_id,
            use_safetensors=True,
        )
    inside = {id(p) for p in backbone_parameters(backbone.model).values()}
    every = backbone.model.named_parameters(remove_duplicate=False)  # tied ones under each of their names
    ours = {name: p for name, p in every if id(p) in inside}
    for owner_name, owner in backbone_of(model).named_modules():
        for key in list(owner._parameters):
            name = f"{owner_name}.{key}" if owner_name else key
            if name in ours:
                owner._parameters[key] = ours[name]
    model.eval()
    return OwnHead(model)


def head_parameters(model: nn.Module) -> list[str]:
    """Names (in ``model``) of everything that is not backbone: the head, with the pooler where it is used."""
    backbone = {id(p) for p in backbone_parameters(model).values()}
    skip = {id(p) for p in _unused_pooler(model)}
    return [
        n
        for n, p in model.named_parameters()
        if id(p) not in backbone | skip and not n.startswith("fedmask.")
    ]


def _unused_pooler(model: nn.Module) -> list[nn.Parameter]:
    pooler = getattr(model.backbone, "pooler", None) if isinstance(model, MeanHead) else None
    return list(pooler.parameters()) if isinstance(pooler, nn.Module) else []


@contextlib.contextmanager
def _load_errors(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    # RuntimeError: weights of other shapes than the config says.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if _NO_SAFETENSORS.search(reason):
            raise ConfigError(
                f"model {name!r}: cannot be loaded (expected its weights in safetensors, found none); pickled"
                " ones, as in pytorch_model.bin, are not opened: if you trust who made them, convert them by"
                " AutoModel.from_pretrained(...).save_pretrained(FOLDER)"
            ) from error
        raise ConfigError(
            f"model {name!r}: cannot be loaded ({reason[:200]}); give {BUNDLED_MODEL!r}, a local folder or "
            "a hub name that is in the cache or can be downloaded"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' loading bars and notes: a head that is new is what we ask for."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
