"""docs/module.md on the cache: the shapes of its storage, and that no step reads lengths on the host."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import spdsl

RANKED = "pattern p { causal return attend(top_k(2, score = dot(compress(16)), share = head, force = last(1))) }"
LONG = RANKED.replace("top_k(2,", "top_k(300,")
BATCH, CAPACITY = 3, 40


def cache_of(m: ModuleType, page: int | None) -> Any:
    return m.Cache(BATCH, CAPACITY, kv_heads=1, qk_dim=24, v_dim=16, page=page, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("page, tokens", [(16, (BATCH * 3 + 1, 1, 16)), (None, (BATCH, 1, CAPACITY + 1))])
def test_shapes_of_the_storage(page: int | None, tokens: tuple[int, ...]) -> None:
    cache = cache_of(spdsl.load(RANKED), page)
    assert {name: tuple(x.shape) for name, x in cache.k.items()} == {
        "kv": (*tokens, 24), "compress": (BATCH, 1, CAPACITY // 16 + 1, 24)
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in cache.v.items()} == {"kv": (*tokens, 16)}
    assert cache.k["kv"].stride(-2) == 32


@pytest.mark.interpret
@pytest.mark.parametrize("text", [RANKED, LONG])
def test_a_step_reads_nothing_on_the_host(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = spdsl.load(text)
    cache = cache_of(m, 16)
    q, k, v = torch.randn(BATCH, 2, 33, 24), torch.randn(BATCH, 1, 33, 24), torch.randn(BATCH, 1, 33, 16)
    m.prefill(q, k, v, cache=cache)
    found, tolist = [], Tensor.tolist

    def noted(x: Tensor) -> object:
        found.append(x.shape)
        return tolist(x)

    monkeypatch.setattr(Tensor, "tolist", noted)
    m.decode(*(x[:, :, :1] for x in (q, k, v)), cache=cache)
    assert found == []
