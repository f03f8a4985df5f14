"""A decode step on CPU tensors: right, the same wherever the keys lie, and no copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import spdsl

CAUSAL = "pattern p { causal return attend(all) }"
WINDOW = "pattern p { causal return attend(sink(4) | sliding(700)) }"
BIASED = "pattern p { slopes = tensor(head) causal return attend(all, bias = slopes[h] * (k - q)) }"
PAGES = [(64, False), (64, True), (None, False), (16, True), (32, False), (128, True), (1024, True)]


class Allocated(TorchDispatchMode):
    """The bytes of the largest new storage, of one operation."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in flat(args)}
        for x in flat([found]):
            if x.untyped_storage().data_ptr() not in before:
                self.most = max(self.most, x.untyped_storage().nbytes())
        return found


def flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flat(value)


def filled(module: Any, k: Tensor, v: Tensor, page: int | None, shuffled: bool, room: int = 37) -> Any:
    """A cache of all tokens but the last one; NaN where nothing was written."""
    capacity = k.shape[2] + room
    table = None
    if shuffled and page is not None:
        width = -(-capacity // page)
        table = torch.randperm(width + 3, dtype=torch.int32)[None, :width]
    cache = module.Cache(
        1,
        capacity,
        kv_heads=k.shape[1],
        qk_dim=k.shape[3],
        v_dim=v.shape[3],
        page=page,
        page_table=table,
        dtype=k.dtype,
    )
    for store in (*cache.k.values(), *cache.v.values()):
        store.fill_(torch.nan)
    cache.append_tokens({"kv": k[:, :, :-1]}, {"kv": v[:, :, :-1]}, {})
    return cache


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, 5001])
@pytest.mark.parametrize("source", [CAUSAL, WINDOW, BIASED])
def test_a_step_is_right_and_no_bit_depends_on_the_pages(source: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    module = spdsl.load(source)
    heads = 6
    q = torch.randn(1, heads, tokens, 24)
    k, v = torch.randn(1, 2, tokens, 24), torch.randn(1, 2, tokens, 40)
    more = {"slopes": torch.rand(heads)} if source is BIASED else {}
    want = reference(source, q[:, :, -1:], k, v, more)
    found = []
    for page, shuffled in PAGES:
        cache = filled(module, k, v, page, shuffled)
        found.append(module.decode(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], cache=cache, **more))
    torch.testing.assert_close(found[0].double(), want, rtol=0, atol=2e-6)
    for other, pages in zip(found, PAGES, strict=True):
        assert torch.equal(other, found[0]), pages


def reference(source: str, q: Tensor, k: Tensor, v: Tensor, more: dict[str, Tensor]) -> Tensor:
    """The meaning in float64, written out."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    position, last = torch.arange(k.shape[2]), k.shape[2] - 1
    logits = q.shape[3] ** -0.5 * q @ k.transpose(2, 3)
    if source is BIASED:
        logits = logits + more["slopes"].double()[:, None, None] * (position - last)
    if source is WINDOW:
        logits = logits.masked_fill((position >= 4) & (last - position >= 700), -torch.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("page", [64, None])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_step_copies_no_keys(page: int | None, shuffled: bool) -> None:
    torch.manual_seed(0)
    module, tokens = spdsl.load(CAUSAL), 16384
    q, k, v = (torch.randn(1, 4, tokens, 64) for _ in range(3))
    cache = filled(module, k, v, page, shuffled)
    with Allocated() as allocated:
        module.decode(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], cache=cache)
    assert allocated.most <= k.untyped_storage().nbytes() / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_keys_are_widened_a_few_at_a_time(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, tokens = spdsl.load(CAUSAL), 16384
    q, k, v = (torch.randn(1, 4, tokens, 64).to(dtype) for _ in range(3))
    for page in (64, None):
        cache = filled(module, k, v, page, False)
        with Allocated() as allocated:
            out = module.decode(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], cache=cache)
        assert allocated.most <= k.untyped_storage().nbytes() / 4
        torch.testing.assert_close(out.double(), reference(CAUSAL, q[:, :, -1:], k, v, {}), rtol=0, atol=2e-3)


def test_hidden_poison_in_a_cache_reaches_nobody() -> None:
    """A key outside of the window may hold anything, in a whole block or at its edge."""
    torch.manual_seed(0)
    module, tokens = spdsl.load(WINDOW), 2000
    q, k, v = (torch.randn(1, 2, tokens, 16) for _ in range(3))
    last = (q[:, :, -1:], k[:, :, -1:], v[:, :, -1:])
    want = module.decode(*last, cache=filled(module, k, v, 64, False))
    k[:, :, 4:1300], v[:, :, 4:1300] = torch.nan, torch.inf
    for page, shuffled in PAGES:
        assert torch.equal(module.decode(*last, cache=filled(module, k, v, page, shuffled)), want)


def test_half_full_rows_take_only_their_own_blocks() -> None:
    torch.manual_seed(0)
    module = spdsl.load(CAUSAL)
    q, k, v = (torch.randn(1, 3, 900, 16) for _ in range(3))
    last = (q[:, :, -1:], k[:, :, -1:], v[:, :, -1:])
    found = [module.decode(*last, cache=filled(module, k, v, None, False, room)) for room in (1, 60, 300, 5000)]
    assert all(torch.equal(other, found[0]) for other in found)
