"""Rows of a cache, ragged prompts and pages of others run under the sanitizer: nothing outside is read or written."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.cases import Shape, cut, inputs_of, nan_cache
from tests.numerics.patterns import module_of, pattern_of
from tests.numerics.selected import SELECTED
from tests.numerics.test_attend_paged import check, filled
from tests.sanitizer.mode import sanitized
from tests.sanitizer.poison import poison

BODIES = {"streaming_llm": "streaming_llm", "document": "document", "nsa": SELECTED["nsa"]}
pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", BODIES)
def test_ragged_prompts_of_some_rows(name: str, page: int | None) -> None:
    module, pattern = module_of(BODIES[name]), pattern_of(BODIES[name])
    shape = Shape(17, 17, batch=2)
    inputs, one = inputs_of(pattern, shape), inputs_of(pattern, Shape(17, 17))
    cache = nan_cache(module, Shape(batch=3), 30, page)
    for store in (*cache.k.values(), *cache.v.values(), *cache.tokens.values()):
        poison(store)
    rows = torch.tensor([2, 0])
    with sanitized():
        module.prefill(**inputs, cache=cache, lengths=torch.tensor([17, 4]), rows=rows)
        module.prefill(**one, cache=cache, cu_seqlens=torch.tensor([0, 9, 17]), rows=rows)
        module.decode(**cut(pattern, inputs, 0, 1), cache=cache, rows=rows)
    assert cache.lengths.tolist() == [13, 0, 27]


@pytest.mark.parametrize("page", [16, 1])
@pytest.mark.parametrize("name", ["streaming_llm", "document"])
def test_pages_of_others(name: str, page: int) -> None:
    module, pattern = module_of(name), pattern_of(name)
    with sanitized():
        check(module, pattern, filled(pattern, [(18, 3, -1), (0, 1, -1), (33, 1, 0)], page))
        check(module, pattern, filled(pattern, [(18, 1, -1), (33, 1, 0)], page), max_seqlen_q=1)
