"""Rows, ragged prompts, shared pages and pages of others: no call waits for a number of the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.library import launches
from tests.module.host_reads import no_host_reads
from tests.numerics.cases import Shape, cut, inputs_of, nan_cache
from tests.numerics.patterns import module_of, pattern_of
from tests.numerics.selected import SELECTED
from tests.numerics.test_gathered import CHOSEN, GIVEN

ROWS = (
    "causal m = tensor(query, token, int) b = tensor(head, query, token) "
    "return attend(sliding(2) | where(m[q][k] < 2), bias = b[h][q][k])"
)
BODIES = {
    "streaming_llm": "streaming_llm",
    "document": "document",
    "nsa": SELECTED["nsa"],
    "by_length": "by_length",
    "by_tensor": "by_tensor",
    "tokens": GIVEN["tokens"],
    "units of 8": CHOSEN["units of 8"],
    "query, token": ROWS,
    "token, head": "causal m = tensor(token, head) w = tensor(3, token) return attend(all, bias = m[k][h] + w[2][k])",
}
pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", BODIES)
def test_events_of_a_cache(name: str, page: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, pattern = module_of(BODIES[name]), pattern_of(BODIES[name])
    monkeypatch.setattr(launches(module), "KERNELS_ON_CPU", True)
    shape = Shape(9, 9, batch=2)
    inputs, one = inputs_of(pattern, shape), inputs_of(pattern, Shape(9, 9, batch=1))
    cache = nan_cache(module, shape, 30, page)
    rows, ends = torch.tensor([1]), torch.tensor([0, 4, 9])
    with no_host_reads():
        module.prefill(**inputs, cache=cache, lengths=torch.tensor([9, 5]))
        module.prefill(**one, cache=cache, cu_seqlens=ends, max_seqlen=6)
        cache.select(torch.tensor([1, 1]))
        module.decode(**cut(pattern, one, 0, 1), cache=cache, rows=rows)
        cache.truncate(torch.tensor([7, 12]))
        cache.reset(torch.tensor([True, False]))
        for _ in range(2):  # the second one runs full
            module.prefill(**inputs, cache=cache)
    assert cache.lengths.tolist() == [18, 29]


@pytest.mark.parametrize("how", [{}, {"max_seqlen_q": 1}])
@pytest.mark.parametrize("name", ["streaming_llm", "document", GIVEN["tokens"], ROWS])
def test_pages_of_others(name: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, pattern = module_of(name), pattern_of(name)
    monkeypatch.setattr(launches(module), "KERNELS_ON_CPU", True)
    inputs = inputs_of(pattern, Shape(32, 32))
    q = inputs["q"][0].transpose(0, 1)[: 2 if how else 7]
    pages = {x: inputs[x][0].transpose(0, 1).unflatten(0, (2, 16)) for x in ("k", "v")}
    given: dict[str, Tensor] = {"q": q, "k_pages": pages["k"], "v_pages": pages["v"]}
    given["block_table"] = torch.tensor([[1, 0], [0, -1]], dtype=torch.int32)
    given["seq_lens"] = torch.tensor([20, 16])
    given["cu_seqlens_q"] = torch.tensor([0, 1, 2] if how else [0, 6, 7])
    if "t" in inputs:
        given["t"] = inputs["t"].clamp(min=0)[0].transpose(0, 1)[: len(q)]  # no query is without a key
    given |= {x: inputs[x][..., : len(q), :] for x in ("m", "b") if x in inputs}
    if "doc" in inputs:
        given["doc"] = inputs["doc"].expand(2, -1).contiguous()
    with no_host_reads():
        out, lse = module.attend_paged(**given, **how)
    assert out.isfinite().all()
    assert lse.isfinite().all()
