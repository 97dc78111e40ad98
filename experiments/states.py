"""What the clients of the in-process grid keep between messages: each piece once, and on disk if asked.

Pieces are Flower's objects, addressed by their content: a vector that all clients of a version hold is there
once, whoever holds it. On disk a run that was interrupted finds what its clients had kept; without that they
would begin again with nothing, as restarted SuperNodes do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from experiments.wire import Parcel, is_whole
from server.observer import Silent
from server.record import writing

FOLDER, OBJECTS = "clients", "objects"
_OBJECT = re.compile("[0-9a-f]{64}")  # what Flower calls an object


class States:
    """A client's state by its node; None is the empty one."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[str, tuple[str, ...]]] = {}
        self._pieces: dict[str, bytes] = {}
        self._names: dict[str, str] = {}
        self._uses: Counter[str] = Counter()
        self._folder: Path | None = None

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def pieces(self) -> int:
        """Number of different pieces."""
        return len(self._pieces)

    def get(self, node: int) -> Parcel | None:
        """The state of a node."""
        if node not in self._kept:
            return None
        root, names = self._kept[node]
        return Parcel(root, {name: self._pieces[name] for name in names})

    def put(self, node: int, state: Parcel | None) -> None:
        """Keep ``state`` for a node instead of what it had, on disk too after ``keep_in``.

        Raises ``FederationError`` for what the disk refuses.
        """
        before = self._kept.pop(node, None)
        if state is not None:
            names = tuple(self._take(name, piece) for name, piece in state.objects.items())
            self._kept[node] = self._names[state.root], names
        with writing(self._folder.parent) if self._folder is not None else nullcontext():
            if self._folder is not None and before != self._kept.get(node):
                self._write(self._folder, node)
            for name in before[1] if before else ():
                self._drop(name)

    def keep_in(self, folder: Path) -> None:
        """Write what changes from now on into ``folder``."""
        self._folder = folder

    def load(self, folder: Path) -> None:
        """Take over what an earlier process kept; a state without all its pieces, undamaged, is left out."""
        for path in sorted(folder.glob("*.json")):
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
                # The page may be another's (a copied run): a name in it must not lead out of the folder.
                if not all(map(_OBJECT.fullmatch, said["objects"])):
                    continue
                objects = {name: _whole(folder / OBJECTS / name) for name in said["objects"]}
                self.put(int(path.stem), Parcel(said["root"], objects))
            except (OSError, ValueError, KeyError, TypeError):
                continue

    def _take(self, name: str, piece: bytes) -> str:
        name = self._names.setdefault(name, name)  # one text for all who name the piece
        self._pieces.setdefault(name, piece)
        self._uses[name] += 1
        return name

    def _drop(self, name: str) -> None:
        self._uses[name] -= 1
        if not self._uses[name]:
            del self._uses[name], self._pieces[name], self._names[name]
            if self._folder is not None:
                (self._folder / OBJECTS / name).unlink(missing_ok=True)

    def _write(self, folder: Path, node: int) -> None:
        # Pieces first, then the page that names them; only then may older pieces go.
        (folder / OBJECTS).mkdir(parents=True, exist_ok=True)
        page = folder / f"{node}.json"
        if node not in self._kept:
            page.unlink(missing_ok=True)
            return
        root, names = self._kept[node]
        for name in names:
            if not (folder / OBJECTS / name).exists():
                _replace(folder / OBJECTS / name, self._pieces[name])
        _replace(page, json.dumps({"root": root, "objects": names}).encode())


class KeepStates(Silent):
    """Keeps the states in the run's folder from its first round to its end."""

    def __init__(self, states: States, *, resume: bool) -> None:
        self._states, self._resume = states, resume
        self._folder: Path | None = None

    def on_start(self, folder: Path, rounds: int, clients: int) -> None:
        """Take over what an interrupted run's clients had kept."""
        self._folder = folder / FOLDER
        if self._resume:
            self._states.load(self._folder)

    def on_round_start(self, round: int, clients: tuple[int, ...]) -> None:
        """Not before the folder is this run's own."""
        if clients and self._folder is not None:
            self._states.keep_in(self._folder)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Nobody needs them any more, also where no round was left to be run."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _whole(path: Path) -> bytes:
    """A piece, if it is what its name says; else it goes, to be written anew. Raises OSError, ValueError."""
    piece = path.read_bytes()
    if not is_whole(path.name, piece):
        path.unlink()
        raise ValueError(f"{path}: damaged")
    return piece


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a page must not outlive the pieces that it names
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
