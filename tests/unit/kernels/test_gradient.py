"""The choice of kernel, where each can run, what is refused, and what the sampled one never does."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numba.core import caching
from torch.utils._python_dispatch import TorchDispatchMode

from fedmask.errors import FedmaskError
from fedmask.kernels import (
    Pattern,
    available_kernels,
    choose_kernel,
    dense_weight_gradient,
    gradient,
    native,
    sampled_weight_gradient,
)


def matrices(tokens: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(5)
    return torch.randn(tokens, outputs, generator=gen), torch.randn(tokens, inputs, generator=gen)


def every(step: int, outputs: int, inputs: int) -> Pattern:
    return Pattern.from_flat(np.arange(0, outputs * inputs, step), (outputs, inputs))


@pytest.mark.parametrize("kernel", ["auto", "dense", "sampled"])
def test_two_tokens_by_hand(kernel: Any) -> None:
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = torch.tensor([[5.0, 6.0, 7.0], [8.0, 9.0, 10.0]])
    # grad^T x = [[29, 33, 37], [42, 48, 54]]
    pattern = Pattern.from_flat(np.array([1, 3, 5]), (2, 3))
    assert sampled_weight_gradient(grad, x, pattern, kernel).tolist() == [33.0, 42.0, 54.0]


def test_sparse_large_layers_are_sampled_and_full_ones_are_not() -> None:
    for outputs, inputs in ((384, 384), (1536, 384), (768, 768), (3072, 768), (1024, 4096)):
        size = outputs * inputs
        for tokens in (256, 640, 2048):
            for threads in (1, 2):
                assert choose_kernel(tokens, outputs, inputs, size // 200, threads=threads) == "sampled"
                assert choose_kernel(tokens, outputs, inputs, size // 12, threads=threads) == "sampled"
                assert choose_kernel(tokens, outputs, inputs, size // 2, threads=threads) == "dense"
    assert choose_kernel(4096, 8, 8, 1) == "dense"


def test_more_entries_never_turn_the_choice_back_to_sampled() -> None:
    choices = [choose_kernel(640, 384, 384, k) for k in range(0, 384 * 384 + 1, 96)]
    assert choices == sorted(choices, reverse=True) and set(choices) == {"dense", "sampled"}


def test_a_named_kernel_is_not_overruled_and_an_unknown_one_is_refused() -> None:
    assert choose_kernel(2048, 1024, 4096, 1, "dense") == "dense"
    assert choose_kernel(1, 4, 4, 16, "sampled") == "sampled"
    with pytest.raises(FedmaskError, match="'sample'; the nearest is 'sampled'"):
        choose_kernel(1, 4, 4, 16, "sample")
    with pytest.raises(FedmaskError, match="at least 1 thread, found 0"):
        choose_kernel(1, 4, 4, 16, threads=0)


def test_without_numba_auto_is_dense_and_sampled_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grad, x = matrices(64, 48, 48)
    pattern = every(100, 48, 48)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "fedmask.kernels.native")
    gradient._native.cache_clear()
    try:
        assert available_kernels() == ("dense",)
        expected = dense_weight_gradient(grad, x, pattern)
        assert torch.equal(sampled_weight_gradient(grad, x, pattern), expected)
        with pytest.raises(FedmaskError, match=r"numba.*; pip install numba; use kernel 'auto'"):
            sampled_weight_gradient(grad, x, pattern, "sampled")
    finally:
        monkeypatch.undo()
        gradient._native.cache_clear()
    assert available_kernels() == ("dense", "sampled")


def test_double_precision_stays_double_and_only_dense() -> None:
    grad, x = matrices(64, 48, 48)
    pattern = every(100, 48, 48)
    found = sampled_weight_gradient(grad.double(), x, pattern)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (grad.double().t() @ x.double()).view(-1)[::100])
    with pytest.raises(FedmaskError, match="found float64"):
        sampled_weight_gradient(grad.double(), x, pattern, "sampled")


def test_another_device_is_dense() -> None:
    grad, x = (m.to("meta") for m in matrices(64, 48, 48))
    pattern = every(100, 48, 48)
    found = sampled_weight_gradient(grad, x, pattern)
    assert found.device.type == "meta" and found.shape == (pattern.k,)
    with pytest.raises(FedmaskError, match="a matrix on meta"):
        sampled_weight_gradient(grad, x, pattern, "sampled")


def test_half_precision_of_the_other_kind_is_widened() -> None:
    grad, x = (m.half() for m in matrices(40, 20, 30))
    pattern = every(7, 20, 30)
    exact = (grad.double().t() @ x.double()).view(-1)[::7]
    for kernel in ("dense", "sampled"):
        found = sampled_weight_gradient(grad, x, pattern, kernel)
        torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["dense", "sampled"])
def test_autocast_does_not_reach_the_sum(kernel: Any) -> None:
    grad, x = matrices(40, 20, 30)
    pattern = every(7, 20, 30)
    expected = sampled_weight_gradient(grad, x, pattern, kernel)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampled_weight_gradient(grad, x, pattern, kernel), expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    grad, x = matrices(8, 4, 6)
    pattern = every(2, 4, 6)
    for one, other in ((grad[:5], x), (x, grad), (grad, x[:, :5])):
        with pytest.raises(FedmaskError, match=r"needs \[T, outputs\] and \[T, inputs\]"):
            sampled_weight_gradient(one, other, pattern)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_nothing_of_the_weights_size_is_ever_made() -> None:
    outputs, inputs = 600, 500
    grad, x = matrices(70, outputs, inputs)
    pattern = every(200, outputs, inputs)
    with Largest() as largest:
        sampled_weight_gradient(grad, x, pattern, "dense")
    assert largest.numel == outputs * inputs
    native._workspace.floats = torch.empty(0)
    with Largest() as largest:
        sampled_weight_gradient(grad, x, pattern, "sampled", threads=1)
    columns = (outputs + inputs) * native.BLOCK
    assert columns <= largest.numel <= columns + 2 * pattern.k + 64 < outputs * inputs


def test_scratch_is_made_once_and_serves_every_layer() -> None:
    big, small = matrices(70, 96, 80), matrices(70, 32, 48)
    sampled_weight_gradient(*big, every(9, 96, 80), "sampled", threads=2)
    before = native._workspace.floats.data_ptr()
    sizes = []
    for _ in range(3):
        for pair, pattern in ((big, every(9, 96, 80)), (small, every(5, 32, 48))):
            with Largest() as largest:
                sampled_weight_gradient(*pair, pattern, "sampled", threads=2)
            sizes.append(largest.numel - pattern.k)
    assert native._workspace.floats.data_ptr() == before and set(sizes) == {0}


def test_only_more_than_one_part_starts_a_team(monkeypatch: pytest.MonkeyPatch) -> None:
    teams: list[int] = []

    def team(function: int, job: int, threads: int, flags: int) -> None:
        teams.append(threads)
        native._RUN(job)

    monkeypatch.setattr(native, "_TEAM", team)
    pattern = every(7, 20, 30)
    sampled_weight_gradient(*matrices(200, 20, 30), pattern, "sampled", threads=1)
    sampled_weight_gradient(*matrices(native.BLOCK, 20, 30), pattern, "sampled", threads=2)
    assert teams == []
    sampled_weight_gradient(*matrices(200, 20, 30), pattern, "sampled", threads=2)
    assert teams == [2]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_bits_depend_on_the_number_of_parts_and_not_on_what_runs_them(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad, x = matrices(333, 50, 70)
    pattern = every(3, 50, 70)

    def run() -> torch.Tensor:
        return sampled_weight_gradient(grad, x, pattern, "sampled", threads)

    first = run()
    for _ in range(20):
        assert torch.equal(run(), first)
    monkeypatch.setattr(native, "_TEAM", None)
    assert torch.equal(run(), first)


def test_many_python_threads_at_once() -> None:
    cases = [(matrices(100 + i, 40 + i, 50), every(3 + i, 40 + i, 50)) for i in range(8)]

    def run(i: int) -> torch.Tensor:
        (grad, x), pattern = cases[i % 8]
        return sampled_weight_gradient(grad, x, pattern, "sampled", threads=1 + i % 2)

    alone = [run(i) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(run, list(range(16)) * 5)):
            assert torch.equal(found, alone[i % 16])


def in_child(threads: int) -> list[float]:
    torch.set_num_threads(1)
    grad, x = matrices(100, 40, 50)
    return sampled_weight_gradient(grad, x, every(3, 40, 50), "sampled", threads).tolist()  # type: ignore[no-any-return]


def test_a_spawned_process_gets_the_same_bits() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(in_child, [1, 2]) == [in_child(1), in_child(2)]


def test_the_kernel_compiles_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert native._compile().address not in (0, native._CODE.address)


def test_importing_the_package_does_not_import_numba() -> None:
    code = "import sys, fedmask.kernels; sys.exit('numba' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
    )
