"""How many units of a list a part of all mass takes, from their scores in memory.

Scores are probabilities, so the sign of their bits is free: without it a unit is forced. The bits still rise with the
score within either kind, and what a unit adds to the mass can be read from them. With the scores 3 1 4 1 2, the first
one forced, and three fourths of all mass, 8.25:

    mass above 4: 3    above 2: 7    above 1: 9     so all above 1 are taken, and none of those at 1 but as lack
    cut 2, above it 7, at it one unit of 2: it is needed too; three units in all
"""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.select.cut_bits import FORCED, LEVELS, NOT_CUT, bits_of_row, units_above
from spdsl.runtime.select.ranking import score_bits
from spdsl.runtime.tiles.kernel import jit

_NO_MASS = tl.constexpr(-(2**31) + 1)  # of a unit with a score of 0 that is not forced


@jit
def store_mass_bits(bits, tiles, list_head, row, score, may, forced, unit, mask):
    """As `store_bits`, for lists that go by mass."""
    score = score.to(tl.float32)
    may = may & (score == score) & (score > float("-inf"))
    own = score_bits(tl.where(may, tl.maximum(score, 0.0), 0.0))
    found = tl.where(forced, own, tl.where(may, own + _NO_MASS, NOT_CUT))
    tl.store(bits_of_row(bits, tiles, list_head, row)[:, None] + unit[None, :], found, mask=mask)


@jit
def mass_of(bits):
    """What units add to the mass."""
    own = tl.where(bits >= 0, bits, tl.where(bits == NOT_CUT, 0, bits - _NO_MASS))
    return own.to(tl.float32, bitcast=True)


@jit
def mass_above(own, end, levels, S):
    """The mass of the units before `end` that have bits above each of `levels`."""
    total = tl.zeros((LEVELS,), dtype=tl.float32)
    for first in tl.range(0, end, S.CHUNK):
        unit = first + tl.arange(0, S.CHUNK)
        found = tl.load(own + unit, mask=unit < end, other=NOT_CUT)
        total += tl.sum(tl.where(found[:, None] > levels[None, :], mass_of(found)[:, None], 0.0), 0)
    return total


@jit
def count_of_mass(own, end, part, S):
    """How many of the best units the part takes, the forced ones among them."""
    i = tl.arange(0, LEVELS)
    counts = units_above(own, end, tl.where(i == 0, _NO_MASS, -1), S)
    positive, count = tl.max(counts, 0), tl.min(counts, 0)
    total = tl.max(mass_above(own, end, tl.where(i == 0, NOT_CUT, FORCED), S), 0)
    if part >= 1:
        count = positive
    elif (part > 0) & (total > 0):
        wanted = part * total
        cut = tl.full((), NOT_CUT, tl.int32)  # always: what lies above is more mass than is wanted, or as much
        for digit in tl.range(0, 8):
            shift = 28 - 4 * digit
            mass = mass_above(own, end, cut + (i << shift), S)
            enough = mass > wanted if S.BELOW else mass >= wanted
            cut += (tl.sum(enough.to(tl.int32), 0) - 1) << shift
        if cut < 0:  # else the forced units are enough
            count = _count_at(own, end, cut, wanted, S)
    return count


@jit
def _count_at(own, end, cut, wanted, S):
    """Units above the cut's next bits, and as many of those at it as the wanted mass takes."""
    levels = cut + (tl.arange(0, LEVELS) == 0).to(tl.int32)
    mass = tl.min(mass_above(own, end, levels, S), 0)
    counts = units_above(own, end, levels, S)
    above, equal = tl.min(counts, 0), tl.max(counts, 0) - tl.min(counts, 0)
    lacking = (wanted - mass) / mass_of(cut + 1)
    if S.BELOW:
        more = tl.minimum(tl.floor(lacking).to(tl.int32), equal)
    else:
        more = tl.minimum(tl.maximum(tl.ceil(lacking).to(tl.int32), 1), equal)
    return above + tl.maximum(more, 0)
