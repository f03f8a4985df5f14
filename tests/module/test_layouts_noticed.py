"""[batch, tokens, heads, dim] and packed [tokens, heads, dim]: views of them are taken, they themselves are noticed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import spdsl
from tests.module.patterns import arguments, module_of

HINT = r" \(of \[batch, tokens, heads, dim\] pass x\.transpose\(1, 2\), which costs no copy\)"


def swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


@pytest.fixture(scope="module")
def declared() -> ModuleType:
    return spdsl.load("pattern p { heads query = 4, kv = 2 causal return attend(sliding(8)) }")


def test_views_are_taken_and_nothing_is_copied(streaming: ModuleType) -> None:
    given = arguments(streaming)
    q, k, v = (swapped(x) for x in given.values())
    out = streaming.attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.equal(out, streaming.attention(**given))
    packed = [x[0].transpose(0, 1).contiguous() for x in given.values()]  # [T, H, D], as flash-attn has it
    ends = torch.tensor([0, 13, 40])
    alone = {name: x[:1] for name, x in given.items()}
    found = streaming.attention(*(x.transpose(0, 1)[None] for x in packed), cu_seqlens=ends)
    assert torch.equal(found, streaming.attention(**alone, cu_seqlens=ends))
    cache, twin = (streaming.Cache(2, 64, kv_heads=2, qk_dim=16, v_dim=24) for _ in range(2))
    found = streaming.prefill(*(x.transpose(1, 2) for x in (q, k, v)), cache)
    assert torch.equal(found, streaming.prefill(**given, cache=twin))


OTHER_LENGTHS = {"q": torch.zeros(2, 37, 4, 16), "k": torch.zeros(2, 40, 2, 16), "v": torch.zeros(2, 40, 2, 24)}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("all of them", OTHER_LENGTHS, "k: expected heads that divide the 37 of q, got 40"),
    ("values alone", {"v": OTHER_LENGTHS["v"]}, r"v: expected shape \[2, 2, 40\] \+ \[dim\], got \[2, 40, 2, 24\]"),
]


@pytest.mark.parametrize("title, changes, message", WRONG, ids=[one[0] for one in WRONG])
def test_other_layouts_are_noticed(streaming: ModuleType, title: str, changes: dict[str, Any], message: str) -> None:
    for call in (streaming.attention, streaming.reference):
        with pytest.raises(ValueError, match=f"^{message}{HINT}$"):
            call(**{**arguments(streaming), **changes})


def test_heads_that_the_pattern_declares(declared: ModuleType) -> None:
    given = {name: swapped(x) for name, x in arguments(declared).items()}
    with pytest.raises(ValueError, match=f"^q: expected 4 heads, got 40{HINT}$"):
        declared.attention(**given)
    with pytest.raises(ValueError, match=f"^k: expected 2 heads, got 40{HINT}$"):
        declared.attention(**{**given, "q": arguments(declared)["q"]})


def test_heads_that_the_cache_has(streaming: ModuleType) -> None:
    given = {name: swapped(x) for name, x in arguments(streaming, 8).items()}
    cache = streaming.Cache(2, 64, kv_heads=2, qk_dim=16, v_dim=24)
    calls = (lambda: streaming.prefill(**given, cache=cache), lambda: cache.append(given["k"], given["v"]))
    message = rf"^k: expected \[2, 2, tokens, 16\] like the cache, got \[2, 8, 2, 16\]{HINT}$"
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_packed_without_a_batch(streaming: ModuleType) -> None:
    packed = [x[0].transpose(0, 1) for x in arguments(streaming).values()]
    with pytest.raises(ValueError, match=r"^q: expected 4 dimensions \[batch, heads, tokens, dim\], got \[40, 4, 16\]"):
        streaming.attention(*packed, cu_seqlens=torch.tensor([0, 40]))
    four = [x[None] for x in packed]
    with (
        pytest.warns(UserWarning, match=r"^q: 40 heads of 4 tokens, for 2 keys"),
        pytest.raises(ValueError, match=r"^k:"),
    ):
        streaming.attention(*four, cu_seqlens=torch.tensor([0, 40]))


def test_more_heads_than_tokens_and_fewer_keys_are_a_warning(streaming: ModuleType) -> None:
    given = {name: swapped(x) for name, x in arguments(streaming).items()}
    with pytest.warns(UserWarning, match=rf"^q: 40 heads of 4 tokens, for 2 keys{HINT}$"):
        streaming.attention(**given)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows, keys, heads", [(40, 40, 4), (1, 1, 8), (4, 40, 8), (40, 7, 4), (2, 2, 8), (3, 2, 2)])
def test_what_is_right_warns_of_nothing(streaming: ModuleType, rows: int, keys: int, heads: int) -> None:
    q, k = torch.zeros(1, heads, rows, 16), torch.zeros(1, heads, keys, 16)
    streaming.attention(q, k, k)


def test_a_wrong_head_count_alone_says_nothing_of_layouts() -> None:
    module = module_of("causal")
    with pytest.raises(ValueError, match=r"^k: expected heads that divide the 4 of q, got 3$"):
        module.attention(torch.zeros(1, 4, 40, 16), torch.zeros(1, 3, 40, 16), torch.zeros(1, 3, 40, 16))
