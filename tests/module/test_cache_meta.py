"""A cache on `meta`: shapes and dtypes of everything, without a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics.cases import Shape, cut, inputs_of, nan_cache
from tests.numerics.patterns import module_of, pattern_of
from tests.numerics.selected import SELECTED

BODIES = {
    "streaming_llm": "streaming_llm",
    "document": "document",
    "two_streams": "two_streams",
    "by_tensor": "by_tensor",
    "by_length": "by_length",
    "nsa": SELECTED["nsa"],
    "softmax": SELECTED["softmax"],
    "moba": SELECTED["moba"],
    "query, token": "causal m = tensor(query, token, bool) n = tensor(query) return attend(where(m[q][k] | n[q] > 0))",
    "token, head": "causal m = tensor(token, head) w = tensor(3, token) return attend(all, bias = m[k][h] + w[2][k])",
}


def shapes_of(name: str, page: int | None, device: str) -> list[Any]:
    """Of all that calls and changes of a cache give."""
    module, pattern, shape = module_of(BODIES[name]), pattern_of(BODIES[name]), Shape(9, 9, batch=2)
    inputs, one = (
        {key: x.to(device) for key, x in inputs_of(pattern, Shape(9, 9, batch=batch)).items()} for batch in (2, 1)
    )
    cache = nan_cache(module, shape, 40, page, device=device)

    def numbers(*found: int) -> Tensor:
        return torch.tensor(found, device=device)

    found = [
        module.prefill(**inputs, cache=cache, return_lse=True),
        module.prefill(**inputs, cache=cache, lengths=numbers(9, 5)),
        module.prefill(**one, cache=cache, cu_seqlens=numbers(0, 4, 9), max_seqlen=6, return_lse=True),
        module.decode(**cut(pattern, inputs, 0, 1), cache=cache, return_lse=True),
        module.decode(**cut(pattern, one, 0, 1), cache=cache, rows=[1]),
    ]
    cache.truncate([7, 12])
    cache.truncate(numbers(7, 12))
    cache.reset(numbers(1, 0).bool())
    cache.select([1, 0, 1])
    states = cache.export_states()
    cache.import_states(states)
    return [described(x) for x in (*found, states)]


def described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    return [(name, described(y)) for name, y in (x.items() if isinstance(x, dict) else enumerate(x))]


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", BODIES)
def test_shapes_of_a_cache_without_numbers(name: str, page: int | None) -> None:
    """With pages the table is given: one with numbers is looked at, then the cache has its shape alone."""
    assert shapes_of(name, page, "meta") == shapes_of(name, page, "cpu")


@pytest.mark.parametrize("page", [None, 16])
def test_all_of_it_is_on_meta(page: int | None) -> None:
    module, shape = module_of("document"), Shape(9, 9, batch=2)
    inputs = {key: x.to("meta") for key, x in inputs_of(pattern_of("document"), shape).items()}
    for table in (None, *([torch.empty(2, 3, dtype=torch.int32, device="meta")] if page else [])):
        sizes = {"kv_heads": 1, "qk_dim": 16, "v_dim": 16, "page": page, "page_table": table, "dtype": torch.float64}
        cache = module.Cache(2, 40, **sizes, device="meta")
        module.prefill(**inputs, cache=cache)
        assert {x.device.type for x in (*cache.k.values(), *cache.tokens.values(), cache.spans)} == {"meta"}
        assert cache.kept() == module.Cache(2, 40, **{**sizes, "page_table": None}).kept()
    if page:
        with pytest.raises(ValueError, match=r"^page_table: expected a tensor with numbers, got meta"):
            module.Cache(2, 40, **sizes)
