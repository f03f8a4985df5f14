"""One change at a time in the text of a module that compresses and selects; the checks beside must see each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from spdsl.oracle import dense
from spdsl.runtime.tuning.unit_configs import JOB_TILES_INTERPRETED, PARTS_BYTES_INTERPRETED
from tests.library import broken, launches
from tests.numerics.cases import Shape, assert_same, generated, inputs_of, meant
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, printed
from tests.numerics.selected import by_rank, expect_lists, picked
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_choices import scrambled
from tests.numerics.test_selection_layouts import check_chunks, check_packed

Check = Callable[[str, ModuleType], None]
SCORED = picked("top_k(2, score = mass(coarse), unit = 16, force = last(1))", "8, 4, by = weighted")
LOCAL = picked("top_k(3, score = mass(coarse), unit = 16, force = last(2))", "8, 4, by = mlp")
APART = by_rank("top_k(2, score = rank, share = head, unit = max(16), force = last(1))")
SHARED = by_rank("top_k(2, score = rank, share = max(group), unit = max(16), force = last(1))")
MANY = by_rank("threshold(0, score = rank, share = head, unit = max(16), force = last(1))")
SUNK = (
    "causal sinks = tensor(head) entries = compress(8, 4) rank = dot(entries) "
    "chosen = top_k(2, score = rank, share = head, unit = max(16)) return attend(chosen, sink_logit = sinks)"
)
UNION = by_rank("top_k(1, score = rank, share = sum(group), unit = sum(16))", keys="chosen | sliding(5)")
FIRST = by_rank("top_k(1, score = rank, share = sum(group), unit = sum(16), force = first(1))")

# A query's chosen units depend on entries that begin before their place, and so does what it reads.
EARLY = picked("top_k(2, score = mass(coarse), unit = 16, force = last(1))", "8, 4, before = 4, by = weighted")
MEAN = picked("top_k(2, score = mass(coarse), unit = 16, force = last(1))", "8, 4, before = 4, by = mean")
PLACED = by_rank("top_k(2, score = rank, share = max(group), unit = max(16))", compress="12, 8, before = 11")
MLP = picked("top_k(2, score = mass(coarse), unit = 16, force = last(1))", "8, 4, before = 4, by = mlp")
STREAMS = "causal far = stream() return attend(kv[sliding(9)] | far[all - sliding(9)])"
FEW = by_rank(
    "threshold(9, score = rank, share = max(group), unit = max(16), least = 2, most = 3, within = where(k >= 16), "
    "force = first(2) & where(k >= 16))"
)
PASSING = by_rank("threshold(0, score = rank, share = max(group), unit = max(16), least = 1, most = 3)")
ANGLES = by_rank("threshold(0.3, score = softmax(cosine(entries)), unit = sum(16), share = head)")
ALONE = by_rank("threshold(9, score = rank, share = max(group), unit = max(16), least = 1, most = 3)")


def late(body: str, module: ModuleType) -> None:
    """Rows that see more units than they choose."""
    checked(body, Shape(17, 80), module)


def grouped(body: str, module: ModuleType) -> None:
    checked(body, Shape(17, 80, heads=4, kv_heads=2), module)


def listed(body: str, module: ModuleType) -> None:
    """The lists alone, of rows that see more units than they choose."""
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(17, 80))
    expect_lists(module.choices(**inputs), pattern, inputs)


def once(body: str, module: ModuleType) -> None:
    """The list of one query of more units than a program ranks at once: several programs share them."""
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(1, 70 * 16))
    expect_lists(module.choices(**inputs), pattern, inputs)


def shared(body: str, module: ModuleType) -> None:
    """16 heads leave one query per tile, and every tile chooses unit 0: more tiles than an interpreted job holds."""
    assert JOB_TILES_INTERPRETED < 11 or not launches(module).INTERPRETED
    checked(body, Shape(11, 11, heads=16), module)


def turned(body: str, module: ModuleType) -> None:
    """Heads whose parts have no room side by side."""
    assert 80 * 2 * 17 * 4 * 2 > PARTS_BYTES_INTERPRETED
    checked(body, Shape(80, 80, heads=4, kv_heads=2), module)


def packed(body: str, module: ModuleType) -> None:
    check_packed(body, module, [0, 21, 38])


def stepped(body: str, module: ModuleType) -> None:
    check_chunks(body, module, 16, [17, 5], 3, 1)


def early(body: str, module: ModuleType) -> None:
    """Rows that see few cells, the first one of them."""
    checked(body, Shape(11, 11, heads=4, kv_heads=2), module)


def begun(body: str, module: ModuleType) -> None:
    """A cache whose first entry closes in a step."""
    check_chunks(body, module, 16, [3], 5, 1)


def paired(body: str, module: ModuleType) -> None:
    """Two sequences whose next entry closes in a step."""
    check_chunks(body, module, 16, [19], 1, 2)


def chunked(body: str, module: ModuleType) -> None:
    """A chunk closes several entries, the first of them begins before the sequence."""
    check_chunks(body, module, 16, [17], 0, 1)


def apart(body: str, module: ModuleType) -> None:
    check_chunks(body, module, 16, [37], 1, 2)


def passed(body: str, module: ModuleType) -> None:
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(17, 80, heads=4, kv_heads=2))
    chosen = dense.choices(pattern, inputs)["chosen"]
    found = generated(module, pattern, {**inputs, "chosen": scrambled(chosen)})
    assert_same(found, meant(pattern, {**inputs, "chosen": chosen}))


class Bug(NamedTuple):
    title: str
    pattern: str
    check: Check
    old: str
    new: str


BOTH = [
    Bug("an entry is visible one token late", SCORED, late, "q - 4 * k >= 7", "q - 4 * k > 7"),
    Bug("an entry is visible one token early", SCORED, late, "q - 4 * k >= 7", "q - 4 * k >= 6"),
    Bug("entries of all sequences from 0 on", SCORED, packed,
        "counts.cumsum(0) - counts if packed else", "0 * counts if packed else"),
    Bug("gelu by tanh", LOCAL, late, "up.flatten(1, 2)))", 'up.flatten(1, 2)), approximate="tanh")'),
    Bug("a cell without its position", LOCAL, late, "position.flatten(1).unsqueeze(1)",
        "0 * position.flatten(1).unsqueeze(1)"),
    Bug("an early cell is visible as late as others", MEAN, late, "q - 4 * k >= 3", "q - 4 * k >= 7"),
    Bug("gradients of the first part of a joint alone", UNION, late,
        "found[name].add_(grad) if name in found else grad", "found.get(name, grad)"),
    Bug("units given twice count twice", SHARED, passed, "kept[..., 1:] &= units[..., 1:] != units[..., :-1]", "pass"),
]  # fmt: skip
PAIRS = [
    Bug("each turn begins with the first head", APART, turned, "heads = first + torch.arange(",
        "heads = torch.arange("),
    Bug("the first head of a kv head for all", APART, grouped, "heads = head + number // lists.queries",
        "heads = head + 0 * number"),
    Bug("pairs of the first sequence", APART, packed, "number % lists.queries - tl.load(lists.first + s)",
        "number % lists.queries"),
    Bug("parts of the first sequence", APART, packed, "(tl.load(lists.first + s) + query).to(tl.int64) * lists.width",
        "query.to(tl.int64) * lists.width"),
    Bug("the first pair of the next unit", APART, late, "inside = place < end", "inside = place <= end"),
    Bug("a unit ends a block early", APART, late, "tl.maximum(last + C.BLOCK_N - ", "tl.maximum(last - "),
    Bug("earlier parts do not shrink", APART, late, "acc0 = acc0 * decay + weight", "acc0 = acc0 + weight"),
    Bug("the sum of parts does not shrink", APART, late, "total = total * tl.exp2(m - shift) +", "total = total +"),
    Bug("the last part left out", APART, late, "there = i < count", "there = i < count - 1"),
    Bug("the last part of dQ left out", APART, late, "query * 0, i < count, 0,", "query * 0, i < count - 1, 0,"),
    Bug("parts without their sink", SUNK, late, "start_softmax(sink, head, C)", "start_softmax(None, head, C)"),
    Bug("the sink of the first head", SUNK, grouped, "start_softmax(sink, head, C)",
        "start_softmax(sink, head * 0, C)"),
    Bug("dK of the queries of one tile", APART, turned, "in tl.range(begin, end, C.BLOCK_M,",
        "in tl.range(begin, tl.minimum(end, begin + C.BLOCK_M), C.BLOCK_M,"),
]  # fmt: skip
KERNELS = [
    Bug("merged parts of one weight", UNION, late, '"-inf"), C) * LOG2E - shift)', '"-inf"), C) * 0.0)'),
    Bug("gates of the first branch for all", SCORED, stepped, "data + part.BRANCH)", "data + 0 * part.BRANCH)"),
    Bug("a part of a merge begins anew", UNION, stepped, "if part.LAST:", "if True:"),
    Bug("branches go on from the branch before", SCORED, stepped,
        "acc, top, total = tl.zeros_like(acc), tl.full", "acc, _, _ = tl.zeros_like(acc), tl.full"),
    Bug("each split has its own least", ALONE, once, "tl.store(own + place, best)",
        "tl.store(own + place, tl.where(place < S.LEAST, best | (1 << 31), best))"),
    Bug("least is counted over the forced units", FEW, listed, "(place < S.LEAST)",
        "(place - tl.max((best >> 32 == _LAST).to(tl.int32), 1, keep_dims=True) < S.LEAST)"),
    Bug("least reaches beyond its candidates", FEW, listed, "allowed, score >= 9.0",
        "score == score, score >= 9.0"),
    Bug("the first of the least is left out", FEW, listed, "(place < S.LEAST)", "(place < S.LEAST - 1)"),
    Bug("probabilities of another product", ANGLES, listed, "\n    product = ranking_product(",
        "\n    product = rt.dot_rows("),
    Bug("they are in a step", ANGLES, stepped, "\n    product = ranking_product(", "\n    product = rt.dot_rows("),
    Bug("units that pass are lost in the number", PASSING, listed, "(best & _LAST)", "(best & 0xFFFFFFFF)"),
    Bug("entries closed too late", SCORED, stepped, "whole_cells(length - call.added,", "whole_cells(length,"),
    Bug("absent tokens count as zeros of a mean", MEAN, early, "state[0] / cell_sizes(entry, tokens, C)",
        "state[0] / C.WIDTH"),
    Bug("the gradient of a whole cell for one that is cut", MEAN, early, "dout / cell_sizes(entry, tokens, C)",
        "dout / C.WIDTH"),
    Bug("absent tokens have a position", EARLY, early,
        "tl.where(there[:, None], value.to(C.ACC) + moved[None, :], 0.0)",
        "value.to(C.ACC) + moved[None, :]"),
    Bug("absent places get a gradient", EARLY, early, "tl.sum(tl.where(there[:, None], value, 0.0), 0)",
        "tl.sum(value, 0)"),
    Bug("tokens of the sequence before", MEAN, packed, "inside & (token >= 0)",
        "inside & (token >= -9)"),
    Bug("a cell closed as late as others", MEAN, stepped, "tl.maximum(tokens + BEFORE - WIDTH",
        "tl.maximum(tokens - WIDTH"),
    Bug("cells taken at their place", MEAN, stepped, "first = entry * C.STRIDE - C.BEFORE",
        "first = entry * C.STRIDE"),
    Bug("no token is absent in a cache", MEAN, begun, "(tl.minimum(first, 0) + C.WIDTH)",
        "(tl.zeros_like(first) + C.WIDTH)"),
    Bug("absent tokens have a position in a cache", EARLY, begun, "mask=there, other=0).to(C.ACC)[:, None]",
        "mask=w < C.WIDTH, other=0).to(C.ACC)[:, None]"),
    Bug("appended to the wrong stream", STREAMS, stepped, "append_head(streams[i],", "append_head(streams[0],"),
    Bug("cells of a chunk taken at their place", MLP, chunked, "entry * STRIDE - BEFORE + row", "entry * STRIDE + row"),
    Bug("no token is absent in a chunk", MLP, chunked, "(position >= 0).to(tl.uint8)",
        "(position >= -99).to(tl.uint8)"),
    Bug("a step's cells taken at their place", MLP, begun, "first = entry * C.STRIDE - C.BEFORE",
        "first = entry * C.STRIDE"),
    Bug("closed one step late", LOCAL, paired, "mask=s < call.sequences, other=0)",
        "mask=s < call.sequences, other=0) - 1"),
    Bug("the weights of the other side", LOCAL, paired, "position, up, _ = (x.contiguous() for x in side.weights)",
        "position, up, _ = (x.contiguous() for x in sides[0].weights)"),
    Bug("the second weights of the other side", LOCAL, paired, "down = side.weights[2]", "down = sides[0].weights[2]"),
    Bug("the last sequence of a block left out", LOCAL, paired, "(s < call.sequences) & (entry < count)",
        "(s < call.sequences - 1) & (entry < count)"),
    Bug("the first sequence's lengths for all of a block", LOCAL, paired, "C.ROWS + tl.arange(0, C.ROWS)\n    length",
        "C.ROWS + tl.arange(0, C.ROWS)\n    s = 0 * s\n    length"),
    Bug("a step's cell without its position", LOCAL, paired, "total = dot(moved.to(x.dtype), up, total, C)", "pass"),
    Bug("the last columns of a layer left out", LOCAL, paired, "(tile >= 0) & (tile < side.TILES)",
        "(tile >= 0) & (tile < side.TILES - 1)"),
    Bug("entries weigh as if none began early", EARLY, late, "(S.FIRST + i)", "(S.FIRST + i - 1)"),
    Bug("cells of the first page", SCORED, stepped, "call.pages + page, mask=there",
        "call.pages + 0 * page, mask=there"),
    Bug("an entry across two units weighs as others", SCORED, late, "tl.where(i == 1, 2.0", "tl.where(i == 1, 4.0"),
    Bug("eq. 9 with the other sign", SCORED, late, "unit * S.RATIO + (S.FIRST + i)", "unit * S.RATIO - (S.FIRST + i)"),
    Bug("eq. 9 one entry further on", SCORED, late, "(S.FIRST + i)", "(S.FIRST + i + 1)"),
    Bug("forced units rank by score", SCORED, late, "tl.where(forced, _LAST, tl.minimum(score_bits(score), _LAST - 1))",
        "tl.minimum(score_bits(score), _LAST - 1)"),
    Bug("forced units need a score", FIRST, shared, "tl.where(scored | forced, rank", "tl.where(scored, rank"),
    Bug("local units one short", LOCAL, late, "- k_last < 17", "- k_last < 1"),
    Bug("the best head for the sum of heads", SCORED, grouped, "tl.sum(tl.reshape(tl.where(seen, value, 0.0)",
        "tl.max(tl.reshape(tl.where(seen, value, 0.0)"),
    Bug("the mask bit of the neighbour", SCORED, late, "(mask >> lane.to(tl.int64))",
        "(mask >> (lane ^ 1).to(tl.int64))"),
    Bug("the mask bit of the first query in dK", SCORED, late, "inverse.masks + entry) >> lane.to(tl.int64)",
        "inverse.masks + entry) >> 0 * lane.to(tl.int64)"),
    Bug("the first part of a unit again and again", FIRST, shared, "slot + i).data", "slot).data"),
    Bug("the first part of a unit twice, and not its last", FIRST, shared, "slot + i).data",
        "slot + tl.maximum(i - 1, 0)).data"),
    Bug("jobs without their last tile", FIRST, shared, "torch.minimum(begin + longest,",
        "torch.minimum(begin + longest - 1,"),
    Bug("tiles of the first sequence", SCORED, packed, "inverse.all_tiles - first_tile", "inverse.all_tiles"),
    Bug("units of the first sequence", SCORED, packed, "tiles.units + first_unit[sequence].view(1, -1, 1)",
        "tiles.units"),
    Bug("the last unit of a step left out", SCORED, stepped, "tl.sum((unit >= 0).to(tl.int32), 0)",
        "tl.sum((unit >= 0).to(tl.int32), 0) - 1"),
    Bug("the list of the first head in a step", APART, apart, "(tl.cast(s, tl.int64) * tl.num_programs(1) + h)",
        "(tl.cast(s, tl.int64) * tl.num_programs(1))"),
    Bug("lists of the first head of a group", MANY, grouped, "kv_head * U.LISTS + number // inverse.all_tiles",
        "kv_head * U.LISTS"),
]  # fmt: skip
CPU = [
    Bug("least is counted over the forced units", FEW, listed, "(place < selection.least)",
        "(place - known.sum(-1, keepdim=True) < selection.least)"),
    Bug("least reaches beyond its candidates", FEW, listed, "scores.masked_fill(~may,",
        "scores.masked_fill(0 * may > 0,"),
    Bug("the first of the least is left out", FEW, listed, "(place < selection.least)",
        "(place < selection.least - 1)"),
    Bug("entries closed too late", SCORED, stepped, "entry_counts(self.lengths - added,", "entry_counts(self.lengths,"),
    Bug("an entry across two units weighs as others", SCORED, late, "overlap.double() / stride",
        "(overlap > 0).double()"),
    Bug("absent tokens count as zeros of a mean", MEAN, early, "/ there.sum(2)[:, None, :, None]",
        "/ there.shape[2]"),
    Bug("absent tokens have a position", EARLY, early, "there.to(dtype), weight",
        "torch.ones_like(there).to(dtype), weight"),
    Bug("absent tokens move a network", MLP, early, "there.to(c.dtype).expand",
        "torch.ones_like(there).to(c.dtype).expand"),
    Bug("tokens of the sequence before", MEAN, packed, "& (token >= 0) & (token < self",
        "& (token >= -9) & (token < self"),
    Bug("a cell closed as late as others", MEAN, stepped, "(tokens + cells.before - cells.width + cells.stride).clamp",
        "(tokens - cells.width + cells.stride).clamp"),
    Bug("no token is absent in a cache", MEAN, begun, "positions >= 0 if cells.before else None", "None"),
    Bug("entries lie in units as if none began early", PLACED, late, "token = entry * stride - before",
        "token = entry * stride"),
    Bug("eq. 9 from the unit's own first entry on", SCORED, late, "(start + before - width) // stride + 1",
        "start // stride"),
    Bug("forced units beside the others", SCORED, late, "place = known.sum(-1, keepdim=True) + torch", "place = torch"),
    Bug("the lowest scores", SCORED, late, "descending=True, stable=True", "descending=False, stable=True"),
    Bug("the first kv head for all lists", APART, grouped, "sequence * sizes.kv_heads // sizes.lists",
        "sequence // sizes.lists * sizes.kv_heads"),
    Bug("no delta", SCORED, late, ".sub_(delta_of)", ""),
]  # fmt: skip
UNBROKEN = sorted({(bug.pattern, bug.check.__name__) for bug in [*BOTH, *KERNELS, *PAIRS, *CPU]})


def _broken(bug: Bug, folder: Path) -> ModuleType:
    return broken(printed(bug.pattern), bug.old, bug.new, folder)


@pytest.mark.parametrize("bug", [*BOTH, *KERNELS, *PAIRS], ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_in_the_kernels_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    module = kernels(_broken(bug, tmp_path))
    with pytest.raises(AssertionError):
        bug.check(bug.pattern, module)


@pytest.mark.parametrize("bug", [*BOTH, *CPU], ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_on_the_cpu_path_is_seen(cpu: Engine, bug: Bug, tmp_path: Path) -> None:
    module = cpu(_broken(bug, tmp_path))
    with pytest.raises(AssertionError):
        bug.check(bug.pattern, module)


@pytest.mark.parametrize("pattern, check", UNBROKEN)
def test_the_same_checks_pass_without_a_bug(engine: Engine, pattern: str, check: str) -> None:
    globals()[check](pattern, engine(pattern))


def test_the_patterns_of_the_bugs_choose_by_score() -> None:
    """Else no bug in a score could be seen: rows of one call must not choose the same units."""
    for body in (SCORED, LOCAL, APART):
        pattern = pattern_of(body)
        chosen = dense.choices(pattern, inputs_of(pattern, Shape(25, 80)))["chosen"]
        assert len(torch.unique(chosen.flatten(0, 2), dim=0)) > 2
