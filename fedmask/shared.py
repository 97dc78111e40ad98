"""One copy of a backbone's tensors in memory for all processes of a machine.

The values lie in a file that only lives in memory and has no name, so nothing is left behind however a
process ends. Each process maps it copy-on-write: what it only reads (embeddings, norms, biases) is one
copy for all, and a page that it writes to (masked weights) becomes its own. No process can change what
another one sees, so nobody has to know which tensors will be written.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import tempfile
from typing import Any, NamedTuple

import torch

from fedmask.models import Backbone
from fedmask.stored import keep_as_stored, kept_stored

# As far apart as PyTorch's own allocations begin: vector kernels may sum in another order elsewhere.
_ALIGNMENT = 64


class _Place(NamedTuple):
    """Where a tensor lies in the file and what it is."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: bool
    requires_grad: bool
    stored: int | None  # the number of the tensor that holds a rounded one's stored values


class SharedBackbone:
    """A backbone in an open file: the tensors, then everything else as a pickle without tensors.

    ``descriptor`` may be sent to another process of the machine, which opens it with ``load_shared``.
    Costs the model's size in memory once. Raises what pickle raises for a model that cannot be pickled.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._file = _memory_file()
        try:
            pickler = _Pickler(self._file)
            pickler.dump(backbone)
            places = pickle.dumps([pickler.places[number] for number in range(len(pickler.places))])
            rest = pickle.dumps((places, pickler.rest.getvalue()))
            self._file.write(rest)
            self._file.write(len(rest).to_bytes(8, "little"))
            self._file.flush()
        except BaseException:
            self._file.close()
            raise

    @property
    def descriptor(self) -> int:
        """The open file's number in this process."""
        return int(self._file.fileno())

    def close(self) -> None:
        """Close the file; processes that have it mapped keep what they see."""
        self._file.close()


def load_shared(descriptor: int) -> Backbone:
    """The backbone of an open ``SharedBackbone``: the same values, shared until they are written to.

    Unpickles: for files that this program made itself, never for anything that came from outside.
    """
    size = os.fstat(descriptor).st_size
    mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    length = int.from_bytes(mapped[size - 8 :], "little")
    places, rest = pickle.loads(mapped[size - 8 - length : size - 8])
    return _Unpickler(io.BytesIO(rest), mapped, pickle.loads(places)).load()  # type: ignore[no-any-return]


class _Pickler(pickle.Pickler):
    """Writes tensors to a file and everything else to ``rest``."""

    def __init__(self, file: Any) -> None:
        self.rest = io.BytesIO()
        super().__init__(self.rest, protocol=pickle.HIGHEST_PROTOCOL)
        self.places: dict[int, _Place] = {}
        self._numbers: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []  # so that no id is used twice
        self._file = file

    def persistent_id(self, thing: object) -> int | None:
        # A view that is not laid out row by row goes with the rest: copied as it is, and small.
        if not isinstance(thing, torch.Tensor) or not thing.is_contiguous() or thing.device.type != "cpu":
            return None
        if id(thing) not in self._numbers:
            number = self._numbers[id(thing)] = len(self._kept)
            self._kept.append(thing)
            stored = kept_stored(thing)
            other = None if stored is None else self.persistent_id(stored)
            self.places[number] = self._write(thing, other)
        return self._numbers[id(thing)]

    def _write(self, tensor: torch.Tensor, stored: int | None) -> _Place:
        offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(offset)
        self._file.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
        parameter = isinstance(tensor, torch.nn.Parameter)
        return _Place(offset, tuple(tensor.shape), tensor.dtype, parameter, tensor.requires_grad, stored)


class _Unpickler(pickle.Unpickler):
    def __init__(self, rest: io.BytesIO, mapped: mmap.mmap, places: list[_Place]) -> None:
        super().__init__(rest)
        self._mapped = mapped
        self._places = places
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, number: int) -> torch.Tensor:
        if number not in self._made:
            place = self._places[number]
            self._made[number] = self._tensor(place)
            if place.stored is not None:
                keep_as_stored(self._made[number], self.persistent_load(place.stored))
        return self._made[number]

    def _tensor(self, place: _Place) -> torch.Tensor:
        count = torch.Size(place.shape).numel()
        if not count:
            flat = torch.empty(0, dtype=place.dtype)
        else:
            flat = torch.frombuffer(self._mapped, dtype=place.dtype, count=count, offset=place.offset)
        tensor = flat.view(place.shape)
        if place.parameter:
            return torch.nn.Parameter(tensor, requires_grad=place.requires_grad)
        return tensor.requires_grad_(place.requires_grad)


def _memory_file() -> Any:
    """An open file without a name: it ends with the last process that has it open, however that ends."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # forbidden in some containers
            return os.fdopen(os.memfd_create("fedmask"), "w+b")
    return tempfile.TemporaryFile()
