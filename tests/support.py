"""Tiny random models of seven architectures, and inputs for them. Nothing here reads the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmask.rng import rng_for
from fedmask.space import backbone_of
from fedmask.tasks import Tokenized
from fedmask.trainables import Draw

VOCABULARY = 67
_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


def config_of(architecture: str, **changes: Any) -> Any:
    """A config with hidden size 32 and two layers."""
    import transformers as t

    sizes: dict[str, Any]
    match architecture:
        case "bert":
            kind, sizes = t.BertConfig, _BERT
        case "roberta":
            kind, sizes = t.RobertaConfig, _BERT
        case "distilbert":
            kind, sizes = (
                t.DistilBertConfig,
                {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
            )
        case "gpt2":
            kind, sizes = t.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
        case "opt":
            kind, sizes = (
                t.OPTConfig,
                {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 64,
                 "num_attention_heads": 4, "max_position_embeddings": 40},
            )  # fmt: skip
        case "t5":
            kind, sizes = (
                t.T5Config,
                {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            )
        case "llama":
            kind, sizes = (
                t.LlamaConfig,
                {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "max_position_embeddings": 40},
            )  # fmt: skip
        case _:
            raise KeyError(architecture)
    return kind(**{**_SMALL, **sizes, **changes})


ARCHITECTURES = ("bert", "roberta", "distilbert", "gpt2", "opt", "t5", "llama")
BIASED = ("bert", "roberta", "distilbert", "gpt2", "opt")


def make_model(architecture: str = "bert", *, classes: int = 0, seed: int = 0, **changes: Any) -> Any:
    """A random backbone (of T5 the encoder), or with ``classes`` a model for sequence classification.

    Biases are random too: fresh ones are all zero, which no checkpoint's are. The backbone's values depend
    on the seed alone, not on whether there is a head. No dropout.
    """
    import transformers as t

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    quiet = {
        "bert": none,
        "roberta": none,
        "distilbert": {"dropout": 0.0, "attention_dropout": 0.0},
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "opt": {"dropout": 0.0},
        "t5": {"dropout_rate": 0.0},
        "llama": {},
    }[architecture]
    config = config_of(architecture, **{**quiet, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if classes:
            config.num_labels = classes
            model = t.AutoModelForSequenceClassification.from_config(config)
        else:
            model = t.T5EncoderModel(config) if architecture == "t5" else t.AutoModel.from_config(config)
    fill(backbone_of(model), seed)
    return model.eval()


def fill(module: nn.Module, seed: int) -> None:
    """Random values for every parameter, each from a stream of its own name; padding rows stay zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            numbers = rng_for(seed, -1, -1, f"test/{name}").standard_normal(tuple(parameter.shape)) * 0.05
            if parameter.dim() == 1 and name.endswith("weight"):
                numbers += 1.0  # a normalisation's scale
            parameter.copy_(torch.from_numpy(numbers))
        for child in module.modules():
            if isinstance(child, nn.Embedding) and child.padding_idx is not None:
                child.weight[child.padding_idx] = 0


def batch(rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens ``[rows, length]``, later rows shorter and padded on the right."""
    tokens = rng_for(seed, -1, -1, "test/batch").integers(3, VOCABULARY, (rows, length))
    mask = np.arange(length)[None, :] < (length - 2 * np.arange(rows))[:, None]
    ids = torch.from_numpy(np.where(mask, tokens, 0))
    return {"input_ids": ids, "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The last hidden states of a backbone, or the logits of a classifier."""
    out = model(**(inputs or batch()))
    if isinstance(out, torch.Tensor):
        return out
    found: torch.Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """A number that depends on every output in its own way."""
    out = outputs(model, inputs).float()
    weights = torch.linspace(-1.0, 1.0, out.numel()).reshape(out.shape)
    return (out * weights).mean() + (out * out).mean()


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes: equal only if every bit is."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state_bits(module: nn.Module) -> dict[str, bytes]:
    """The bytes of everything in the module's state."""
    return {name: bits(value) for name, value in module.state_dict().items()}


def draw(seed: int = 0, round: int = 1) -> Draw:
    """The streams that all clients of a round share."""
    return lambda purpose: rng_for(seed, round, -1, purpose)


def tokens(rows: int = 12, seed: int = 0, *, regression: bool = False, classes: int = 3) -> Tokenized:
    """Rows of 3 to 10 random tokens with labels."""
    rng = rng_for(seed, -1, -1, "test/rows")
    lengths = rng.integers(3, 11, rows)
    labels = rng.standard_normal(rows).astype(np.float32) if regression else rng.integers(0, classes, rows)
    return Tokenized(
        rng.integers(3, VOCABULARY, int(lengths.sum())).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        None,
        labels,
    )


WORDS = [f"word{i}" for i in range(VOCABULARY - 4)]


def save_checkpoint(folder: Path, architecture: str = "bert", **options: Any) -> Path:
    """A folder as ``from_pretrained`` wants it, tokenizer included. ``options`` go to ``make_model``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    make_model(architecture, **options).save_pretrained(str(folder))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(str(folder))
    return folder


def save_task(path: Path, labels: tuple[str, ...], *, rows: int = 160, seed: int = 0) -> Path:
    """A TSV file whose label is told by one word. Without labels: a regression."""
    rng = rng_for(seed, -1, -1, "test/task")
    lines = ["text\tlabel"]
    for row in range(rows):
        others = " ".join(rng.choice(WORDS[10:], size=int(rng.integers(2, 8))))
        sign = row % (len(labels) or 4)
        label = labels[sign] if labels else f"{sign / 4 + 0.01 * rng.standard_normal():.4f}"
        lines.append(f"{WORDS[sign]} {others}\t{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@contextmanager
def random_state_untouched() -> Iterator[None]:
    """Fails if torch's, NumPy's or Python's global random state is another one afterwards."""
    import random

    def state() -> tuple[bytes, bytes, object]:
        return bits(torch.get_rng_state()), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[union-attr]

    before = state()
    yield
    assert state() == before, "a global random state has changed"


def train_a_little(model: nn.Module, steps: int = 3, lr: float = 0.01) -> None:
    """A few optimizer steps on whatever requires a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(seed=step)).backward()
        optimizer.step()


Build = Callable[..., nn.Module]


def run_config(folder: Path, **changes: Any) -> Any:
    """A run over ``save_run_files``' folder: mood (2 classes, 2 clients) and price (regression, 1 client)."""
    from fedmask.config import from_dict

    def task(name: str, clients: int, metric: str) -> dict[str, Any]:
        source = str(folder / f"{name}.tsv")
        return {"name": name, "source": source, "text": "text", "label": "label", "clients": clients,
                "metric": metric}  # fmt: skip

    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "density": 0.02,
        "tasks": [task("mood", 2, "accuracy"), task("price", 1, "spearman")],
        "partition": {"kind": "iid"},
        "rounds": 2,
        "workers": 1,
        "adapter": {"bottleneck": 4},
        "train": {"batch_size": 8, "max_tokens": 16, "lr": 0.01, "weight_decay": 0.1, "dropout": 0.2},
        "runs_dir": str(folder / "runs"),
    }
    return from_dict(values | changes)


def save_two_tasks(folder: Path) -> Path:
    """``model``, ``mood.tsv`` (2 classes) and ``topic.tsv`` (3 classes), for runs through the apps."""
    save_checkpoint(folder / "model")
    save_task(folder / "mood.tsv", ("no", "yes"), rows=240, seed=1)
    save_task(folder / "topic.tsv", ("sports", "money", "art"), rows=240, seed=2)
    return folder


def save_run_files(folder: Path, architecture: str = "bert") -> Path:
    """A model and two task files for ``run_config``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "model", architecture)
    save_task(folder / "mood.tsv", ("no", "yes", "no", "yes"), rows=90, seed=1)
    save_task(folder / "price.tsv", (), rows=70, seed=2)
    return folder
