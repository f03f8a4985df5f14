"""One list for all queries of a call, by all of them or by the last ones: `rows = op(all)` and `tail`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import spdsl
from spdsl.oracle import dense
from spdsl.runtime.select import choose
from tests.library import broken
from tests.numerics.cases import Found, Shape, assert_same, cut, inputs_of, nan_cache
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, text_of
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_packed, check_padded
from tests.sanitizer.mode import sanitized

TRAINED = {
    "sums of all": (
        "seen = softmax(dot(kv)) chosen = top_k(2, score = seen, rows = sum(all), share = head, unit = sum(4)) "
        "return attend(chosen) if train"
    ),
    "the last ones, any number": (
        "seen = softmax(dot(kv, query = tail(q, 9))) allow(W404) "
        "chosen = top_p(0.6, score = seen, rows = mean(all), unit = sum(16), force = first(1)) return attend(chosen)"
    ),
    "maxima of logits": (
        "seen = dot(compress(8), query = tail(q, 24)) "
        "chosen = top_k(3, score = seen, rows = max(all), share = max(group), within = where(k >= 8)) "
        "return attend(chosen) if train"
    ),
    "rows of cells": (
        "q_mean = compress(8, of = q, by = mean, partial = keep) seen = softmax(dot(compress(8), query = q_mean)) "
        "chosen = top_k(2, score = seen, rows = sum(all), share = head, unit = sum(16)) return attend(chosen) if train"
    ),
}
PROMPT = (
    "causal chosen = top_k(3, score = softmax(dot(kv, query = {query})), rows = sum(all), share = {share}, "
    "unit = sum(4), force = last(1)) return attend(chosen | sliding(5)) if prefill return attend(all)"
)
PROMPTS = {
    "the last 12": PROMPT.format(query="tail(q, 12)", share="head"),
    "the last one": PROMPT.format(query="tail(q, 1)", share="head"),
    "all": PROMPT.format(query="q", share="group"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_lists_results_and_gradients(engine: Engine, name: str) -> None:
    checked(TRAINED[name], Shape(41, 75, 2, 4, 2), engine(TRAINED[name]))


@pytest.mark.parametrize("name", TRAINED)
def test_packed_and_padded(engine: Engine, name: str) -> None:
    check_packed(TRAINED[name], engine(TRAINED[name]), [0, 21, 21, 38])
    check_padded(TRAINED[name], engine(TRAINED[name]), [21, 0, 18])


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(engine: Engine, name: str, page: int | None) -> None:
    """A call chooses by its own queries: of a chunk by those of the chunk."""
    check_calls(PROMPTS[name], engine(PROMPTS[name]), page)


def check_calls(body: str, module: ModuleType, page: int | None) -> None:
    pattern, shape = pattern_of(body), Shape(56, 56, batch=2)
    inputs, cache = inputs_of(pattern, shape), nan_cache(module, shape, 60, page)
    first = 0
    for rows in (19, 1, 7, 29):
        end = first + rows
        new = cut(pattern, inputs, first, end)
        found = module.prefill(**new, cache=cache, return_lse=True)
        seen = {**cut(pattern, inputs, 0, end), "q": new["q"]}
        assert_same(Found([found]), Found(dense.results(pattern, seen, "prefill")))
        first = end


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_several_lengths(engine: Engine, name: str) -> None:
    check_lengths(PROMPTS[name], engine(PROMPTS[name]))


def check_lengths(body: str, module: ModuleType) -> None:
    """Packed: sequences with more and fewer queries than are asked, and one that goes on."""
    pattern, shape = pattern_of(body), Shape(40, 40, batch=3)
    inputs, cache = inputs_of(pattern, shape), nan_cache(module, shape, 64, 16)
    module.prefill(**{key: x[:1, :, :13] for key, x in inputs.items()}, cache=cache, rows=[0])
    before, new = [13, 0, 0], [20, 7, 31]
    packed = {
        key: torch.cat([x[row : row + 1, :, a : a + n] for row, (a, n) in enumerate(zip(before, new, strict=True))], 2)
        for key, x in inputs.items()
    }
    ends = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    out, lse = module.prefill(**packed, cache=cache, cu_seqlens=ends, return_lse=True)
    for row, (length, count) in enumerate(zip(before, new, strict=True)):
        whole = {key: x[row : row + 1, :, : length + count] for key, x in inputs.items()}
        seen = {**whole, "q": whole["q"][:, :, length:]}
        part = slice(int(ends[row]), int(ends[row + 1]))
        assert_same(Found([(out[:, :, part], lse[:, :, part])]), Found(dense.results(pattern, seen, "prefill")))


def test_column_sums_in_plain_torch(engine: Engine) -> None:
    """Sums over the last queries of the softmax of all keys, as vertical patterns are found (arXiv 2407.02490)."""
    body = (
        "causal seen = softmax(dot(kv, query = tail(q, 16))) "
        "chosen = top_k(5, score = seen, rows = sum(all), share = head) "
        "return attend(chosen) if prefill return attend(all)"
    )
    module = engine(body)
    inputs = inputs_of(pattern_of(body), Shape(70, 70, 1, 4, 2))
    q, k = inputs["q"], inputs["k"].repeat_interleave(2, 1)
    logits = q[:, :, -16:] @ k.transpose(-1, -2) / 4
    hidden = torch.arange(70)[None] > torch.arange(54, 70)[:, None]
    columns = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1).sum(2)
    wanted = columns.topk(5, -1).indices.sort(-1).values
    lists = module.choices(**inputs, phase="prefill")["chosen"]
    assert torch.equal(lists.long(), wanted[:, :, None])


@pytest.mark.parametrize("name", TRAINED)
def test_pieces_of_rows(cpu: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU scores of a bounded number of rows exist at once."""
    module = cpu(TRAINED[name])
    monkeypatch.setattr(choose, "_SCORES_AT_ONCE", 4000)
    checked(TRAINED[name], Shape(41, 75, 2, 4, 2), module)


def packed(body: str, module: ModuleType) -> None:
    check_packed(body, module, [0, 21, 21, 38])


def calls(body: str, module: ModuleType) -> None:
    check_calls(body, module, None)


def whole(body: str, module: ModuleType) -> None:
    checked(body, Shape(41, 75, 2, 4, 2), module)


class Bug(NamedTuple):
    title: str
    pattern: str
    check: Callable[[str, ModuleType], None]
    old: str
    new: str
    of_kernels: bool = False


LAST, ALL = PROMPTS["the last 12"], TRAINED["sums of all"]
BUGS = [
    Bug("the first queries are the last", LAST, check_lengths, "start + rows - own", "start"),
    Bug("more queries than the last", LAST, calls, "max(0, q.shape[2] - count)", "max(0, q.shape[2] - count) // 2"),
    Bug("lists of the first sequence", ALL, packed, "membership(chosen, units)",
        "membership(chosen[:1].expand_as(chosen), units)"),
    Bug("half of the rows", ALL, whole, "tile * 0, q_count, q_origin", "tile * 0, q_count // 2, q_origin", True),
    Bug("all lists in one place", ALL, whole, "at(chosen, rows.s, list_head, 0)", "at(chosen, 0, list_head, 0)", True),
    Bug("units that only the first row sees", LAST, check_lengths, "q_origin + q_count - 1\n    else",
        "q_origin\n    else", True),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_is_seen(engine: Engine, bug: Bug, tmp_path: Path) -> None:
    if bug.of_kernels != (engine.name == "interpreted"):
        pytest.skip("one engine sees it")
    module = engine(broken(spdsl.compile(text_of(bug.pattern)).text, bug.old, bug.new, tmp_path))
    with sanitized(), pytest.raises(AssertionError):
        bug.check(bug.pattern, module)
