"""Arguments that do not fit: a ValueError or TypeError that names the argument, what was expected, and what came."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import spdsl
from tests.module.patterns import GATED, arguments, module_of


def zeros(*shape: int, **kind: Any) -> torch.Tensor:
    return torch.zeros(shape, **kind)


# (pattern, what replaces or joins its arguments at 40 tokens, how the message begins)
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("causal", {"q": [1.0]}, "q: expected a tensor, got list"),
    ("causal", {"k": None}, "k: expected a tensor, got NoneType"),
    ("causal", {"q": zeros(2, 4, 40)}, "q: expected 4 dimensions"),
    ("causal", {"v": zeros(2, 2, 40, 24, 1)}, "v: expected 4 dimensions"),
    ("causal", {"q": zeros(2, 4, 40, 16, dtype=torch.int64)}, "q: expected float16, .* got torch.int64"),
    ("causal", {"q": zeros(2, 4, 40, 16, dtype=torch.complex64)}, "q: expected float16, .* got torch.complex64"),
    ("causal", {"k": zeros(2, 2, 40, 16, dtype=torch.float16)}, "k: expected dtype torch.float32 like q"),
    ("causal", {"v": zeros(2, 2, 40, 24, device="meta")}, "v: expected device cpu like q, got meta"),
    ("causal", {"k": zeros(3, 2, 40, 16)}, "k: expected batch 2 like q, got 3"),
    ("causal", {"k": zeros(2, 3, 40, 16)}, "k: expected heads that divide the 4 of q, got 3"),
    ("causal", {"k": zeros(2, 0, 40, 16)}, "k: expected heads that divide the 4 of q, got 0"),
    ("causal", {"k": zeros(2, 2, 40, 17)}, "k: expected head dim 16 like q, got 17"),
    ("causal", {"v": zeros(2, 2, 41, 24)}, r"v: expected shape \[2, 2, 40\]"),
    ("causal", {"v": zeros(2, 4, 40, 24)}, r"v: expected shape \[2, 2, 40\]"),
    ("causal", {"cu_seqlens": torch.tensor([0, 40])}, "q: expected batch 1 with cu_seqlens, got 2"),
    ("causal", {"lengths": [3, 4]}, "lengths: expected a tensor, got list"),
    ("causal", {"lengths": torch.tensor([3])}, r"lengths: expected int \[2\]"),
    ("causal", {"lengths": torch.tensor([3.0, 4.0])}, r"lengths: expected int \[2\], got \(torch.float32"),
    ("causal", {"lengths": zeros(2, dtype=torch.int64, device="meta")}, "lengths: expected device cpu, got meta"),
    ("causal", {"q_offset": 4}, "q_offset, k_offset: expected both of them"),
    ("causal", {"q_offset": 4, "k_offset": -1}, "k_offset: expected a position >= 0, got -1"),
    ("causal", {"max_seqlen": 4}, "max_seqlen: expected None without cu_seqlens, got 4"),
    ("causal", {"lengths": torch.tensor([3, 4]), "q_offset": 0, "k_offset": 0}, "cu_seqlens, lengths, q_offset"),
    ("document", {"doc": [1]}, "doc: expected a tensor, got list"),
    ("document", {"doc": zeros(2, 40)}, "doc: expected an integer dtype, got torch.float32"),
    ("document", {"doc": zeros(2, 39, dtype=torch.int64)}, r"doc: expected \[1 or 2\] \+ \[40\], got \[2, 39\]"),
    ("document", {"doc": zeros(40, dtype=torch.int64)}, r"doc: expected \[1 or 2\] \+ \[40\], got \[40\]"),
    ("document", {"doc": zeros(3, 40, dtype=torch.int64)}, r"doc: expected \[1 or 2\]"),
    ("document", {"doc": zeros(2, 40, dtype=torch.int64, device="meta")}, "doc: expected device cpu, got meta"),
    ("sink_attention", {"sinks": zeros(3)}, r"sinks: expected \[4\], got \[3\]"),
    ("sink_attention", {"sinks": 1.0}, "sinks: expected a tensor, got float"),
    ("sink_attention", {"sinks": zeros(1, 4)}, r"sinks: expected \[4\], got \[1, 4\]"),
    ("sink_attention", {"sinks": zeros(4, dtype=torch.int64)}, "sinks: expected floating point"),
    ("sink_attention", {"sinks": zeros(4, device="meta")}, "sinks: expected device cpu, got meta"),
    ("block_sparse", {"tiles": zeros(2, 4, 3, 2)}, "tiles: expected int32 or int64, got torch.float32"),
    ("block_sparse", {"tiles": zeros(2, 3, 3, 2, dtype=torch.int32)}, r"tiles: expected \[batch, 4, row tiles of 16"),
    ("block_sparse", {"tiles": zeros(2, 4, 5, 2, dtype=torch.int32)}, "tiles: expected 3 row tiles, got 5"),
    ("block_sparse", {"tiles": zeros(3, 4, 3, 2, dtype=torch.int32)}, "tiles: expected 2 sequences, got 3"),
    ("block_sparse", {"tiles": zeros(2, 4, 3, dtype=torch.int32)}, r"tiles: expected \[batch, 4"),
    ("block_sparse", {"tiles": zeros(2, 4, 3, 2, dtype=torch.int32, device="meta")}, "tiles: expected device cpu"),
    ("longformer", {"mark": zeros(2, 40, dtype=torch.int64)}, "mark: expected bool, got torch.int64"),
    ("longformer", {"q_all": zeros(2, 4, 40, 8)}, r"q_all: expected shape \[2, 4, 40, 16\] like q"),
]
PACKED: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens": [0, 40]}, "cu_seqlens: expected a tensor, got list"),
    ({"cu_seqlens": zeros(2)}, r"cu_seqlens: expected int \[sequences \+ 1\], got \(torch.float32"),
    ({"cu_seqlens": zeros(2, dtype=torch.bool)}, r"cu_seqlens: expected int \[sequences \+ 1\], got \(torch.bool"),
    ({"cu_seqlens": zeros(1, 2, dtype=torch.int32)}, r"cu_seqlens: expected int \[sequences \+ 1\]"),
    ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens: expected int \[sequences \+ 1\]"),
    ({"cu_seqlens": zeros(2, dtype=torch.int32, device="meta")}, "cu_seqlens: expected device cpu, got meta"),
    ({"cu_seqlens": torch.tensor([0, 41])}, "cu_seqlens: expected rising numbers from 0 to at most 40"),
    ({"cu_seqlens": torch.tensor([-3, 40])}, "cu_seqlens: expected rising numbers"),
    ({"cu_seqlens": torch.tensor([0, 30, 20, 40])}, "cu_seqlens: expected rising numbers"),
    ({"cu_seqlens": torch.tensor([0, 30, 40]), "max_seqlen": 20}, "max_seqlen: expected at least 30, got 20"),
    ({"cu_seqlens": torch.tensor([0, 40]), "q_offset": 0, "k_offset": 0}, "cu_seqlens, lengths, q_offset: expected at"),
    ({"cu_seqlens": torch.tensor([0, 40]), "lengths": torch.tensor([40])}, "cu_seqlens, lengths, q_offset: expected"),
    (
        {"cu_seqlens": torch.tensor([0, 40]), "k": zeros(1, 2, 39, 16), "v": zeros(1, 2, 39, 24)},
        "k: expected 40 tokens like q, with cu_seqlens",
    ),
]


@pytest.mark.parametrize("name, changes, message", BAD, ids=[f"{one[0]}-{one[2][:30]}" for one in BAD])
def test_refused(name: str, changes: dict[str, Any], message: str) -> None:
    module = module_of(name)
    given: dict[str, Any] = {**arguments(module), **changes}
    for function in (module.attention, module.reference):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            function(**given)


@pytest.mark.parametrize("changes, message", PACKED, ids=[one[1][:45] for one in PACKED])
def test_packed_sequences_refused(streaming: ModuleType, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**arguments(streaming, batch=1), **changes}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        streaming.attention(**given)


@pytest.mark.parametrize("gates", [zeros(2, 4, 40, 3), zeros(2, 40, 2), None, zeros(1, 4, 40, 2)])
def test_gates_refused(gates: torch.Tensor | None) -> None:
    module = spdsl.load(GATED)
    given = {**arguments(module), "gates": gates}
    with pytest.raises((ValueError, TypeError), match=r"^gates: expected shape \[2, 4, 40, 2\], got"):
        module.attention(**given)


CACHED: list[tuple[dict[str, Any], str]] = [
    ({"q": zeros(2, 4, 1, 16)}, "k: expected 1 tokens like q"),
    ({"k": zeros(2, 1, 8, 16), "v": zeros(2, 1, 8, 24)}, r"k: expected \[2, 2, tokens, 16\] like the cache"),
    ({"v": zeros(2, 2, 8, 1)}, r"v: expected \[2, 2, tokens, 24\] like the cache"),
    ({"q": zeros(2, 4, 8, 32), "k": zeros(2, 2, 8, 32)}, r"k: expected \[2, 2, tokens, 16\] like the cache"),
    ({name: zeros(2, 4, 8, 16, dtype=torch.float64)[:, :h] for name, h in (("q", 4), ("k", 2))}, "v: expected dtype"),
    ({name: zeros(3, h, 8, d) for name, h, d in (("q", 4, 16), ("k", 2, 16), ("v", 2, 24))}, "q: expected batch 2"),
    ({name: zeros(2, h, 65, d) for name, h, d in (("q", 4, 16), ("k", 2, 16), ("v", 2, 24))}, "k: expected at most 64"),
]


@pytest.mark.parametrize("changes, message", CACHED, ids=[one[1][:30] for one in CACHED])
@pytest.mark.parametrize("page", [16, None])
def test_prefill_refused(streaming: ModuleType, changes: dict[str, Any], message: str, page: int | None) -> None:
    cache = streaming.Cache(2, 64, kv_heads=2, qk_dim=16, v_dim=24, page=page)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        streaming.prefill(**{**arguments(streaming, 8), **changes}, cache=cache)
    assert cache.lengths.tolist() == [0, 0], "a refused call added tokens"


def test_a_cache_of_another_dtype_is_refused(streaming: ModuleType) -> None:
    cache = streaming.Cache(2, 64, kv_heads=2, qk_dim=16, v_dim=24, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^k: expected dtype torch.bfloat16 like the cache, got torch.float32"):
        streaming.prefill(**arguments(streaming, 8), cache=cache)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": -1}, "batch: expected a number >= 0"),
        ({"capacity": 0}, "capacity: expected 1 to"),
        ({"page": 24}, "page: expected None or a power of two >= 16, got 24"),
        ({"page": 8}, "page: expected None or a power of two >= 16, got 8"),
        ({"kv_heads": 0}, "kv: expected positive heads and dims"),
        ({"page": None, "page_table": zeros(2, 4, dtype=torch.int32)}, "page_table: expected None"),
        ({"page": 16, "page_table": zeros(2, 4)}, "page_table: expected int32"),
        ({"page": 16, "page_table": zeros(2, 3, dtype=torch.int32)}, r"page_table: expected \[2, 4\]"),
        ({"page": 16, "page_table": zeros(2, 4, dtype=torch.int32)}, "page_table: expected pages that are used once"),
    ],
)
def test_cache_refused(streaming: ModuleType, changes: dict[str, Any], message: str) -> None:
    given = {"batch": 2, "capacity": 64, "kv_heads": 2, "qk_dim": 16, "v_dim": 24, **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        streaming.Cache(**given)


@pytest.mark.parametrize("shape", [(0, 40, 40), (2, 0, 40), (2, 40, 0), (2, 0, 0), (2, 7, 40), (2, 40, 7), (2, 1, 1)])
def test_empty_and_uneven_calls(shape: tuple[int, int, int]) -> None:
    """No batch, no query or no key is no error: the result is empty, or 0 with lse -inf, and so are the gradients."""
    module = module_of("streaming_llm")
    batch, rows, keys = shape
    q, k, v = (torch.randn(batch, h, n, 16, requires_grad=True) for h, n in ((4, rows), (2, keys), (2, keys)))
    out, lse = module.attention(q, k, v, return_lse=True)
    exact, exact_lse = module.reference(q, k, v, return_lse=True)
    assert out.shape == (batch, 4, rows, 16)
    torch.testing.assert_close(out, exact, check_dtype=False, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse, check_dtype=False, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
