"""Queries of cells: choices and branches by one query for each cell of queries, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import spdsl
from spdsl.oracle import dense
from tests.library import broken
from tests.numerics.cases import Found, Shape, assert_same, cached, checked, cut, inputs_of, nan_cache
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, text_of
from tests.numerics.selected import SELECTED
from tests.numerics.test_selection import checked as checked_lists
from tests.numerics.test_selection_layouts import check_packed, check_padded
from tests.sanitizer.mode import sanitized

SCORES = {
    "mass of a branch": SELECTED["vsa"],
    "logits, tiles of two cells": (
        "q_max = compress(8, of = q, by = max, partial = keep) cells = compress(16) "
        "chosen = top_k(2, score = dot(cells, query = q_max), share = max(group), rows = mean(16), force = last(1)) "
        "return attend(chosen) if train"
    ),
    "cosines above a level": (
        "q_mean = compress(24, of = q, by = mean, partial = keep) cells = compress(8, 4) "
        "chosen = threshold(0.1, score = cosine(cells, query = q_mean), share = head, unit = max(16), least = 1) "
        "return attend(chosen) if train"
    ),
    "a part of all mass, of tokens": (
        "q_mean = compress(16, of = q, by = mean, partial = keep) "
        "chosen = top_p(0.5, score = softmax(dot(kv, query = q_mean)), unit = sum(16), most = 3, force = first(1)) "
        "return attend(chosen) if train"
    ),
}
NAMES = list(SCORES)


@pytest.mark.parametrize("name", NAMES)
def test_lists_results_and_gradients(engine: Engine, name: str) -> None:
    checked_lists(SCORES[name], Shape(41, 75, 1, 4, 2), engine(SCORES[name]))


@pytest.mark.parametrize("name", NAMES)
def test_packed_and_padded(engine: Engine, name: str) -> None:
    check_packed(SCORES[name], engine(SCORES[name]), [0, 21, 38])
    check_padded(SCORES[name], engine(SCORES[name]), [21, 0, 18])


PREFILL = (
    "causal q_mean = compress(8, of = q, by = mean, partial = keep) cells = compress(8) "
    "chosen = {rule} return attend(chosen | sliding(5)) if prefill return attend(all) if train return attend(chosen)"
)
PREFILLS = {
    "ranked": PREFILL.format(
        rule="top_k(2, score = softmax(dot(cells, query = q_mean)), share = head, unit = sum(16), force = last(1))"
    ),
    "cut, two cells of queries": PREFILL.format(
        rule="top_k(2, score = dot(cells, query = q_mean), share = max(group), unit = max(16), rows = max(16))"
    ),
}


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", PREFILLS)
def test_chunks_of_whole_cells_are_the_whole(engine: Engine, name: str, page: int | None) -> None:
    module, pattern = engine(PREFILLS[name]), pattern_of(PREFILLS[name])
    shape = Shape(53, 53, batch=2)
    inputs = inputs_of(pattern, shape)
    found = cached(module, pattern, inputs, [16, 32, 5], 0, nan_cache(module, shape, 64, page))
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")))


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", PREFILLS)
def test_chunks_within_cells(engine: Engine, name: str, page: int | None) -> None:
    """A call pools the part of a cell that it holds, and its last query is what the cell sees."""
    module, pattern = engine(PREFILLS[name]), pattern_of(PREFILLS[name])
    inputs = inputs_of(pattern, Shape(41, 41, batch=2))
    cache = nan_cache(module, Shape(41, 41, batch=2), 64, page)
    first = 0
    for rows in (3, 14, 1, 20, 2, 1):
        end = first + rows
        new = cut(pattern, inputs, first, end)
        phase = "decode" if end == 41 else "prefill"
        step = module.decode if phase == "decode" else module.prefill
        found = step(**new, cache=cache, return_lse=True)
        seen = {**cut(pattern, inputs, 0, end), "q": new["q"]}
        assert_same(Found([found]), Found(dense.results(pattern, seen, phase)))
        first = end


@pytest.mark.parametrize("name", PREFILLS)
def test_sequences_of_several_lengths(engine: Engine, name: str) -> None:
    """Rows of a cache stand anywhere in their cells; new tokens are packed, padded, or for some rows alone."""
    module, pattern = engine(PREFILLS[name]), pattern_of(PREFILLS[name])
    shape = Shape(40, 40, batch=3)
    inputs, cache = inputs_of(pattern, shape), nan_cache(module, shape, 64, 16)
    before, new = [13, 0, 22], [11, 9, 1]
    for row, length in enumerate(before):
        if length:
            own = {key: x[row : row + 1, :, :length] for key, x in inputs.items()}
            module.prefill(**own, cache=cache, rows=[row])
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


def test_every_phase_of_the_reference(cpu: Engine) -> None:
    body = PREFILLS["ranked"]
    module, pattern = cpu(body), pattern_of(body)
    inputs = inputs_of(pattern, Shape(37, 37))
    for phase in ("prefill", "decode"):
        found = module.reference(**inputs, phase=phase, return_lse=True)
        rows = range(37) if phase == "decode" else [None]
        wanted = []
        for row in rows:
            alone = inputs if row is None else cut(pattern, inputs, 0, row + 1)
            alone = alone if row is None else {**alone, "q": alone["q"][:, :, -1:]}
            wanted.append(dense.results(pattern, alone, phase)[0])
        parts = [torch.cat(x, 2) for x in zip(*wanted, strict=True)]
        assert_same(Found([found]), Found([tuple(parts)]))


@pytest.mark.parametrize("by", ["mean", "max"])
def test_a_plain_pooled_softmax_repeated(engine: Engine, by: str) -> None:
    """The branch of cells by itself, written out: pool, softmax, repeat."""
    rows = f"rows = compress(8, of = q, by = {by}, partial = keep)"
    body = f"{rows} cells = compress(4) return attend(cells, query = rows) if train"
    module = engine(body)
    inputs = {key: x.requires_grad_() for key, x in inputs_of(pattern_of(body), Shape(27, 27, 2, 4, 2)).items()}
    out = module.attention(**inputs)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    parts = q.split(8, 2)
    rows = torch.stack([x.mean(2) if by == "mean" else x.amax(2) for x in parts], 2)
    k, v = (x[:, :, :24].unflatten(2, (6, 4)).mean(3).repeat_interleave(2, 1) for x in (k, v))
    plain = torch.softmax(rows @ k.transpose(-1, -2) / 4, -1) @ v
    plain = plain.repeat_interleave(8, 2)[:, :, :27]
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad((x * weights).sum(), list(inputs.values())) for x in (out, plain)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offsets", [(3, 0), (27, 0), (16, 0)])
def test_a_part_of_a_sequence(engine: Engine, offsets: tuple[int, int]) -> None:
    """Cells count from position 0 of the sequence, not from the first query of the call."""
    body = SCORES["mass of a branch"]
    rows = 32 if offsets[0] == 16 else 60 - offsets[0]
    checked(body, Shape(rows, 60, 1, 2, 1, offsets=offsets), module=engine(body))


def test_keys_behind_a_cell_in_part_are_refused(cpu: Engine) -> None:
    body = SCORES["mass of a branch"]
    module, inputs = cpu(body), inputs_of(pattern_of(body), Shape(30, 60))
    with pytest.raises(ValueError, match="q_offset: expected an end at the last key, or before it at the end"):
        module.attention(**inputs, q_offset=0, k_offset=0)
    with pytest.raises(ValueError, match="k_offset: expected 0 where queries are pooled"):
        module.attention(**inputs, q_offset=30, k_offset=16)


def test_more_queries_than_keys(engine: Engine) -> None:
    """The first queries have negative positions, and cells negative numbers."""
    body = SCORES["mass of a branch"]
    checked(body, Shape(61, 40, 1, 2, 1), module=engine(body))


def test_video_sparse_attention_as_published(engine: Engine) -> None:
    """The rule of FastVideo in plain torch: means of cubes, softmax over cubes, torch.topk, and the two outputs."""
    cube, count = 16, 3
    module, pattern = engine(SELECTED["vsa"]), pattern_of(SELECTED["vsa"])
    inputs = inputs_of(pattern, Shape(96, 96, 2, 4, 4))
    q, k, v, gates = (inputs[name] for name in ("q", "k", "v", "gates"))
    q_cubes, k_cubes, v_cubes = (x.unflatten(2, (-1, cube)).mean(3) for x in (q, k, v))
    weights = torch.softmax(q_cubes @ k_cubes.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    chosen = torch.topk(weights, count, -1).indices
    mask = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, chosen, True)
    mask = mask.repeat_interleave(cube, 2).repeat_interleave(cube, 3)
    fine = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    coarse = (weights @ v_cubes).repeat_interleave(cube, 2)
    out = module.attention(**inputs)
    torch.testing.assert_close(out, gates[..., :1] * coarse + gates[..., 1:] * fine, rtol=1e-10, atol=1e-10)
    lists = module.choices(**inputs)["chosen"]
    assert torch.equal(lists.long(), chosen.sort(-1).values)


Check = Callable[[str, ModuleType], None]


def packed(body: str, module: ModuleType) -> None:
    check_packed(body, module, [0, 21, 38])


def padded(body: str, module: ModuleType) -> None:
    check_padded(body, module, [21, 0, 18])


def chunks(body: str, module: ModuleType) -> None:
    """Chunks that begin within cells."""
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(41, 41))
    cache = module.Cache(1, 64, kv_heads=1, qk_dim=16, v_dim=16, dtype=torch.float64)
    for first, end in ((0, 19), (19, 41)):
        new = cut(pattern, inputs, first, end)
        found = module.prefill(**new, cache=cache, return_lse=True)
        seen = {**cut(pattern, inputs, 0, end), "q": new["q"]}
        assert_same(Found([found]), Found(dense.results(pattern, seen, "prefill")))


def a_part(body: str, module: ModuleType) -> None:
    checked(body, Shape(33, 60, 1, 2, 1, offsets=(27, 0)), module=module)


class Bug(NamedTuple):
    title: str
    pattern: str
    check: Check
    old: str
    new: str
    of_kernels: bool = False


BUGS = [
    Bug("cells count from the first query of a call", SELECTED["vsa"], a_part,
        "origin, end = layout.q_offset,", "origin, end = 0,"),
    Bug("places count from the first query of a call", SELECTED["vsa"], a_part, "origin - first * width)", "0)"),
    Bug("cells of a chunk count from its first query", PREFILLS["ranked"], chunks,
        "position = row + origins[s]", "position = row + (first * width)[s]"),
    Bug("a short cell is divided by its width", SELECTED["vsa"], packed,
        "there = there | ~there.any(2, keepdim=True)", "there = torch.ones_like(there)"),
    Bug("packed sequences share rows", SELECTED["vsa"], packed, "begin = own.cumsum(0) - own if packed",
        "begin = own.cumsum(0) * 0 if packed"),
    Bug("queries in no sequence lie in a cell", SELECTED["vsa"], padded,
        "(row >= counts[s]), cells * width)", "(row >= counts[s]), 0)"),
    Bug("kernels begin at cell 0", PREFILLS["ranked"], chunks, "origin = tl.load(call.q_origins + s)", "origin = 0",
        of_kernels=True),
    Bug("units end at the number of the cell", PREFILLS["cut, two cells of queries"], chunks,
        "last = last * S.CELL + (S.CELL - 1)", "last = last * 1",
        of_kernels=True),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_is_seen(engine: Engine, bug: Bug, tmp_path: Path) -> None:
    if bug.of_kernels != (engine.name == "interpreted"):
        pytest.skip("one engine sees it")
    module = engine(broken(spdsl.compile(text_of(bug.pattern)).text, bug.old, bug.new, tmp_path))
    with sanitized(), pytest.raises(AssertionError):
        bug.check(bug.pattern, module)


KEPT = (
    "{more} q_mean = compress(16, of = q, by = mean, partial = keep) cells = compress({cells}, partial = keep) "
    "chosen = top_k(2, score = {score}, share = head, unit = sum(16), force = last(1)) "
    "return attend(chosen) if prefill return attend(all)"
)
SHORT_CELLS = {
    "of keys and queries": KEPT.format(
        more="causal", cells="16, by = mean", score="softmax(dot(cells, query = q_mean))"
    ),
    "of keys": KEPT.format(more="causal", cells="16, by = max", score="softmax(dot(cells))"),
    "overlapping, no order": KEPT.format(
        more="allow(W404)", cells="16, 8, before = 4, by = min", score="softmax(dot(cells, query = q_mean))"
    ),
}


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", SHORT_CELLS)
def test_short_cells_of_a_prefill(engine: Engine, name: str, page: int | None) -> None:
    """The last key of a call closes the short cell, and the next call pools it anew."""
    module, pattern = engine(SHORT_CELLS[name]), pattern_of(SHORT_CELLS[name])
    shape = Shape(48, 48, batch=2)
    inputs, cache = inputs_of(pattern, shape), nan_cache(module, shape, 51, page)
    first = 0
    for rows in (5, 1, 17, 9, 16):
        end = first + rows
        new = cut(pattern, inputs, first, end)
        found = module.prefill(**new, cache=cache, return_lse=True)
        seen = {**cut(pattern, inputs, 0, end), "q": new["q"]}
        assert_same(Found([found]), Found(dense.results(pattern, seen, "prefill")))
        first = end
    assert cache.entry_lengths("cells").tolist() == [5 if "overlapping" in name else 3] * 2


def test_entries_of_several_blocks_of_a_short_cell(engine: Engine) -> None:
    """Which tiles see them follows from tokens, of which there are more than entries."""
    body = "causal cells = compress(4, partial = keep) return attend(cells) if train"
    checked(body, Shape(90, 90, 1, 2, 1), module=engine(body))
