"""No step of a cached phase reads the device on the host, whatever the pattern: all of it could be captured."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Pattern
from tests.library import launches
from tests.module.host_reads import HostRead, no_host_reads
from tests.numerics.cases import Shape, cut, inputs_of, nan_cache
from tests.numerics.patterns import CATALOGUE, module_of, pattern_of
from tests.numerics.selected import AT_CALL, PUBLISHED, SELECTED, picked
from tests.numerics.test_gathered import CHOSEN, GIVEN

pytestmark = pytest.mark.interpret

TILES = (
    "causal entries = compress(8, 4) chosen = top_k(2, score = softmax(dot(entries)), unit = sum(16), rows = mean(16)) "
    "return attend(chosen) if prefill return attend(sliding(9))"
)
# Scores that stand in memory.
CELLS = (
    "causal rank = softmax(antidiagonal(4)) chosen = top_p(0.5, score = rank, share = head, rows = sum(16), "
    "unit = sum(16)) return attend(chosen) if prefill return attend(sliding(9))"
)
COMBINED = (
    "causal a = compress(8, 4) rank = smooth(relative(dot(a) - cosine(a)), 3) n = tensor(int) "
    "chosen = top_k(n, score = rank, share = max(group), unit = max(16), most = 3) return attend(chosen)"
)
# Lists of many units (the number that is asked for decides, not those that there are), without a bound, of tiles.
SHORT = [GIVEN["tokens of heads"], GIVEN["units of 6"], CHOSEN["units of 8"], CHOSEN["tokens by an indexer"]]
FURTHER = (
    "softmax", "cells that begin early", "threshold of at least", "two choices", "chosen and near",
    picked("top_k(300, score = mass(coarse), unit = 16)"), "at least of a logit", "heads apart, any number", TILES,
    CELLS, COMBINED,
    *AT_CALL.values(), *SHORT,
)  # fmt: skip


def steps(module: ModuleType, pattern: Pattern, page: int | None) -> Callable[[], None]:
    """Two chunks and two steps of generation, of two sequences of which one began later; the cache is ready."""
    shape = Shape(40, 40, batch=2, heads=pattern.query_heads or 2, kv_heads=pattern.kv_heads or 1, qk=16, v=16)
    inputs, cache = inputs_of(pattern, shape), nan_cache(module, shape, 48, page)
    calls = [module.prefill] * 2 + [module.decode] * 2 if "decode" in module.PHASES else [module.prefill] * 2
    bounds = [(0, 19), (19, 36), (36, 37), (37, 38)]
    given = [cut(pattern, inputs, first, end) for first, end in bounds]
    apart = {x.name for x in pattern.inputs if getattr(x, "given", False) and not x.listed}
    for own, (first, end) in zip(given, bounds, strict=True):
        lists = inputs_of(pattern, Shape(end - first, end, 2, shape.heads, shape.kv_heads, qk=16, v=16))
        own |= {name: lists[name] for name in apart}

    def run() -> None:
        for call, own in zip(calls, given, strict=False):
            call(**own, cache=cache, return_lse=True)

    return run


CACHED = [name for name in PUBLISHED if name != "vsa"]  # which is for training alone


@pytest.mark.parametrize("name", [*CATALOGUE, *CACHED, *FURTHER], ids=lambda name: name[:40])
def test_no_step_reads_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = SELECTED.get(name, name)
    module = module_of(body)
    monkeypatch.setattr(launches(module), "KERNELS_ON_CPU", True)
    run = steps(module, pattern_of(body), 16)
    with no_host_reads():
        run()


@pytest.mark.parametrize("name", ["streaming_llm", "nsa", SHORT[0]], ids=lambda name: name[:40])
def test_nor_without_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = SELECTED.get(name, name)
    module = module_of(body)
    monkeypatch.setattr(launches(module), "KERNELS_ON_CPU", True)
    run = steps(module, pattern_of(body), None)
    with no_host_reads():
        run()


X = torch.arange(4.0)
MASK, MANY, PAIR = X > 1, torch.arange(4), X.clone()
SEEDED: dict[str, Callable[[], Any]] = {
    "item": lambda: X[0].item(),
    "a number as bool": lambda: bool(MASK[0]),
    "a number as int": lambda: int(MANY[1]),
    "is_nonzero": lambda: torch.is_nonzero(X[0]),
    "nonzero": lambda: X.nonzero(),
    "where with one argument": lambda: torch.where(MASK),
    "masked_select": lambda: X.masked_select(MASK),
    "index by a mask": lambda: X[MASK],
    "index_put by a mask": lambda: X.clone().index_put_((MASK,), torch.zeros(())),
    "assignment by a mask": lambda: X.clone().__setitem__(MASK, X[:2]),
    "unique": lambda: X.unique(),
    "unique_consecutive": lambda: X.unique_consecutive(),
    "unique of rows": lambda: X[None].unique(dim=0),
    "equal": lambda: torch.equal(X, PAIR),
    "allclose": lambda: torch.allclose(X, PAIR),
    "bincount": lambda: MANY.bincount(),
    "repeat_interleave": lambda: X.repeat_interleave(MANY),
    "a copy to another device": lambda: X.to("meta"),
    "a copy from another device": lambda: torch.empty(4, device="meta").copy_(X),
    "numpy": lambda: X.numpy(),
    "an array": lambda: np.asarray(X),
    "tolist": lambda: X.tolist(),
    "untyped_storage": lambda: X.untyped_storage(),
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_read_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a kernel starts."""
    module = module_of("causal")
    monkeypatch.setattr(launches(module), "KERNELS_ON_CPU", True)
    run = steps(module, pattern_of("causal"), 16)
    call_of = module.rt.call_of

    def reading(*given: Any) -> Any:
        SEEDED[name]()
        return call_of(*given)

    monkeypatch.setattr(module.rt, "call_of", reading)
    with no_host_reads(), pytest.raises(HostRead):
        run()


ALLOWED: dict[str, Callable[[], Tensor]] = {
    "repeat_interleave by a number": lambda: X.repeat_interleave(2),
    "repeat_interleave of a known size": lambda: X.repeat_interleave(MANY, output_size=6),
    "index by numbers": lambda: X[MANY],
    "where": lambda: torch.where(MASK, X, 0.0),
    "another dtype": lambda: X.to(torch.float64),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_needs_nothing_passes(name: str) -> None:
    with no_host_reads():
        ALLOWED[name]()
