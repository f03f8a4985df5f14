"""Numbers that no tensor of keys is in: biases and tests of positions, of the length, or of nothing but themselves; and
roots of what may lie below 0. In float64, against what torch makes of them, in all phases of the CPU path.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spdsl
from spdsl.diagnostics import SpatError
from tests.library import launches
from tests.numerics.patterns import module_of

TOKENS, KEYS = 40, torch.arange(40, dtype=torch.float64)
NUMBERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "3": lambda q, k, h: q * 0 + 3,
    "1 / 3": lambda q, k, h: q * 0 + 1 / 3,
    "length / 9": lambda q, k, h: q * 0 + TOKENS / 9,
    "sqrt(length) * k / 9": lambda q, k, h: TOKENS**0.5 * k / 9,
    "(q - k) / 3": lambda q, k, h: (q - k) / 3,
    "k * h / 7": lambda q, k, h: k * h / 7,
    "sqrt(abs(q - k))": lambda q, k, h: (q - k).abs().sqrt(),
    "n[k] / 3": lambda q, k, h: k / 3,
    "k * sqrt(k) / 50": lambda q, k, h: k**1.5 / 50,
    "k / sqrt(k + 1)": lambda q, k, h: k / (k + 1).sqrt(),
}
MASKS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "f[q]": lambda q, k, h: q % 3 == 0,
    "s > 0": lambda q, k, h: q >= 0,
    "h % 2 == 0": lambda q, k, h: h == 0,
    "sqrt(length) > q - k": lambda q, k, h: TOKENS**0.5 > q - k,
    "sqrt(length - 50) < 9 | k < 3": lambda q, k, h: k < 3,
    "sqrt(q - 10) < 5": lambda q, k, h: (q >= 10) & (q < 35),
    "~(sqrt(k - 10) < 5)": lambda q, k, h: ((k - 10).sqrt() < 5).logical_not(),
    "min(k, sqrt(k - 9)) < 3": lambda q, k, h: torch.minimum(k, (k - 9).sqrt()) < 3,
    "~(sqrt(n[k] - 7) > -1)": lambda q, k, h: k < 7,
}


def checked(body: str, seen: Tensor, added: Tensor | float) -> None:
    module = module_of(f"allow(W404) n = tensor(token, int) f = tensor(token, bool) s = tensor() return {body}")
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, TOKENS, 16, generator=make, dtype=torch.float64) for _ in "qkv")
    logits = (q @ k.mT / 4 + added).masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    out = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp() @ v
    tokens = {"n": torch.arange(TOKENS)[None], "f": torch.arange(TOKENS)[None] % 3 == 0}
    one = torch.tensor(1.0)
    for function in (module.attention, module.reference):
        found = function(q, k, v, **tokens, s=one, return_lse=True)
        torch.testing.assert_close(found, (out, lse), rtol=1e-12, atol=1e-12)
    for page in (None, 16):  # the last query sees them all
        cache, last = module.Cache(1, 48, kv_heads=2, qk_dim=16, v_dim=16, page=page, dtype=torch.float64), TOKENS - 1
        step: Tensor | None = None
        for rows in (slice(0, last), slice(last, TOKENS)):
            new = {name: x[:, rows] for name, x in tokens.items()}
            call = module.decode if rows.start else module.prefill
            step = call(*(x[:, :, rows] for x in (q, k, v)), **new, s=one, cache=cache)
        torch.testing.assert_close(step, out[:, :, -1:], rtol=1e-12, atol=1e-12)


def positions() -> tuple[Tensor, Tensor, Tensor]:
    return KEYS[:, None], KEYS, torch.arange(2.0, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("bias", NUMBERS)
def test_biases_without_a_tensor(bias: str) -> None:
    everything = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    checked(f"attend(all, bias = {bias})", everything, NUMBERS[bias](*positions()))


@pytest.mark.parametrize("test", MASKS)
def test_masks_that_are_the_same_for_many_keys(test: str) -> None:
    checked(f"attend(where({test}))", MASKS[test](*positions()), 0.0)


def test_a_bias_of_more_precision_than_the_call() -> None:
    module = module_of("causal c = tensor(head) return attend(all, bias = c[h] * (q - k))")
    x, slopes = torch.randn(1, 2, 21, 16), torch.rand(2, dtype=torch.float64)
    wanted = module.reference(x, x, x, slopes)
    torch.testing.assert_close(module.attention(x, x, x, slopes), wanted, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    "body", ["attend(sliding(sqrt(0 - 4)))", "attend(where(k < sqrt(-1)))", "attend(all, scale = sqrt(-4))"]
)
def test_a_root_that_is_no_number_is_an_error(body: str) -> None:
    with pytest.raises(SpatError, match="E203"):
        spdsl.compile(f"pattern p {{ causal return {body} }}")


@pytest.mark.parametrize("page", [None, 16])
def test_a_read_past_the_end_sees_no_token_of_an_earlier_sequence(page: int | None) -> None:
    module = module_of("allow(W404) a = tensor(token) return attend(where(a[k + 2] == 0))")
    cache = module.Cache(2, 32, kv_heads=1, qk_dim=16, v_dim=16, page=page, dtype=torch.float32)
    x = torch.randn(2, 1, 20, 16)
    module.prefill(x, x, x, torch.ones(2, 20), cache)
    for rows in ([0], None):
        cache.reset(rows)
        if rows is None:
            new = x[:, :, :5]
            found = module.prefill(new, new, new, torch.ones(2, 5), cache)
            torch.testing.assert_close(found, module.attention(new, new, new, torch.ones(2, 5)))
        assert cache.tokens["a"].count_nonzero(1).tolist() == ([0, 20] if rows else [5, 5])


def test_a_tensor_over_tokens_that_nothing_reads_may_be_passed() -> None:
    module = module_of("causal a = tensor(token) b = tensor(token) return attend(where(a[k] > 0))")
    x, a = torch.randn(1, 1, 9, 16), torch.ones(1, 9)
    cache = module.Cache(1, 16, kv_heads=1, qk_dim=16, v_dim=16, dtype=torch.float32)
    torch.testing.assert_close(module.prefill(x, x, x, a, cache, b=a), module.attention(x, x, x, a, b=a))


@pytest.mark.parametrize("name, size", [("longformer", {"window": 16}), ("block_sparse", {"block": 128})])
def test_published_patterns_without_causal_decode(
    name: str, size: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked queries have a mask that is the same for all keys, and lists one for each block."""
    module = spdsl.load(Path(__file__).resolve().parents[2] / "patterns" / f"{name}.spat", **size)
    monkeypatch.setattr(launches(module), "KERNELS_ON_CPU", False)
    given = module.example_inputs(1, 16, heads=4, kv_heads=2, qk_dim=16, v_dim=16)
    if "tiles" in given:
        given["tiles"][:, :2] = -1
    cache, steps = module.Cache(1, 32, kv_heads=2, qk_dim=16, v_dim=16, dtype=given["q"].dtype), []
    for at in (slice(0, 15), slice(15, 16)):
        new = {key: x if key == "tiles" else x[..., at, :] if x.dim() == 4 else x[:, at] for key, x in given.items()}
        steps.append((module.decode if at.start else module.prefill)(**new, cache=cache))
    torch.testing.assert_close(steps[-1], module.attention(**given)[:, :, 15:], rtol=1e-4, atol=1e-4)


def test_a_cache_of_float64_keeps_tokens_in_float64() -> None:
    module = module_of("causal a = tensor(token) return attend(where(a[k] <= a[q]))")
    x, a = (
        torch.randn(1, 1, 9, 16, dtype=torch.float64),
        1 + torch.arange(9.0, dtype=torch.float64).flip(0)[None] / 1e12,
    )
    cache = module.Cache(1, 16, kv_heads=1, qk_dim=16, v_dim=16, dtype=torch.float64)
    torch.testing.assert_close(module.prefill(x, x, x, a, cache), module.attention(x, x, x, a))
