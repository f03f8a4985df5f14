"""Lists of any length: the score of every unit in memory as bits that can be compared, and where each list is cut.

A score becomes the int32 that rises with it. Forced units have the greatest, units that may not be chosen the least.
A list takes the `wanted` greatest; of equal bits the lowest units. The least bits that still get in are found exactly,
four bits of them in a pass over the list, each by counting the units above 16 levels:

    bits   7 3 9 3 3 1      wanted 3      above 3: two units, above 2: five
    cut    3                              so both above 3 get in, and the first of those at 3
    list   0 1 2

Where lists take a part of all mass, scores are probabilities: their sign bit is free and says what is forced, so that
the mass of what is above a level can be summed from the bits. How many units that makes is found like the cut
(`cut_mass.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spdsl.runtime.language import tl
from spdsl.runtime.select.cut_bits import FORCED, LEVELS, NOT_CUT, bits_of_row, load_bits, units_above
from spdsl.runtime.select.cut_mass import count_of_mass
from spdsl.runtime.select.limits import least_of, level_of, limits_of, most_of
from spdsl.runtime.select.ranking import score_bits
from spdsl.runtime.tiles.blocks import sequence_length
from spdsl.runtime.tiles.kernel import jit
from spdsl.runtime.tiles.positions import floor_div, row_origin, span
from spdsl.runtime.tiles.tiles import at, token_pointer


class CutConst(NamedTuple):
    """What the kernels of a choice that is cut are compiled for (all tl.constexpr)."""

    UNIT: tl.constexpr  # keys of a unit
    ROWS: tl.constexpr  # queries that choose together: those with one position // ROWS
    LANES: tl.constexpr  # queries of a product
    RANKS: tl.constexpr  # units scored at once
    LEAST: tl.constexpr  # places of a list that a unit takes without passing
    PASSING: tl.constexpr  # bits above which a score passes
    RATIO: tl.constexpr  # entries from one unit to the next
    FIRST: tl.constexpr  # entries from a unit's own first to the first that overlaps it
    ENTRIES: tl.constexpr  # that overlap a unit
    SPLITS: tl.constexpr  # programs that share the units of a tile
    CAUSAL: tl.constexpr  # whether units that begin after a list's last query are out of the question
    CHUNK: tl.constexpr  # units of a list that are looked at at once
    PART: tl.constexpr  # of all mass that a list takes; 0: lists do not go by mass
    BELOW: tl.constexpr  # whether that is the most it may be, or the least


class CutTiles(NamedTuple):
    """The tiles begin.. of a call, numbered over all sequences: lists of LANES queries, or one of ROWS.

    Their bits are [list heads, rows, width]; a list has `most` units at the most.
    """

    first: torch.Tensor | None  # int32 [S]: the number of a sequence's first tile; None: each has `each`
    each: int
    sequences: int
    begin: int
    rows: int
    width: int
    most: int


class CutRows(NamedTuple):
    """The rows of one tile: `count` of them from row `begin` of sequence s on; `origin` is the position of the first.

    `last` is the position whose units all of its lists may name.
    """

    s: tl.tensor
    begin: tl.tensor
    count: tl.tensor
    origin: tl.tensor
    last: tl.tensor
    start: tl.tensor  # of the sequence's rows


@jit
def cut_rows(tiles, number, call, S):
    """The rows of tile `number` of a piece; no rows (or less) behind the last tile of a sequence."""
    number = tiles.begin + number
    if tiles.first is None:
        s, tile = number // tiles.each, number % tiles.each
    else:
        s = -1
        for first in tl.range(0, tiles.sequences, 256):
            i = first + tl.arange(0, 256)
            begin = tl.load(tiles.first + i, mask=i < tiles.sequences, other=2**31 - 1)
            s += tl.sum((begin <= number).to(tl.int32), 0)
        tile = number - tl.load(tiles.first + s)
    start, q_count = span(call.q_spans, s, call.q_count)
    q_origin = row_origin(call, s, q_count)
    if S.ROWS == 1:
        begin = tile * S.LANES
        count = tl.minimum(q_count - begin, S.LANES)
        last = q_origin + begin + count - 1
    else:
        tile += floor_div(q_origin, S.ROWS)
        last = (tile + 1) * S.ROWS - 1
        begin = tl.maximum(last + 1 - S.ROWS - q_origin, 0)
        count = tl.minimum(last + 1 - q_origin, q_count) - begin
    return CutRows(s, begin, count, q_origin + begin, last, start)


@jit
def cut_end(length, last, S):
    """Units that the lists of a tile may name."""
    end = tl.cdiv(length, S.UNIT)
    if S.CAUSAL:
        end = tl.minimum(end, tl.maximum(last, -1) // S.UNIT + 1)
    return end


@jit
def pool_rows(total, count, value, seen, BY: tl.constexpr):
    """Scores [LANES, RANKS] where they are seen, added to the sums or maxima of the rows before, and their number."""
    if BY == "max":
        total = tl.maximum(total, tl.where(seen, value, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    else:
        total += tl.where(seen, value, 0.0)
    return total, count + seen.to(tl.int32)


@jit
def of_pooled(total, count, BY: tl.constexpr):
    """-> the score of a tile [1, RANKS], and where it has one."""
    count = tl.sum(count, 0)[None, :]
    if BY == "max":
        broken = tl.max((total != total).to(tl.int32), 0) > 0  # tl.max passes by NaN
        total = tl.where(broken, float("nan"), tl.max(total, 0))[None, :]
    else:
        total = tl.sum(total, 0)[None, :]
        if BY == "mean":
            total = total / tl.maximum(count, 1)
    return total, count > 0


@jit
def cut_of(own, end, most, least, passing_bits, part, S):
    """-> the bits above which every unit is taken, how many of those at these bits are, and how many are in all."""
    i = tl.arange(0, LEVELS)
    count = units_above(own, end, tl.where(i == 0, NOT_CUT, passing_bits), S)
    known, passing = tl.max(count, 0), tl.min(count, 0)
    if S.PART > 0:
        passing = count_of_mass(own, end, part, S)
    wanted = tl.minimum(tl.maximum(passing, tl.minimum(known, least)), most)
    cut, ties = tl.where(wanted == passing, passing_bits, NOT_CUT), 0
    searched = (wanted != passing) & (wanted != known)
    if S.PART > 0:  # what passes is no level, but a number
        cut, searched = tl.full((), NOT_CUT, tl.int32), wanted != known
    if searched:
        cut = tl.full((), NOT_CUT, tl.int32)  # always: more than are wanted, or as many, lie above
        for digit in tl.range(0, 8):
            shift = 28 - 4 * digit
            enough = units_above(own, end, cut + (i << shift), S) >= wanted
            cut += (tl.sum(enough.to(tl.int32), 0) - 1) << shift
        cut += 1
        ties = wanted - tl.max(units_above(own, end, cut + tl.zeros_like(i), S), 0)
    return tl.where(wanted == 0, FORCED, cut), ties, wanted  # no bits are above FORCED; digits end behind it


@jit
def _constant_part(S):
    return S.PART + tl.zeros((), tl.float32)


@jit
def cut_lists(bits, chosen, call, tiles, S, limits=None):
    """One program: the units of one list, ascending, -1 behind them.  Grid (rows of bits, list heads).

    The list of a tile of ROWS is written for each of its queries. limits: where only the call knows them.
    """
    row, list_head = tl.program_id(0), tl.program_id(1)
    rows = cut_rows(tiles, row if S.ROWS > 1 else row // S.LANES, call, S)
    lane = 0 if S.ROWS > 1 else row % S.LANES
    if lane >= rows.count:
        return
    own = bits_of_row(bits, tiles, list_head, row)
    end = cut_end(sequence_length(call, rows.s), rows.last, S)
    if limits is None:
        cut, ties, wanted = cut_of(own, end, tiles.most, S.LEAST, S.PASSING, _constant_part(S), S)
    else:
        limits = limits_of(limits, rows.s, list_head)
        level = level_of(limits).to(tl.float32)
        cut, ties, wanted = cut_of(own, end, most_of(limits), least_of(limits), score_bits(level) - 1, level, S)
    chosen = at(chosen, rows.s, list_head, rows.start + rows.begin + lane)
    count = rows.count if S.ROWS > 1 else 1
    taken, equal = 0, 0
    for first in tl.range(0, end, S.CHUNK):
        unit = first + tl.arange(0, S.CHUNK)
        found = load_bits(own, unit, end, S)
        tie = (found == cut).to(tl.int32)
        own_taken = ((found > cut) | ((tie > 0) & (tl.cumsum(tie, 0) + equal <= ties))).to(tl.int32)
        _store_list(chosen, count, taken + tl.cumsum(own_taken, 0) - 1, unit, own_taken > 0)
        taken += tl.sum(own_taken, 0)
        equal += tl.sum(tie, 0)
    for first in tl.range(wanted, tiles.most, S.CHUNK):
        place = first + tl.arange(0, S.CHUNK)
        _store_list(chosen, count, place, tl.full((S.CHUNK,), -1, tl.int32), place < tiles.most)


@jit
def _store_list(chosen, count, place, unit, mask):
    """Units at places of a list that `count` queries have."""
    for i in tl.range(0, count):
        tl.store(token_pointer(chosen, i) + place, unit, mask=mask)
