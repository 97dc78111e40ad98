"""A backbone in memory that processes share: the same bits, nobody's writes reach another."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import closing
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from fedmask.models import Backbone, load_backbone
from fedmask.recent import Recent
from fedmask.shared import SharedBackbone, load_shared
from tests.support import ARCHITECTURES, make_model, outputs, save_checkpoint, state_bits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_comes_out_is_what_went_in(architecture: str) -> None:
    first = Backbone(make_model(architecture), None, "here")
    shared = SharedBackbone(first)
    again = load_shared(shared.descriptor)
    shared.close()
    assert again.source == "here" and type(again.model) is type(first.model)
    assert state_bits(again.model) == state_bits(first.model)
    assert not again.model.training
    for (name, one), (other, two) in zip(
        first.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert (name, one.shape, one.dtype, one.requires_grad) == (
            other, two.shape, two.dtype, two.requires_grad)  # fmt: skip
        assert two.data_ptr() % 64 == 0 and one.stride() == two.stride()
    assert torch.equal(outputs(first.model), outputs(again.model))


def test_tied_weights_stay_tied_and_the_tokenizer_comes_along(tmp_path: Path) -> None:
    backbone = load_backbone(str(save_checkpoint(tmp_path / "model")))
    tied = torch.nn.Linear(32, 67, bias=False)
    tied.weight = backbone.model.embeddings.word_embeddings.weight  # type: ignore[union-attr, assignment]
    backbone.model.tied = tied  # type: ignore[assignment]
    with closing(SharedBackbone(backbone)) as shared:
        again = load_shared(shared.descriptor)
    assert again.model.tied.weight is again.model.embeddings.word_embeddings.weight  # type: ignore[union-attr]
    assert again.tokenizer("word1 word2")["input_ids"] == backbone.tokenizer("word1 word2")["input_ids"]
    assert again.pad_id == backbone.pad_id


def test_writes_stay_where_they_are_made() -> None:
    with closing(SharedBackbone(Backbone(make_model("bert"), None, ""))) as shared:
        one, two = load_shared(shared.descriptor), load_shared(shared.descriptor)
        before = state_bits(two.model)
        with torch.no_grad():
            for parameter in one.model.parameters():
                parameter.add_(1.0)
        assert state_bits(two.model) == before == state_bits(load_shared(shared.descriptor).model)


def _use(pipe: Connection) -> None:
    model = load_shared(reduction.recv_handle(pipe)).model
    pipe.recv()  # now the other process has seen all of it, too
    total = sum(float(p.detach().sum(dtype=torch.float64)) for p in model.parameters())
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[:1024] += 1.0  # at most two pages
    pipe.send((total, _private_kilobytes()))
    pipe.recv()


def _private_kilobytes() -> tuple[int, int]:
    """Of the shared file's mapping: (kilobytes that only this process has, kilobytes in memory)."""
    inside, private, resident = False, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            inside = any("memfd:fedmask" in part for part in rest)
        elif inside and key == "Private_Dirty:":
            private += int(rest[0])
        elif inside and key == "Rss:":
            resident += int(rest[0])
    return private, resident


def test_another_process_pays_for_the_pages_that_it_writes() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(20_000, 64), torch.nn.Linear(64, 64))
    shared = SharedBackbone(Backbone(model, None, ""))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_use, args=(theirs,), daemon=True)
    process.start()
    try:
        reduction.send_handle(ours, shared.descriptor, process.pid)
        mine = load_shared(shared.descriptor).model  # a page is shared as soon as two processes see it
        shared.close()  # whoever was sent the file has it
        assert all(torch.equal(*pair) for pair in zip(mine.parameters(), model.parameters(), strict=True))
        ours.send(None)
        total, (private, resident) = ours.recv()
    finally:
        ours.send(None)
        process.join(120)
        process.close()
    # The other process may sum with more threads, in another order; in float32 a sum near zero would differ.
    here = sum(float(p.detach().sum(dtype=torch.float64)) for p in mine.parameters())
    assert total == pytest.approx(here, rel=1e-5)
    assert resident >= 5000 and private <= 16
    assert not [name for name in os.listdir("/dev/shm") if "fedmask" in name]


def test_what_was_used_last_is_kept() -> None:
    made: list[int] = []

    def get(key: int) -> int:
        def make() -> int:
            made.append(key)
            return key

        return held.get(key, make)

    held: Recent[int, int] = Recent(10, lambda value: value)
    assert [get(key) for key in (1, 2, 3, 4)] == [1, 2, 3, 4]  # exactly full
    assert get(1) == 1 and len(held) == 4
    assert get(5) == 5 and len(held) == 3  # 2 and 3 made room
    assert [get(key) for key in (1, 4, 5)] == [1, 4, 5] and made == [1, 2, 3, 4, 5]
    assert get(2) == 2 and made[-1] == 2 and len(held) == 2
    assert get(11) == 11 and get(11) == 11 and made[-2:] == [11, 11] and len(held) == 2
