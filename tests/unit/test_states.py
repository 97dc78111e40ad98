"""What clients keep in a run's folder: a page in it may come from anybody who passed the folder on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flwr.app import RecordDict

from experiments.states import OBJECTS, States
from experiments.wire import Parcel, pack
from fedmask.flower import bytes_record

STATE = RecordDict({"received": bytes_record(b"values")})


def _kept(folder: Path) -> Parcel:
    """The state of node 5, written as a run does."""
    (parcel,) = pack([STATE])
    states = States()
    states.keep_in(folder)
    states.put(5, parcel)
    return parcel


def test_another_process_finds_what_was_kept(tmp_path: Path) -> None:
    parcel = _kept(tmp_path)
    again = States()
    again.load(tmp_path)
    assert again.get(5) == parcel


@pytest.mark.parametrize("way", ["up", "absolute", "in the folder"])
def test_a_page_s_names_lead_nowhere_else(tmp_path: Path, way: str) -> None:
    """Neither is such a file read nor, as a damaged piece would be, removed; what else was kept is found."""
    folder = tmp_path / "clients"
    parcel = _kept(folder)
    precious = (folder / OBJECTS if way == "in the folder" else tmp_path) / "thesis.txt"
    precious.write_text("years of work")
    name = {"up": "../../thesis.txt", "absolute": str(precious), "in the folder": "thesis.txt"}[way]
    assert (folder / OBJECTS / name).samefile(precious)
    page = {"root": parcel.root, "objects": [*parcel.objects, name]}
    (folder / "4.json").write_text(json.dumps(page))
    states = States()
    states.load(folder)
    assert precious.read_text() == "years of work"
    assert states.get(4) is None
    assert states.get(5) == parcel


def test_a_damaged_piece_goes_and_is_written_anew(tmp_path: Path) -> None:
    parcel = _kept(tmp_path)
    damaged = tmp_path / OBJECTS / next(iter(parcel.objects))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    states = States()
    states.load(tmp_path)
    assert states.get(5) is None and not damaged.exists()
    assert _kept(tmp_path) == parcel
    states.load(tmp_path)
    assert states.get(5) == parcel
