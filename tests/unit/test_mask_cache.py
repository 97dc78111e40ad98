"""Derived masks on disk: what is read is what was derived, or is derived anew."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedmask import mask_cache
from fedmask.masks import Mask, Rule, derive_mask
from tests.support import make_model


def test_a_kept_mask_is_the_derived_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMASK_CACHE", str(tmp_path / "cache"))
    derived: list[Rule] = []

    def counting(model: object, rule: Rule) -> Mask:
        derived.append(rule)
        return derive_mask(model, rule)  # type: ignore[arg-type]

    monkeypatch.setattr(mask_cache, "derive_mask", counting)
    models = make_model(seed=0), make_model(seed=1)
    rules = Rule(density=0.02), Rule(density=0.02, per_tensor=True), Rule("random", 0.02, seed=3)
    for _ in range(2):
        for model in models:
            for rule in rules:
                kept, plain = mask_cache.kept_or_derived(model, rule), derive_mask(model, rule)
                assert (kept.digest, kept.rule) == (plain.digest, rule)
                np.testing.assert_array_equal(kept.indices, plain.indices)
    assert len(derived) == 6  # each of them once
    files = sorted((tmp_path / "cache" / "masks").iterdir())
    assert len(files) == 6
    before = [path.read_bytes() for path in files]
    for path, data in zip(files, before, strict=True):
        # Cut, flipped in the digest, another sound mask, outside of the space, empty.
        flipped, moved = bytes([data[0] ^ 1]) + data[1:], data[:32] + _moved(data[32:])
        bad = [data[:-8], flipped, moved, data[:-1] + b"\x7f", b""]
        path.write_bytes(bad[files.index(path) % len(bad)])
    for model in models:
        for rule in rules:
            assert mask_cache.kept_or_derived(model, rule).digest == derive_mask(model, rule).digest
    assert len(derived) == 12
    assert [path.read_bytes() for path in files] == before


def _moved(data: bytes) -> bytes:
    """Sorted, unique and inside the space: the first entry that can be moved by one is."""
    indices = np.frombuffer(data, "<i8").copy()
    at = int(np.flatnonzero(np.diff(indices, append=indices[-1] + 9) > 1)[0])
    indices[at] += 1
    return indices.tobytes()


def test_code_that_chooses_entries_is_part_of_the_name(tmp_path: Path) -> None:
    """What ``random-channels`` takes for a feed-forward layer is decided outside of ``masks``, for one."""
    package = tmp_path / "fedmask"
    shutil.copytree(Path(mask_cache.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    found = [mask_cache._code(package)]
    for name in ("masks/base.py", "space.py", "trainables/adapters.py", "rng.py", "stored.py"):
        with (package / name).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        mask_cache._code.cache_clear()
        found.append(mask_cache._code(package))
    mask_cache._code.cache_clear()
    assert len(set(found)) == 6 == len(found)


def test_masks_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMASK_CACHE", str(tmp_path))
    monkeypatch.setattr(mask_cache, "_KEPT", 2)
    model, rules = make_model(), [Rule("random", 0.02, seed=seed) for seed in range(3)]
    for age, rule in enumerate(rules[:2]):
        mask_cache.kept_or_derived(model, rule)
        (new,) = (path for path in (tmp_path / "masks").iterdir() if path.stat().st_mtime > 1e6)
        os.utime(new, (age, age))
    mask_cache.kept_or_derived(model, rules[0])  # read, so used later than the other
    mask_cache.kept_or_derived(model, rules[2])
    assert len(list((tmp_path / "masks").iterdir())) == 2
    derived: list[Rule] = []
    monkeypatch.setattr(
        mask_cache, "derive_mask", lambda model, rule: derived.append(rule) or derive_mask(model, rule)
    )
    for rule in (rules[0], rules[2], rules[1]):
        mask_cache.kept_or_derived(model, rule)
    assert derived == [rules[1]]


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDMASK_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert mask_cache.kept_or_derived(make_model(), Rule(density=0.02)).k > 0
    assert list(tmp_path.iterdir()) == []
