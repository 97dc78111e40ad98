"""Derived masks on disk, beside the clients' tokenized rows (``fedmask.shard_cache``).

A file's name is the digest of the checkpoint's values, the rule and the code that follows it; its content is
the mask's digest and the indices, so that what is read is what was derived, or is derived anew. Of 8 bytes an
entry each, the files used last are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import nn

from fedmask.errors import CheckpointError
from fedmask.masks import Mask, Rule, derive_mask, mask_from_indices, mask_size
from fedmask.shard_cache import write_private
from fedmask.space import ParameterSpace, parameter_space

_KEPT = 16


def kept_or_derived(model: nn.Module, rule: Rule) -> Mask:
    """``derive_mask``, from the disk where FEDMASK_CACHE says that things are kept and the mask is there."""
    folder = os.environ.get("FEDMASK_CACHE")
    if not folder:
        return derive_mask(model, rule)
    space = parameter_space(model, rule.eligible)
    text = json.dumps(
        [space.digest, asdict(rule), np.__version__, _code(Path(__file__).parent)], sort_keys=True
    )
    name = hashlib.sha256(text.encode()).hexdigest()
    path = Path(folder).expanduser() / "masks" / f"{name}.bin"
    kept = _read(path, space, rule)
    if kept is None:
        kept = derive_mask(model, rule)
        write_private(path, bytes.fromhex(kept.digest) + kept.indices.astype("<i8").tobytes())
        _forget_old(path.parent)
    else:
        with contextlib.suppress(OSError):
            os.utime(path)
    return kept


def _read(path: Path, space: ParameterSpace, rule: Rule) -> Mask | None:
    """The mask in a file; None if there is none, or anything else than the one that was written."""
    size = 32 + 8 * mask_size(rule.density, space.eligible_size)
    with contextlib.suppress(OSError, CheckpointError):
        if path.stat().st_size == size:
            data = path.read_bytes()
            mask = mask_from_indices(np.frombuffer(data[32:], "<i8").astype(np.int64), space, rule)
            if mask.digest == data[:32].hex():
                return mask
    return None


def _forget_old(folder: Path) -> None:
    """Remove all but the masks used last; one that another process removes first is gone as well."""
    used: list[tuple[int, Path]] = []
    for path in folder.glob("*.bin"):
        with contextlib.suppress(OSError):
            used.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(used)[:-_KEPT]:
        with contextlib.suppress(OSError):
            path.unlink()


@lru_cache(maxsize=1)
def _code(package: Path) -> str:
    """Digest of all modules of ``package``: what chooses a mask lies in many of them."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return found.hexdigest()
