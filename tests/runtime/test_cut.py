"""Lists that are cut from scores in memory: those that torch makes by sorting."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spdsl.runtime.entries.entries import Cells
from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import launch, strided
from spdsl.runtime.select.choose import Selection, _chosen
from spdsl.runtime.select.cut import CutConst, CutTiles, cut_lists
from spdsl.runtime.select.cut_bits import NOT_CUT
from spdsl.runtime.select.cut_launch import level_bits
from spdsl.runtime.tiles.kernel import Call
from spdsl.runtime.tuning.unit_configs import cut_pieces

pytestmark = pytest.mark.usefixtures("poisoned")
UNIT, FORCED = 16, 2**31 - 1


class Rule(NamedTuple):
    most: int
    level: float | None = None
    least: int = 0


def bits_of(scores: Tensor, forced: Tensor, rule: Rule) -> Tensor:
    """What the scoring kernel stores: numbers that rise with the score; without `least` none below the level."""
    bits = (scores + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    none = scores.isnan() | (scores == -torch.inf)
    if rule.level is not None and not rule.least:
        none = none | (scores < rule.level)
    return bits.masked_fill(none, NOT_CUT.value).masked_fill(forced, FORCED)


def constants(rule: Rule, rows: int, lanes: int, chunk: int, causal: bool) -> CutConst:
    passing = level_bits(rule.level) - 1 if rule.level is not None and rule.least else NOT_CUT.value
    values = (UNIT, rows, lanes, 16, rule.least, passing, 1, 0, 1, 1, causal, chunk, 0.0, False, False, 1)
    return CutConst(*(tl.constexpr(value) for value in values))


def cut_by_kernel(bits: Tensor, rule: Rule, tokens: int, chunk: int = 256) -> Tensor:
    """Lists of bits [B, H, N, units] in tiles of 4 queries, the last of which stands at the last token."""
    batch, heads, queries, units = bits.shape
    tiles = -(-queries // 4)
    rows = torch.full((heads, batch, tiles * 4, units), 7, dtype=torch.int32)
    rows[:, :, :queries] = bits.transpose(0, 1)
    found = torch.empty(batch, heads, queries, rule.most, dtype=torch.int32)
    call = Call(queries, tokens, None, None, None, None, tl.constexpr(False))
    launch(
        cut_lists, (batch * tiles * 4, heads), rows, strided(found), call,
        CutTiles(None, tiles, batch, 0, batch * tiles * 4, units, rule.most), constants(rule, 1, 4, chunk, False),
        num_warps=1, num_stages=1,
    )  # fmt: skip
    return found


def wanted(scores: Tensor, forced: Tensor, rule: Rule) -> Tensor:
    count = rule.most if rule.level is None else None
    return _chosen(
        scores, forced, Selection(UNIT, 1, Cells(1, 1), 1, None, None, None, count, *rule[1::-1], rule.least)
    )


def random_scores(kind: str, shape: tuple[int, ...], make: torch.Generator) -> tuple[Tensor, Tensor]:
    scores = torch.randn(shape, generator=make)
    if kind == "ties":
        scores = (scores * 2).round() / 2  # -0.0 among them
    elif kind == "one value":
        scores = torch.full(shape, -0.25)
    elif kind == "two close values":
        scores = torch.where(scores > 0, 1.0, torch.tensor(1.0).nextafter(torch.tensor(2.0)))
    elif kind == "wide":
        scores = scores.sign() * torch.exp(20 * scores)
    none = torch.rand(shape, generator=make)
    scores = scores.masked_fill(none < 0.1, -torch.inf).masked_fill(none > 0.98, torch.nan)
    scores = scores.masked_fill((none > 0.5) & (none < 0.51), torch.inf)
    return scores, torch.rand(shape, generator=make) < 0.02


RULES = {
    "top_k": Rule(257),
    "few": Rule(3),
    "all": Rule(5000),
    "threshold": Rule(300, 0.5),
    "every unit that passes": Rule(2000, -0.5),
    "at least": Rule(280, 1.5, 270),
    "at least of all": Rule(2000, 0.25, 40),
    "at least, below zero": Rule(400, -1.0, 2),
    "nothing passes": Rule(40, 1e30, 0),
    "a level of zero": Rule(500, 0.0, 7),
}
KINDS = ("normal", "ties", "one value", "two close values", "wide")


@pytest.mark.interpret
@pytest.mark.parametrize("units", [257, 1000, 2500])
@pytest.mark.parametrize("name", RULES)
def test_lists_are_those_of_a_sort(name: str, units: int) -> None:
    rule, make = RULES[name], torch.Generator().manual_seed(units)
    chunk = 1024 if units > 1000 else 256
    for kind in KINDS:
        scores, forced = random_scores(kind, (1, 2, 3, units), make)
        found = cut_by_kernel(bits_of(scores, forced, rule), rule, units * UNIT - 3, chunk)
        assert torch.equal(found, wanted(scores, forced, rule)), kind


@pytest.mark.interpret
@pytest.mark.parametrize("seed", range(6))
def test_every_size_of_list_and_row(seed: int) -> None:
    """Short rows, so that the cut falls on every place of a tie and of a chunk."""
    make = torch.Generator().manual_seed(seed)
    for units in (1, 2, 15, 16, 17, 33, 40):
        for most in (1, 2, 7, 16, 39):
            rule = [Rule(most), Rule(most, 0.5), Rule(most, 0.5, min(most, 3))][(units + most + seed) % 3]
            scores, forced = random_scores(KINDS[seed % 5], (1, 1, 2, units), make)
            found = cut_by_kernel(bits_of(scores, forced, rule), rule, units * UNIT, 16)
            assert torch.equal(found, wanted(scores, forced, rule)), (units, rule)


@pytest.mark.interpret
def test_two_runs_are_equal_and_write_their_lists_only() -> None:
    rule, make = Rule(30), torch.Generator().manual_seed(0)
    scores, forced = random_scores("ties", (2, 2, 5, 60), make)
    bits = bits_of(scores, forced, rule)
    assert torch.equal(cut_by_kernel(bits, rule, 960), cut_by_kernel(bits, rule, 960, 16))


@pytest.mark.interpret
@pytest.mark.parametrize("rows", [2, 5, 16, 24])
def test_a_tile_of_queries_has_one_list(rows: int) -> None:
    """Of packed sequences, one of them empty: every query of a tile has the list of its tile, no other is written."""
    rule, make = Rule(3), torch.Generator().manual_seed(rows)
    counts = torch.tensor([37, 0, 5, 41])
    starts = counts.cumsum(0) - counts
    each = (counts + 2 * rows - 2) // rows
    many, units = int(each.sum()) + 3, -(-41 // UNIT)
    scores, forced = random_scores("ties", (1, 1, many, units), make)
    spans = torch.stack([starts, counts], 1).int()
    found = torch.full((1, 1, 86, 3), -7, dtype=torch.int32)
    tiles = CutTiles((each.cumsum(0) - each).int(), 0, 4, 0, many, units, rule.most)
    call = Call(86, 86, spans, spans, None, None, tl.constexpr(False))
    launch(
        cut_lists, (many, 1), bits_of(scores, forced, rule)[0].contiguous(), strided(found, 4), call, tiles,
        constants(rule, rows, 16, 16, True), num_warps=1, num_stages=1,
    )  # fmt: skip
    row = 0
    for s, count in enumerate(counts.tolist()):
        for i in range(count):
            tile = i // rows
            seen = min(-(-count // UNIT), ((tile + 1) * rows - 1) // UNIT + 1)
            own = int(each[:s].sum()) + tile
            one = wanted(scores[:, :, own : own + 1, :seen], forced[:, :, own : own + 1, :seen], rule)
            assert torch.equal(found[0, 0, row], one[0, 0, 0]), (s, i)
            row += 1
    assert found[0, 0, row:].eq(-7).all()


@pytest.mark.parametrize("scores", [1, 7, 5000, 1 << 22, 1 << 28])
@pytest.mark.parametrize("tiles", [0, 1, 15, 16, 17, 100])
def test_pieces_hold_every_tile_once(tiles: int, scores: int) -> None:
    for interpreted in (False, True):
        pieces = list(cut_pieces(tiles, scores, interpreted))
        assert [i for first, end in pieces for i in range(first, end)] == list(range(tiles))
        most = pieces[0][1] if pieces else 0
        assert most == 1 or 4 * scores * most <= 1 << 28
        assert all(first % 16 == 0 for first, _ in pieces) or most < 16


@pytest.mark.parametrize("level", [0.0, -0.0, 0.1, -0.1, 1e-30, -3e38, 1.0])
def test_the_bits_of_a_level(level: float) -> None:
    x = torch.tensor([level]) + 0.0
    bits = x.view(torch.int32)
    assert level_bits(level) == int(bits ^ ((bits >> 31) & 0x7FFFFFFF))
