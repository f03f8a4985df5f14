"""Prefill and decode over a cache equal attention row by row; pages, tails and free memory hold NaN."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from spdsl.oracle import dense
from tests.numerics.cases import Found, Shape, assert_same, cached, inputs_of, joined, nan_cache
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.quick import quick

# One unconditional result, no `length` in a set, one row per choice: what a row sees does not depend on the chunks.
CHUNKABLE = [
    "causal", "sliding_window", "streaming_llm", "document", "alibi", "sink_attention", "dilated",
    "sparse_transformer", "units", "hole", "fixed", "strided", "drawn", "modulo", "by_head", "kv_head", "reach",
    "softcap_sink", "token_bias", "two_streams", "two_streams_sink", "value_is_key", "gate", "merge", "own_query",
    "extras",
]  # fmt: skip
SHAPE = Shape(rows=41, keys=41, batch=2, qk=24, v=16)


@pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", quick(CHUNKABLE, ("streaming_llm", "document", "dilated")))
def test_prefill_and_decode_are_attention(engine: Engine, name: str, page: int | None) -> None:
    if engine.name == "interpreted" and page is None and name not in ("streaming_llm", "document", "softcap_sink"):
        pytest.skip("pairwise: the interpreter runs the paged form of this pattern")
    module, pattern = engine(name), pattern_of(name)
    shape = replace(SHAPE, batch=1, qk=16) if engine.name == "interpreted" else SHAPE
    inputs = inputs_of(pattern, shape)
    chunks, decoded = ([17, 21], 3) if engine.name == "interpreted" else ([17, 1, 3], 20)
    found = cached(module, pattern, inputs, chunks, decoded, nan_cache(module, shape, 48, page))
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")))


@pytest.mark.parametrize("name", CHUNKABLE)
def test_decode_alone_from_an_empty_cache(cpu: Engine, name: str) -> None:
    module, pattern = cpu(name), pattern_of(name)
    inputs = inputs_of(pattern, SHAPE)
    found = cached(module, pattern, inputs, [], SHAPE.rows, nan_cache(module, SHAPE, 64, 32))
    assert_same(Found(found), Found(dense.results(pattern, inputs, "decode")))


@pytest.mark.parametrize("heads, kv_heads, qk, v", [(2, 2, 16, 16), (3, 1, 80, 24), (16, 1, 16, 96), (10, 2, 192, 16)])
@pytest.mark.parametrize("name", ["streaming_llm", "softcap_sink"])
def test_decode_of_any_group(engine: Engine, name: str, heads: int, kv_heads: int, qk: int, v: int) -> None:
    shape = Shape(rows=19, keys=19, heads=heads, kv_heads=kv_heads, qk=qk, v=v)
    module, pattern = engine(name), pattern_of(name)
    inputs = inputs_of(pattern, shape)
    cache = nan_cache(module, shape, 300, 16)  # room for two splits
    found = cached(module, pattern, inputs, [17], 2, cache)
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.float16, 4e-3)])
def test_decode_in_low_precision(engine: Engine, dtype: torch.dtype, bound: float) -> None:
    shape = Shape(rows=35, keys=35, heads=4, kv_heads=2, qk=24, v=40)
    module, pattern = engine("streaming_llm"), pattern_of("streaming_llm")
    inputs = inputs_of(pattern, shape, dtype)
    found = cached(module, pattern, inputs, [33], 2, nan_cache(module, shape, 48, 16, dtype=dtype))
    assert found[0][0].dtype == dtype
    assert found[0][1].dtype == torch.float32
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")), bound)


@pytest.mark.parametrize("page", [None, 16, 64])
@pytest.mark.parametrize("name", ["streaming_llm", "document", "two_streams", "by_length"])
def test_rows_of_different_length(engine: Engine, name: str, page: int | None) -> None:
    check_rows(name, engine(name), page)


def check_rows(name: str, module: ModuleType, page: int | None) -> None:
    """Row 1 starts anew after 20 tokens: its old entries are NaN and must not be read."""
    shape, pattern = Shape(rows=20, keys=20, batch=2), pattern_of(name)
    cache, old = nan_cache(module, shape, 40, page), inputs_of(pattern, shape)
    cached(module, pattern, old, [20], 0, cache)
    cache.reset([1])
    for store in (*cache.k.values(), *cache.v.values()):
        store[1 if page is None else cache.page_table[1].long()] = torch.nan
    new = inputs_of(pattern, Shape(rows=8, keys=8, batch=2, seed=1))
    found = cached(module, pattern, new, [6], 2, cache)
    assert cache.lengths.tolist() == [28, 8]
    whole = {key: torch.cat([x, new[key]], -1 if x.dim() == 2 else 2) for key, x in old.items()}
    for row, inputs in ((0, whole), (1, new)):
        wanted = dense.results(pattern, {key: x[row : row + 1] for key, x in inputs.items()}, "prefill")
        own = [(out[row : row + 1], lse[row : row + 1]) for out, lse in found]
        assert_same(Found(own), Found([(out[:, :, -8:], lse[:, :, -8:]) for out, lse in wanted]))


@pytest.mark.parametrize("page", [None, 16])
def test_tokens_without_room_are_dropped_and_counted(engine: Engine, page: int | None) -> None:
    shape = Shape(rows=17, keys=17, batch=2)
    module, pattern = engine("streaming_llm"), pattern_of("streaming_llm")
    cache = nan_cache(module, shape, 20, page)
    cached(module, pattern, inputs_of(pattern, shape), [17], 0, cache)
    cache.reset([1])
    new = inputs_of(pattern, Shape(rows=5, keys=5, batch=2, seed=1))
    ((out, lse),) = cached(module, pattern, new, [5], 0, cache)
    assert cache.lengths.tolist() == [20, 5]
    assert cache.dropped.tolist() == [2, 0]
    wanted = dense.results(pattern, {key: x[1:] for key, x in new.items()}, "prefill")
    assert_same(Found([(out[1:], lse[1:])]), Found(wanted))
    assert out.isfinite().all()


def test_what_certainly_overflows_is_refused(cpu: Engine) -> None:
    shape = Shape(rows=21, keys=21)
    module, pattern = cpu("causal"), pattern_of("causal")
    with pytest.raises(ValueError, match="at most 20 more tokens"):
        cached(module, pattern, inputs_of(pattern, shape), [21], 0, nan_cache(module, shape, 20, 16))


def test_a_page_that_is_not_handed_out_has_no_room(engine: Engine) -> None:
    shape = Shape(rows=20, keys=20)
    module, pattern = engine("causal"), pattern_of("causal")
    table = torch.tensor([[2, -1]], dtype=torch.int32)
    cache = module.Cache(1, 32, kv_heads=1, qk_dim=16, v_dim=16, page=16, page_table=table, dtype=torch.float64)
    cached(module, pattern, inputs_of(pattern, shape), [10, 10], 0, cache)
    assert (cache.lengths.tolist(), cache.dropped.tolist()) == ([16], [4])


@pytest.mark.parametrize("name", ["streaming_llm", "document"])
def test_page_size_and_order_change_no_bit(engine: Engine, name: str) -> None:
    module, pattern = engine(name), pattern_of(name)
    shape = Shape(rows=33, keys=33, batch=2)
    inputs = inputs_of(pattern, shape)
    found = []
    for page, seed in ((16, 0), (16, 5), (32, 0), (None, 0)):
        cache = nan_cache(module, replace(shape, seed=seed), 64, page)
        found.append(cached(module, pattern, inputs, [31], 2, cache))
    for other in found[1:]:
        for part, wanted in zip(other, found[0], strict=True):
            assert torch.equal(part[0], wanted[0])
            assert torch.equal(part[1], wanted[1])


def test_given_units_at_decode(engine: Engine) -> None:
    """Lists count from the tile of the call's first row."""
    name = "causal a = given(rows = 1, unit = 8) return attend(a)"
    shape = Shape(rows=21, keys=21)
    pattern, module = pattern_of(name), engine(name)
    inputs = inputs_of(pattern, shape)
    wanted = dense.results(pattern, inputs)
    cache = nan_cache(module, shape, 32, 16)
    vectors = {key: inputs[key] for key in "qkv"}
    first = module.prefill(
        **{key: x[:, :, :18] for key, x in vectors.items()}, a=inputs["a"][:, :, :18], cache=cache, return_lse=True
    )
    answers = [[first]]
    for i in range(18, 21):
        step = {key: x[:, :, i : i + 1] for key, x in vectors.items()}
        answers.append([module.decode(**step, a=inputs["a"][:, :, i : i + 1], cache=cache, return_lse=True)])
    assert_same(Found(joined(answers)), Found(wanted))
