"""A finished run as ordinary Hugging Face checkpoints, one folder a task.

Same parameter names and shapes as the pre-trained model, so the same latency and memory.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedmask.beside import write_beside
from fedmask.config import from_dict
from fedmask.delta import Delta, read_delta
from fedmask.errors import CheckpointError, ConfigError
from fedmask.layout import HEAD_PREFIX, Layout, sent
from fedmask.models import MeanHead, OwnHead
from fedmask.sharing import stored_names
from fedmask.training import Stream, tuned
from fedmask.tuner import Tuning, fold
from fedmask.views import View, beside_size, up_layout
from fedmask.workspace import Workspace

_MANIFEST = "fedmask-export.json"
_CARD = """\
---
library_name: transformers
tags: [text-classification, federated-learning, sparse-fine-tuning]
---

# {task}

Tuned from `{source}` with fedmask (method `{method}`, {k} trained backbone values) on the task `{task}`.
{use}
"""

_USE_MEAN = """
The folder holds the tuned backbone as an ordinary checkpoint and the task's head in `head.safetensors`
(`weight` [{outputs}, {hidden}], `bias` [{outputs}]): a linear layer on the mean of the last hidden states
over the tokens that are no padding. Outputs in order: {labels}.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."
model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
head = load_file(f"{{folder}}/head.safetensors")
batch = tokenizer(["some text"], return_tensors="pt", truncation=True, max_length={max_tokens})
with torch.no_grad():
    states = model(**batch).last_hidden_state
weight = batch["attention_mask"].unsqueeze(-1)
mean = (states * weight).sum(1) / weight.sum(1)
logits = torch.nn.functional.linear(mean, head["weight"], head["bias"])
```
"""

_USE_HF = """
The folder holds an ordinary classification checkpoint. Outputs in order: {labels}.

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""


def export_run(run: str | Path, to: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write one checkpoint folder a task of a finished ``run`` below ``to``; returns the folders.

    With head ``mean`` a folder loads with ``AutoModel`` and has ``head.safetensors`` beside it; with
    ``hf`` it loads with ``AutoModelForSequenceClassification``. ConfigError if the run is not finished
    or a folder exists; CheckpointError if the pre-trained model is another one. ``overwrite``: files of an
    older export there are replaced (by its ``fedmask-export.json``); a folder that is no export is refused.
    """
    run, to = Path(run), Path(to)
    workspace, delta = open_run(run)
    folders = {task: to / task for task in workspace.tasks}
    for task, folder in folders.items():  # all is checked before anything is written
        vector_of(workspace, task, delta)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not overwrite:
                raise ConfigError(f"export: {folder} exists; give another folder or --overwrite")
            _older_files(folder)
    for task, folder in folders.items():
        part = folder.with_name(f".{folder.name}.part")  # no task's name begins so
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            _write(workspace, task, delta, part)
            _replace(folder, part)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return list(folders.values())


def _older_files(folder: Path) -> list[Path]:
    """The files that an older export wrote into ``folder``. ConfigError if it is none."""
    try:
        names = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        found = [folder / name for name in names]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"export: {folder}: expected an older export to overwrite, found something else; remove it"
        ) from error
    inside = folder.resolve()
    return [path for path in found if path.parent.resolve().is_relative_to(inside)]


def _replace(folder: Path, part: Path) -> None:
    """Move the files of ``part`` into ``folder``; what an older export wrote there goes, the rest stays."""
    files = sorted(path.relative_to(part) for path in part.rglob("*") if path.is_file())
    listed = {"files": [path.as_posix() for path in files]}
    (part / _MANIFEST).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    if (folder / _MANIFEST).is_file():
        for old in _older_files(folder):
            old.unlink(missing_ok=True)
    for path in (Path(_MANIFEST), *files):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part / path, folder / path)


def open_run(run: Path) -> tuple[Workspace, Delta]:
    """The workspace and final delta of a finished run. ConfigError or CheckpointError as above."""
    for name in ("config.json", "delta.safetensors"):
        if not (run / name).is_file():
            raise ConfigError(
                f"run {run}: expected a finished run with {name}, found none; see fedmask run --help"
            )
    try:
        settings = dict(json.loads((run / "config.json").read_text(encoding="utf-8"))["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"run {run}: expected a run's settings in config.json, found something else ({error})"
        ) from error
    workspace, delta = Workspace(from_dict(settings)), read_delta(run / "delta.safetensors")
    workspace.use_precision("fp32")  # the change is added to the stored weights, whatever it was trained in
    if workspace.checkpoint_digest != delta.checkpoint:
        raise CheckpointError(
            f"run {run}: trained on the checkpoint {delta.checkpoint}, model {workspace.config.model!r} "
            f"is {workspace.checkpoint_digest}; use the same pre-trained weights"
        )
    if workspace.config.has_views:
        return workspace, delta
    if delta.indices is not None:
        workspace.use_mask(delta.indices)
    if delta.recipe is not None and (workspace.mask is None or workspace.mask.digest != delta.recipe.mask):
        raise CheckpointError(
            f"run {run}: its values belong to the mask {delta.recipe.mask}, here its settings give another; "
            "use the release of fedmask that made the run"
        )
    return workspace, delta


def vector_of(workspace: Workspace, task: str, delta: Delta) -> np.ndarray:
    """The final vector of ``task``'s clients, float32 ``[layout.size]``; CheckpointError if there is none."""
    layout, sharing = _stored_layout(workspace, task, delta), workspace.config.server.sharing
    if sharing == "local-heads":
        raise ConfigError(
            "this run's heads stayed with its clients (server.sharing 'local-heads'), so no model is whole; "
            "fedmask.load_delta adds delta.safetensors to the backbone"
        )
    stored = stored_names(layout, task, sharing)
    wanted = {stored[segment.name]: segment.size for segment in layout.segments}
    others = {
        name
        for other in workspace.tasks
        for name in (*stored_names(layout, other, sharing).values(), HEAD_PREFIX + other)
    } - wanted.keys()
    found = {name: values.size for name, values in delta.segments.items() if name not in others}
    if found != wanted:
        raise CheckpointError(
            f"delta: expected segments of the sizes {wanted}, found {found}; "
            "the run folder is damaged or its config was changed"
        )
    return np.concatenate([delta.segments[name] for name in wanted])


def merged(workspace: Workspace, task: str, delta: Delta) -> MeanHead | OwnHead:
    """``task``'s model with the final delta folded in, on tensors of its own.

    Adapters between its layers (method ``adapter``) are left out: see ``fedmask.beside``.
    """
    with _tuned(workspace, task, delta) as (model, _):
        return fold(copy.deepcopy(model))  # type: ignore[return-value]


@contextmanager
def _tuned(workspace: Workspace, task: str, delta: Delta) -> Iterator[tuple[MeanHead | OwnHead, Tuning]]:
    """``task``'s model at the final delta, and what is attached to it."""
    vector, view = vector_of(workspace, task, delta), None
    if workspace.config.has_views and delta.indices is not None:
        view = View(workspace.no_mask, delta.indices)  # the file's order is the view's: union, then the rest
    model = workspace.model(task, view)
    with tuned(model, vector, Stream(workspace.config.seed, -1, -1)) as tuning:
        yield model, tuning


def _stored_layout(workspace: Workspace, task: str, delta: Delta) -> Layout:
    layout = workspace.layout(task)
    if not workspace.config.has_views or delta.indices is None:
        return layout
    return up_layout(layout, delta.indices.size)


def _write(workspace: Workspace, task: str, delta: Delta, folder: Path) -> None:
    from safetensors.torch import save_file

    model = merged(workspace, task, delta)
    with _tuned(workspace, task, delta) as (_, tuning):
        backbone = "model" if isinstance(model, MeanHead) else "model.base_model"
        beside = write_beside(tuning, workspace.config.model, backbone, folder)
    data = workspace.data(task)
    labels = list(data.labels) or ["value"]
    if isinstance(model, MeanHead):
        _save(model.backbone, folder)
        head = {name: tensor.detach().contiguous() for name, tensor in model.head.state_dict().items()}
        save_file(head, str(folder / "head.safetensors"), metadata={"labels": json.dumps(labels)})
        use = _USE_MEAN.format(
            outputs=len(labels),
            hidden=model.head.in_features,
            labels=", ".join(labels),
            max_tokens=workspace.config.train.max_tokens,
        )
    else:
        own = model.model.config
        own.id2label = dict(enumerate(labels))  # type: ignore[union-attr]
        own.label2id = {label: i for i, label in enumerate(labels)}  # type: ignore[union-attr]
        _save(model.model, folder)
        use = _USE_HF.format(labels=", ".join(labels))
    workspace.backbone.tokenizer.save_pretrained(str(folder))
    card = _CARD.format(
        task=task,
        source=workspace.config.model,
        method=workspace.config.method,
        k=workspace.k + beside_size(sent(workspace.layout(task))),
        use=use + beside,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _save(model: nn.Module, folder: Path) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32).contiguous()
    model.save_pretrained(str(folder))  # type: ignore[operator]
