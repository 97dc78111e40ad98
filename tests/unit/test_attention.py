"""Our attention against transformers' own, for every architecture that lets us choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedmask.attention import NAME, use_plain_attention
from tests.support import ARCHITECTURES, batch, make_model


def states_and_gradients(model: Any) -> list[torch.Tensor]:
    inputs = batch()
    model.train()
    with torch.no_grad():
        still = model(**inputs).last_hidden_state
    out = model(**inputs).last_hidden_state
    keep = inputs["attention_mask"][:, :, None].bool()
    model.zero_grad()
    (out * keep).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    return [still * keep, out.detach() * keep, *gradients]


def assert_equal(model: Any, other: Any) -> None:
    """Equal up to float32's rounding, which goes with a tensor's largest value: sums cancel differently."""
    for expected, found in zip(states_and_gradients(model), states_and_gradients(other), strict=True):
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=max(bound, 1e-5))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_the_architectures_own(architecture: str) -> None:
    eager, ours = make_model(architecture), make_model(architecture)
    eager.set_attn_implementation("eager")
    use_plain_attention(ours)
    assert ours.config._attn_implementation == NAME
    assert_equal(eager, ours)


def test_queries_that_share_keys() -> None:
    eager, ours = (make_model("llama", num_key_value_heads=2) for _ in range(2))
    eager.set_attn_implementation("eager")
    use_plain_attention(ours)
    assert_equal(eager, ours)


def test_an_architecture_with_attention_of_its_own_keeps_it() -> None:
    model = make_model("bert")
    model.set_attn_implementation("eager")
    use_plain_attention(model)
    assert model.config._attn_implementation == "eager"


def test_dropout_reaches_the_softmax() -> None:
    model = make_model("bert", attention_probs_dropout_prob=0.5)
    use_plain_attention(model)
    inputs = batch()
    still = model(**inputs).last_hidden_state
    model.train()
    torch.manual_seed(0)
    first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, still)


def test_the_choice_is_not_saved(tmp_path: Any) -> None:
    from transformers import AutoModel

    model = make_model("bert")
    use_plain_attention(model)
    model.save_pretrained(str(tmp_path))
    assert NAME not in (tmp_path / "config.json").read_text()
    assert AutoModel.from_pretrained(str(tmp_path)).config._attn_implementation == "sdpa"
