"""The machine loses its power: of a file only that is left which the run had waited for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmask.config import RunConfig
from fedmask.delta import read_delta
from server.resume import interrupted
from tests.apps.test_resume import Cuts, PowerCut, assert_same, quick

MakeConfig = Callable[..., RunConfig]


class Disk:
    """What would be found after a power cut, as bad as it can be: all names, and no byte that was not synced.

    The cut is tried after each moment in which the disk changes for sure. ``found`` counts what was there.
    """

    def __init__(self, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.folder = config, Path(config.runs_dir) / config.name
        self.there: dict[int, bytes] = {}
        self.found: list[str] = []
        self.best = -1
        self.sync, self.move = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(os, "replace", self._move)

    def _sync(self, opened: int) -> None:
        self.sync(opened)
        path = Path(f"/proc/self/fd/{opened}")
        if path.is_file():
            self.there[os.fstat(opened).st_ino] = path.read_bytes()
        self._cut()

    def _move(self, here: str | Path, there: str | Path) -> None:
        self.move(here, there)
        self._cut()

    def left(self, name: str = "left") -> RunConfig:
        """The folder after the cut, under another name, and its settings."""
        left = self.config.model_copy(update={"name": name})
        copy = self.folder.with_name(name)
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for path in self.folder.iterdir():
            (copy / path.name).write_bytes(self.there.get(path.stat().st_ino, b""))
        return left

    def _cut(self) -> None:
        names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        copy = self.folder.with_name("left")
        if "summary.json" in names:
            self.left()
            assert "bytes" in json.loads((copy / "summary.json").read_text())
            assert read_delta(copy / "delta.safetensors").segments
            self.found.append("end")
        elif any(name.endswith(".safetensors") for name in names - {"delta.safetensors"}):
            left = self.left()
            point = interrupted(copy, left)
            assert point.state.round >= self.best
            self.best = point.state.round
            self.found.append(point.file)


def test_whatever_the_disk_had_not_got_a_run_goes_on_where_it_was(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at each moment, resumed and not: there is a state with all that it needs, never an older one."""
    whole = quick(make_config(name="whole", rounds=4, server={"strategy": "fedadam"})).folder
    config = make_config(rounds=4, server={"strategy": "fedadam"})
    disk = Disk(config, monkeypatch)
    with pytest.raises(PowerCut):
        quick(config, Cuts("reply", 3))
    assert disk.best == 2
    left = disk.left("cut")
    assert set(disk.found) == {"state.safetensors", "state.previous.safetensors"}
    quick(config, existing="resume")
    assert disk.best == 4 and disk.found[-1] == "end" and len(disk.found) > 30
    monkeypatch.undo()
    quick(left, existing="resume")
    assert_same(Path(left.runs_dir) / left.name, whole)
