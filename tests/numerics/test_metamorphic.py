"""Two ways of saying the same thing give the same numbers."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.cases import Shape, assert_same, generated, inputs_of, meant
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of

SAME = {
    "a window over everything": ("causal return attend(sliding(99))", "causal return attend(all)"),
    "a union with itself": ("causal return attend(sliding(20) | sliding(20))", "causal return attend(sliding(20))"),
    "overlap": (
        "causal return attend(sliding(20) | sliding(30) | sink(40))",
        "causal return attend(sliding(30) | sink(40))",
    ),
    "causal twice": ("causal return attend(where(k <= q))", "causal return attend(all)"),
    "without and with": ("causal return attend((all - sink(18)) | sink(18))", "causal return attend(all)"),
    "twice the complement": ("causal return attend(~~sliding(20))", "causal return attend(sliding(20))"),
    "merge of a partition": ("merge", "causal return attend(all)"),
    "two streams of one": ("two_streams", "causal return attend(all)"),
    "step 1": ("causal return attend(dilated(30, 1))", "causal return attend(sliding(30))"),
    "a where for a window": ("causal return attend(where(q - k < 20))", "causal return attend(sliding(20))"),
    "a bias of 0": ("causal return attend(sliding(20), bias = 0 * q)", "causal return attend(sliding(20))"),
}


@pytest.mark.parametrize("title", SAME)
def test_the_same_said_twice(engine: Engine, title: str) -> None:
    left, right = SAME[title]
    inputs = inputs_of(pattern_of("causal"), Shape(45, 45))
    own = {**inputs, "k_far": inputs["k"], "v_far": inputs["v"]} if title == "two streams of one" else inputs
    backward = title != "two streams of one"  # its two gradients are one only summed
    found = generated(engine(left), pattern_of(left), own, backward=backward)
    wanted = generated(engine(right), pattern_of(right), inputs, backward=backward)
    assert_same(found, wanted)


def test_groups_are_repeated_heads(engine: Engine) -> None:
    pattern, module = pattern_of("streaming_llm"), engine("streaming_llm")
    inputs = inputs_of(pattern, Shape(37, 37, heads=6, kv_heads=2))
    wide = {key: x if key == "q" else x.repeat_interleave(3, 1) for key, x in inputs.items()}
    found, wanted = generated(module, pattern, inputs), generated(module, pattern, wide)
    for key in "kv":
        wanted.grads[key] = wanted.grads[key].unflatten(1, (2, 3)).sum(2)
    assert_same(found, wanted)


def test_a_constant_on_all_logits_shifts_the_lse_only(engine: Engine) -> None:
    text = "causal w = tensor(head) return attend(sliding(20), bias = w[h])"
    pattern, module = pattern_of(text), engine(text)
    inputs = inputs_of(pattern, Shape(37, 37))
    wanted = meant(pattern_of("causal return attend(sliding(20))"), {key: inputs[key] for key in "qkv"})
    found = generated(module, pattern, inputs)
    out, lse = found.parts[0]
    found.parts = [(out, lse - inputs["w"].view(1, -1, 1))]
    found.grads.pop("w")
    assert_same(found, wanted)
    of_outputs = generated(module, pattern, inputs, lse_gradient=False).grads["w"]
    torch.testing.assert_close(of_outputs, torch.zeros_like(of_outputs), rtol=0, atol=1e-10)


def test_the_last_row_is_a_decode_step(engine: Engine) -> None:
    pattern, module = pattern_of("sink_attention"), engine("sink_attention")
    inputs = inputs_of(pattern, Shape(45, 45))
    whole = module.attention(**inputs, return_lse=True)
    last = module.attention(**{**inputs, "q": inputs["q"][:, :, -1:]}, return_lse=True)
    for x, y in zip(whole, last, strict=True):
        torch.testing.assert_close(x[:, :, -1:], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["causal", "streaming_llm"])
def test_later_keys_do_not_reach_earlier_rows(engine: Engine, name: str) -> None:
    pattern, module = pattern_of(name), engine(name)
    inputs = inputs_of(pattern, Shape(45, 45))
    out = module.attention(**inputs)
    changed = {key: torch.cat([x[:, :, :30], torch.full_like(x[:, :, 30:], 50.0)], 2) for key, x in inputs.items()}
    assert torch.equal(module.attention(**changed)[:, :, :30], out[:, :, :30])
