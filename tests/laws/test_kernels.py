"""Laws of the sampled weight gradient, for any shape, pattern, precision and number of threads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmask.kernels import Pattern, sampled_weight_gradient

EPSILON = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Case:
    grad: torch.Tensor
    x: torch.Tensor
    flat: np.ndarray
    shape: tuple[int, int]
    threads: int

    @property
    def pattern(self) -> Pattern:
        return Pattern.from_flat(self.flat, self.shape)

    def run(self, kernel: str = "sampled") -> torch.Tensor:
        return sampled_weight_gradient(self.grad, self.x, self.pattern, kernel, self.threads)  # type: ignore[arg-type]

    def exact(self) -> torch.Tensor:
        return (self.grad.double().t() @ self.x.double()).reshape(-1)[torch.from_numpy(self.flat)]

    def rounding(self) -> torch.Tensor:
        """The most that any order of summing in float32 can be away from the exact sum."""
        size = self.grad.double().abs().t() @ self.x.double().abs()
        return (len(self.x) + 4) * EPSILON * size.reshape(-1)[torch.from_numpy(self.flat)] + 1e-30


def strided(matrix: torch.Tensor, way: str) -> torch.Tensor:
    """The same numbers, laid out in memory another way."""
    if way == "transposed":
        return matrix.t().contiguous().t()
    if way == "within":
        wider = torch.full((matrix.shape[0], matrix.shape[1] + 3), float("nan"), dtype=matrix.dtype)
        wider[:, 1:-2] = matrix
        return wider[:, 1:-2]
    return matrix


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.integers(1, 70) | st.sampled_from([15, 16, 17, 32, 128, 200])
    outputs, inputs = draw(sizes), draw(sizes)
    tokens = draw(st.integers(0, 100) | st.sampled_from([31, 32, 33, 64, 257]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.001, 0.005, 0.02, 0.08, 0.5, 1.0]))
    flat = np.flatnonzero(rng.random(outputs * inputs) < density)
    scale = 10.0 ** draw(st.integers(-3, 3))
    pair = []
    for size in (outputs, inputs):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        matrix = torch.from_numpy(rng.normal(0, scale, (tokens, size)).astype(np.float32)).to(dtype)
        pair.append(strided(matrix, draw(st.sampled_from(["plain", "transposed", "within"]))))
    return Case(pair[0], pair[1], flat, (outputs, inputs), draw(st.integers(1, 4)))


@settings(deadline=None, max_examples=200)
@given(cases())
def test_both_kernels_equal_the_exact_gradient_up_to_float32_rounding(case: Case) -> None:
    for kernel in ("sampled", "dense", "auto"):
        found = case.run(kernel)
        assert found.dtype == torch.float32 and found.shape == (len(case.flat),)
        assert bool(((found.double() - case.exact()).abs() <= case.rounding()).all())


@settings(deadline=None, max_examples=50)
@given(cases(), st.integers(0, 2**32))
def test_an_entry_does_not_depend_on_which_others_are_asked_for(case: Case, seed: int) -> None:
    kept = np.flatnonzero(np.random.default_rng(seed).random(len(case.flat)) < 0.5)
    fewer = Case(case.grad, case.x, case.flat[kept], case.shape, case.threads)
    assert torch.equal(fewer.run(), case.run()[torch.from_numpy(kept)])


@settings(deadline=None, max_examples=50)
@given(cases())
def test_outputs_and_inputs_can_be_exchanged(case: Case) -> None:
    transposed = sampled_weight_gradient(case.x, case.grad, case.pattern.transposed, "sampled", case.threads)
    assert torch.equal(transposed, case.run())
    stored = Pattern.from_flat(case.flat, case.shape, layout="conv1d")
    assert torch.equal(
        sampled_weight_gradient(case.x, case.grad, stored, "sampled", case.threads), transposed
    )


@settings(deadline=None, max_examples=50)
@given(cases(), st.integers(0, 300))
def test_where_the_tokens_are_cut_changes_rounding_only(case: Case, cut: int) -> None:
    first = Case(case.grad[:cut], case.x[:cut], case.flat, case.shape, case.threads)
    second = Case(case.grad[cut:], case.x[cut:], case.flat, case.shape, case.threads)
    apart = first.run().double() + second.run().double()
    assert bool(((apart - case.run().double()).abs() <= 2 * case.rounding()).all())


@settings(deadline=None, max_examples=50)
@given(cases())
def test_the_same_call_gives_the_same_bits(case: Case) -> None:
    assert torch.equal(case.run(), case.run())
    # What the scratch held before is of no account.
    other = Case(case.grad * float("nan"), case.x, case.flat, case.shape, case.threads)
    before = case.run()
    other.run()
    assert torch.equal(case.run(), before)
