"""Numbers that arguments mean: biases at the precision of the call, `length` of a part of a longer sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import spdsl
from spdsl.ir.pattern import Pattern
from spdsl.oracle import dense
from tests.numerics.patterns import module_of, pattern_of

BIASES = {
    "slope": ("slope = tensor(head)", "slope[h] * (q - k) / 3"),
    "product": ("a = tensor(token)", "a[k] * a[q] * 1.1"),
    "kv_head": ("b = tensor(kv_head)", "b[h // 2] / 7 - q * b[h // 3]"),
}


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def vectors(rows: int, keys: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    sizes = {"q": (1, 4, rows, 16), "k": (1, 2, keys, 16), "v": (1, 2, keys, 24)}
    return {name: numbers(*shape, dtype=dtype) + i for i, (name, shape) in enumerate(sizes.items())}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bias_is_computed_at_the_precision_of_the_call(name: str, dtype: torch.dtype) -> None:
    """Its numbers are those of its own dtype, what is made of them is not: a bias in fp32 was off by 1e-7."""
    declared, bias = BIASES[name]
    module = spdsl.load(f"pattern p {{ causal {declared} return attend(sliding(9), bias = {bias}) }}")
    argument, shape = {"slope": ("slope", (4,)), "product": ("a", (1, 21)), "kv_head": ("b", (2,))}[name]
    short = numbers(*shape, dtype=dtype)
    given = vectors(21, 21)
    wanted = module.reference(**given, **{argument: short.double()})
    for function in (module.attention, module.reference):
        torch.testing.assert_close(function(**given, **{argument: short}), wanted, rtol=1e-13, atol=1e-13)
    low = {key: x.float() for key, x in given.items()}
    exact = module.reference(**{key: x.double() for key, x in low.items()}, **{argument: short.double()})
    torch.testing.assert_close(module.reference(**low, **{argument: short}), exact, rtol=1e-13, atol=1e-13)
    cache = module.Cache(1, 32, kv_heads=2, qk_dim=16, v_dim=24, dtype=torch.float64)
    torch.testing.assert_close(
        module.prefill(**given, **{argument: short}, cache=cache), wanted, rtol=1e-13, atol=1e-13
    )


LENGTHS = {
    "mask": "causal return attend(where(k >= length - 5) | sliding(2))",
    "bias": "causal return attend(all, bias = (length - q) / 8)",
    "condition": "causal return attend(all) if length <= 17 return attend(sliding(2))",
    "three": "return attend(sliding(3)) if length < 20 return attend(all) if length < 21 return attend(last(1))",
}
PARTS = [(3, 0, 17, 17), (0, 3, 17, 17), (5, 5, 17, 17), (0, 0, 17, 17), (20, 0, 1, 17), (0, 4, 9, 13), (2, 9, 12, 8)]


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("part", PARTS)
def test_length_of_a_part_is_one_number(name: str, part: tuple[int, int, int, int]) -> None:
    """Up to the last key or the last query that the call knows, whichever is later, in sets, biases and conditions."""
    q_offset, k_offset, rows, keys = part
    module, pattern = module_of(LENGTHS[name]), pattern_of(LENGTHS[name])
    assert isinstance(pattern, Pattern)
    given, at = vectors(rows, keys), {"q_offset": q_offset, "k_offset": k_offset}
    ((wanted, _),) = dense.results(pattern, given, **at)
    for function in (module.attention, module.reference):
        torch.testing.assert_close(function(**given, **at), wanted, rtol=1e-10, atol=1e-10)


def test_what_a_phase_does_not_read_is_not_asked_for() -> None:
    path = Path(__file__).resolve().parents[2] / "patterns" / "seer_attention.spat"
    module = spdsl.load(path, block=16)
    given = module.example_inputs(1, 40, heads=4, kv_heads=2, qk_dim=16, v_dim=24)
    chosen = given.pop("chosen")
    out, scores = module.attention(**given)
    for function in (module.attention, module.reference):
        again, same = function(**given, chosen=chosen)
        torch.testing.assert_close(again, out, check_dtype=False, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(same, scores, check_dtype=False, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^chosen: expected int32 or int64"):
        module.attention(**given, chosen=chosen.float())
    cache = module.Cache(1, 64, kv_heads=2, qk_dim=16, v_dim=24)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'chosen'"):
        module.prefill(**given, cache=cache)
    module.prefill(**given, chosen=chosen, cache=cache)
    module.decode(**{name: x[:, :, :1] for name, x in given.items()}, cache=cache)
    assert cache.lengths.tolist() == [41]


GATED_IN_TRAINING = """
pattern p {
    causal
    a    = tensor(token, int)
    b    = tensor(token, int)
    near = attend(sliding(4))
    return gate(near, attend(where(a[k] == a[q]))) if train
    return attend(where(b[k] == b[q])) if prefill
    return near
}
"""


def test_tokens_are_kept_for_the_phases_that_read_them() -> None:
    module = spdsl.load(GATED_IN_TRAINING)
    given = module.example_inputs(2, 12, heads=2, qk_dim=16, v_dim=16)
    b, gates = given.pop("b"), given.pop("gates")
    module.attention(**given, gates=gates)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'gates'"):
        module.attention(**given)
    del given["a"]
    cache = module.Cache(2, 16, kv_heads=2, qk_dim=16, v_dim=16)
    assert list(cache.tokens) == ["b"]
    module.prefill(**given, b=b, cache=cache)
    step = {name: x[:, :, :1] for name, x in given.items()}
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
        module.decode(**step, cache=cache)
    module.decode(**step, b=b[:, :1], cache=cache)
    assert cache.tokens["b"][:, 12].tolist() == b[:, 0].tolist()
