"""Selection against the rules written as loops over single numbers."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spdsl.runtime.entries.entries import Cells, entry_count
from spdsl.runtime.select import choose as module
from spdsl.runtime.select.choose import Selection, choose, sorted_units


class Call(NamedTuple):
    logits: Tensor  # [B, Hs, N, E]
    lse: Tensor | None
    forced: Tensor  # [B, Hc, tiles, units]
    allowed: Tensor
    units: int
    q_origin: int
    selection: Selection
    tokens: int


def chosen_by(call: Call) -> Tensor:
    """What the module chooses."""
    rows = call.selection.rows
    before = call.q_origin // rows

    def of_rows(table: Tensor, first: int, end: int) -> Tensor:
        return table[:, :, (call.q_origin + first) // rows - before : -(-(call.q_origin + end) // rows) - before]

    b, heads, n, entries = call.logits.shape
    return choose(
        lambda first, end: call.logits[:, :, first:end],
        call.lse,
        lambda first, end: of_rows(call.forced, first, end),
        lambda first, end: of_rows(call.allowed, first, end),
        (b, heads, n, entries, call.units, call.q_origin, call.tokens),
        call.selection,
    )


def reduce(by: str | None, values: list[float], weights: list[float] | None = None) -> float | None:
    if not values:
        return None
    if any(math.isnan(x) for x in values):
        return math.nan
    if by == "mean":
        return sum(values) / len(values)
    if by == "sum":
        return sum(x * w for x, w in zip(values, weights or [1.0] * len(values), strict=True))
    assert by == "max" or len(values) == 1
    return max(values)


def score_of(call: Call, b: int, c: int, tile: int, unit: int) -> float | None:
    """Heads, then rows, then entries; None where nothing counts."""
    s = call.selection
    group = call.logits.shape[1] // s.lists
    values, weights = [], []
    for entry in range(call.logits.shape[3]):
        first = entry * s.cells.stride - s.cells.before
        end = min(first + s.cells.width, call.tokens)
        overlap = min(end, (unit + 1) * s.unit) - max(first, unit * s.unit)
        if entry != unit if s.unit_by is None else overlap <= 0:
            continue
        of_rows = []
        for row in range(call.logits.shape[2]):
            if (call.q_origin + row) // s.rows - call.q_origin // s.rows != tile:
                continue
            of_heads = []
            for head in range(c * group, (c + 1) * group):
                x = float(call.logits[b, head, row, entry])
                if x == -math.inf:
                    continue
                if call.lse is not None:
                    lse = float(call.lse[b, head, row])
                    x = 0.0 if lse == -math.inf else math.exp(x - lse)
                of_heads.append(x)
            found = reduce(s.heads_by, of_heads)
            of_rows += [] if found is None else [found]
        found = reduce(s.rows_by, of_rows)
        if found is not None:
            values.append(found)
            weights.append(overlap / s.cells.stride)
    return reduce(s.unit_by, values, weights)


def list_of(call: Call, b: int, c: int, tile: int) -> list[int]:
    s = call.selection
    allowed = [u for u in range(call.units) if call.allowed[b, c, tile, u]]
    forced = [u for u in allowed if call.forced[b, c, tile, u]]
    scores = {u: score_of(call, b, c, tile, u) for u in allowed if u not in forced}
    known = {u: x for u, x in scores.items() if x is not None and not math.isnan(x)}
    ranked = forced + sorted(known, key=lambda u: (-known[u], u))
    if s.level is not None:
        ranked = [u for i, u in enumerate(ranked) if i < s.least or u in forced or known[u] >= s.level]
    most = s.most if s.count is None else min(s.count, s.most)
    taken = sorted(ranked[:most])
    return taken + [-1] * (s.most - len(taken))


def expected(call: Call) -> list[list[list[list[int]]]]:
    b, lists, tiles = call.forced.shape[:3]
    return [[[list_of(call, i, c, t) for t in range(tiles)] for c in range(lists)] for i in range(b)]


def random_call(
    seed: int,
    selection: Selection,
    *,
    probability: bool = False,
    heads: int = 4,
    rows: int = 7,
    q_origin: int = 10,
    nan: float = 0.02,
    plain: bool = False,
) -> Call:
    """Scores of a few quarters, so that sums are exact and ties many; probabilities are powers of two."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    units = rng.randint(3, 6)
    tokens = units * selection.unit - rng.randint(0, selection.unit - 1)
    entries = entry_count(tokens, selection.cells)
    shape = (2, heads, rows, entries)
    lse = None
    if probability:  # p is exp of 0 or of -inf: exact
        lse = torch.randint(-2, 3, shape[:3]).double()
        logits = lse.unsqueeze(-1).expand(shape).clone()
        logits = logits.masked_fill(torch.rand(shape) < 0.3, -1000.0)  # visible, p = 0
        lse = lse.masked_fill(torch.rand(shape[:3]) < 0.1, -math.inf)
    else:
        logits = torch.randint(-6, 7, shape).double() / 4
    logits = logits.masked_fill(torch.rand(shape) < 0.25, -math.inf).masked_fill(torch.rand(shape) < nan, math.nan)
    tiles = (q_origin + rows - 1) // selection.rows - q_origin // selection.rows + 1
    table = (2, selection.lists, tiles, units)
    forced = torch.zeros(table, dtype=torch.bool) if plain else torch.rand(table) < 0.25
    allowed = torch.ones(table, dtype=torch.bool) if plain else torch.rand(table) < 0.8
    return Call(logits, lse, forced, allowed, units, q_origin, selection, tokens)


NSA = Selection(64, 1, Cells(32, 16), 2, "sum", None, "sum", 3, None, 3)
SELECTIONS = {
    "nsa": NSA,
    "infllm": Selection(64, 1, Cells(32, 16), 2, "mean", None, "max", 3, None, 3),
    "entries are units": Selection(16, 1, Cells(16, 16), 4, None, None, None, 2, None, 4),
    "tokens": Selection(8, 1, Cells(1, 1), 1, "max", None, "max", 2, None, 2),
    "mean of tokens": Selection(4, 1, Cells(1, 1), 2, "sum", None, "mean", 2, None, 2),
    "entries beyond units": Selection(16, 1, Cells(64, 16), 2, "sum", None, "sum", 2, None, 2),
    "entries with gaps": Selection(16, 1, Cells(4, 8), 2, "sum", None, "sum", 2, None, 2),
    "units across entries": Selection(24, 1, Cells(32, 16), 2, "sum", None, "max", 2, None, 2),
    "cells that begin early": Selection(32, 1, Cells(32, 16, before=16), 2, "sum", None, "sum", 2, None, 2),
    "cells just at their place": Selection(16, 1, Cells(16, 16, before=15), 2, "max", None, "mean", 2, None, 2),
    "a cell cut by the end": Selection(32, 1, Cells(24, 8, partial=True), 2, "sum", None, "sum", 2, None, 2),
    "early and cut": Selection(16, 1, Cells(12, 8, before=5, partial=True), 2, "sum", None, "sum", 2, None, 2),
    "overlapping entries as they are": Selection(8, 1, Cells(20, 8, before=3), 4, None, None, None, 2, None, 2),
    "tiles of rows": Selection(32, 4, Cells(32, 16), 2, "sum", "sum", "sum", 2, None, 2),
    "rows by max": Selection(32, 3, Cells(32, 16), 2, "mean", "max", "mean", 2, None, 2),
    "rows by mean": Selection(16, 2, Cells(16, 16), 1, "max", "mean", None, 2, None, 2),
    "more rows than there are": Selection(32, 64, Cells(32, 16), 2, "sum", "sum", "sum", 2, None, 2),
    "threshold": Selection(32, 1, Cells(32, 16), 2, "max", None, "max", None, 0.5, 4),
    "threshold of at least": Selection(32, 1, Cells(32, 16), 2, "max", None, "max", None, 0.5, 4, least=2),
    "as many at least as at most": Selection(32, 1, Cells(32, 16), 2, "sum", None, "sum", None, 1.0, 3, least=3),
    "threshold of tiles": Selection(32, 4, Cells(32, 16), 2, "max", "max", "max", None, 0.5, 2),
    "all of them": Selection(32, 1, Cells(32, 16), 2, "sum", None, "sum", 9, None, 9),
}


@pytest.mark.parametrize("probability", [False, True], ids=["logits", "probabilities"])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_the_rules(selection: Selection, probability: bool) -> None:
    for seed in range(3):
        call = random_call(seed, selection, probability=probability, plain=seed == 0)
        got = chosen_by(call)
        assert got.dtype == torch.int32
        assert got.tolist() == expected(call)


@pytest.mark.parametrize("q_origin", [0, 1, 3, 11])
def test_tiles_are_aligned_to_positions(q_origin: int) -> None:
    selection = SELECTIONS["tiles of rows"]
    call = random_call(5, selection, q_origin=q_origin, rows=9)
    assert chosen_by(call).tolist() == expected(call)


@pytest.mark.parametrize("name", ["nsa", "tiles of rows", "rows by mean", "threshold"])
def test_pieces_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    call = random_call(1, SELECTIONS[name], rows=23, q_origin=6)
    call = call._replace(logits=torch.randn(call.logits.shape))
    calls = []
    whole = chosen_by(call)
    for scores in (1, 200, 700, 1500):
        monkeypatch.setattr(module, "_SCORES_AT_ONCE", scores)
        pieces = module._pieces(
            module.ScoreShape(*call.logits.shape, call.units, call.q_origin, call.tokens), call.selection
        )
        calls.append(len(list(pieces)))
        assert torch.equal(chosen_by(call), whole)
    assert calls[0] == whole.shape[2]
    assert any(1 < count < calls[0] for count in calls)


def test_the_weights_of_the_paper() -> None:
    """Cells of 32 every 16 tokens onto units of 64: entries -1..3 of a unit weigh 1, 2, 2, 2, 1."""
    shape = module.ScoreShape(1, 1, 1, 19, 5, 0, 320)
    entries, weights = module._entries_of_units(shape, NSA, torch.device("cpu"))
    found = [
        {int(e): float(w) for e, w in zip(*row, strict=True) if e < 19} for row in zip(entries, weights, strict=True)
    ]
    assert found[0] == {0: 2, 1: 2, 2: 2, 3: 1}
    assert found[2] == {7: 1, 8: 2, 9: 2, 10: 2, 11: 1}
    assert found[4] == {15: 1, 16: 2, 17: 2, 18: 2}


def test_least_goes_from_the_level_alone_to_the_best_of_all() -> None:
    """With 0 a threshold as ever, with the room of the list the best of it, between them never fewer units."""
    call = random_call(1, SELECTIONS["threshold"], heads=2, rows=40, plain=True)
    best = chosen_by(call._replace(selection=call.selection._replace(level=None, count=4)))
    counts = []
    for least in range(5):
        found = chosen_by(call._replace(selection=call.selection._replace(least=least)))
        counts.append((found >= 0).sum(-1))
    assert torch.equal(found, best)
    assert torch.equal(counts[0], (chosen_by(call) >= 0).sum(-1))
    for least, (few, many) in enumerate(pairwise(counts)):
        assert bool((many == torch.maximum(few, (best >= 0).sum(-1).clamp(max=least + 1))).all())
        assert bool((many > few).any()) or least == 3


def test_more_forced_than_fit_keep_the_lowest() -> None:
    call = random_call(0, NSA, nan=0.0, plain=True)
    call = call._replace(forced=torch.ones_like(call.forced))
    assert bool((chosen_by(call) == torch.arange(3)).all())


def test_no_score_is_not_chosen() -> None:
    call = random_call(0, NSA, plain=True)
    for nothing in (-math.inf, math.nan):
        empty = call._replace(logits=torch.full_like(call.logits, nothing))
        assert bool((chosen_by(empty) == -1).all())
        forced = torch.zeros_like(call.forced)
        forced[..., 1] = True
        assert bool((chosen_by(empty._replace(forced=forced)) == torch.tensor([1, -1, -1])).all())


def test_an_infinite_score_is_the_best() -> None:
    logits = torch.tensor([1.0, math.inf, 2.0, math.inf, 3e38]).double().view(1, 1, 1, 5)
    none, every = torch.zeros(1, 1, 1, 5, dtype=torch.bool), torch.ones(1, 1, 1, 5, dtype=torch.bool)
    selection = Selection(4, 1, Cells(4, 4), 1, None, None, None, 3, None, 3)
    assert chosen_by(Call(logits, None, none, every, 5, 0, selection, 20)).tolist() == [[[[1, 3, 4]]]]
    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0, -0.0]).view(1, 1, 1, 5)
    assert chosen_by(Call(zeros, None, none, every, 5, 0, selection, 20)).tolist() == [[[[0, 1, 2]]]]


def test_half_precision_is_computed_in_single() -> None:
    call = random_call(3, NSA, nan=0.0)
    assert torch.equal(chosen_by(call._replace(logits=call.logits.half())), chosen_by(call))


def test_no_rows_no_entries_no_units() -> None:
    some = random_call(0, NSA, plain=True)
    none = some._replace(logits=some.logits[:, :, :0], forced=some.forced[:, :, :0], allowed=some.allowed[:, :, :0])
    assert chosen_by(none).shape == (2, 2, 0, 3)
    entries = some._replace(logits=some.logits[..., :0])
    assert bool((chosen_by(entries) == -1).all())
    empty = torch.zeros(2, 2, some.logits.shape[2], 0, dtype=torch.bool)
    assert bool((chosen_by(entries._replace(forced=empty, allowed=empty, units=0)) == -1).all())


def test_lists_of_the_caller_are_put_in_order() -> None:
    units = torch.tensor([[5, -1, 2, 5, 9, 0], [-7, -1, 8, 7, 8, 100], [3, 2, 1, 0, 2, 1]])
    assert sorted_units(units, 9).tolist() == [[0, 2, 5, -1, -1, -1], [7, 8, -1, -1, -1, -1], [0, 1, 2, 3, -1, -1]]
    assert sorted_units(units.int(), 9).dtype == torch.int32
    assert sorted_units(units[:, :0], 9).shape == (3, 0)
