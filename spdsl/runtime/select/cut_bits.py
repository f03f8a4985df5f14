"""Scores of units in memory as bits: int32 that rise with the score, above them forced units, below them all others."""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.select.ranking import score_bits
from spdsl.runtime.tiles.kernel import jit

NOT_CUT = tl.constexpr(-(2**31))  # of a unit that may not be chosen
FORCED = tl.constexpr(2**31 - 1)
LEVELS = tl.constexpr(16)  # tried in one pass


@jit
def bits_of_row(bits, tiles, list_head, row):
    """Where the bits of a list begin."""
    return bits + (tl.cast(list_head, tl.int64) * tiles.rows + row) * tiles.width


@jit
def store_bits(bits, tiles, list_head, row, score, may, forced, unit, mask):
    """The bits of units [rows, RANKS] as they are scored; `may`: those that have a score, and pass."""
    score = score.to(tl.float32) + 0.0  # -0.0 is no lower than 0.0
    may = may & (score == score) & (score > float("-inf"))
    found = tl.where(forced, FORCED, tl.where(may, score_bits(score), NOT_CUT))
    tl.store(bits_of_row(bits, tiles, list_head, row)[:, None] + unit[None, :], found, mask=mask)


@jit
def load_bits(own, unit, end, S):
    """The bits of units; all forced ones have the same."""
    found = tl.load(own + unit, mask=unit < end, other=NOT_CUT)
    return tl.where(found >= 0, FORCED, found) if S.PART > 0 else found


@jit
def units_above(own, end, levels, S):
    """How many of the units before `end` have bits above each of `levels`."""
    count = tl.zeros((LEVELS,), dtype=tl.int32)
    for first in tl.range(0, end, S.CHUNK):
        found = load_bits(own, first + tl.arange(0, S.CHUNK), end, S)
        count += tl.sum((found[:, None] > levels[None, :]).to(tl.int32), 0)
    return count
