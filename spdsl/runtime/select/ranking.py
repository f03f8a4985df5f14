"""The best units of a list as they are scored, in registers.

A unit is ranked by one integer: its score's bits, made to rise with the score, above its number, made to fall: of equal
scores the lowest number wins. Forced units stand above every score. Where a list takes some units below its level, the
bit between score and number tells those that are not. Where it takes a part of all mass, its units are summed in this
order, behind the forced ones, whose mass is kept beside the ranks.
"""

from __future__ import annotations

from typing import NamedTuple

from spdsl.runtime.language import tl
from spdsl.runtime.select.limits import least_of, level_of, limits_of, most_of
from spdsl.runtime.tiles.kernel import jit
from spdsl.runtime.tiles.tiles import at, token_pointer

NOT_RANKED = tl.constexpr(-(2**63))
_LAST = tl.constexpr(2**31 - 1)


class SelectConst(NamedTuple):
    """What a selecting kernel is compiled for (all tl.constexpr)."""

    UNIT: tl.constexpr  # keys of a unit
    LANES: tl.constexpr  # queries of a program
    RANKS: tl.constexpr  # units scored at once
    KEPT: tl.constexpr  # power of two >= WIDTH
    STAGES: tl.constexpr  # its logarithm
    WIDTH: tl.constexpr  # most units of a list
    LEAST: tl.constexpr  # places of a list that a unit takes without passing
    RATIO: tl.constexpr  # entries from one unit to the next
    FIRST: tl.constexpr  # entries from a unit's own first to the first that overlaps it
    ENTRIES: tl.constexpr  # that overlap a unit
    SPLITS: tl.constexpr  # programs that share the units of a query; more than one with one query per sequence only
    ROOM: tl.constexpr  # numbers of a split: its ranks, and its mass where lists go by mass
    PART: tl.constexpr  # of all mass that a list takes; 0: lists do not go by mass
    BELOW: tl.constexpr  # whether that is the most it may be, or the least


class Mass(NamedTuple):
    """Of the candidates of lists so far [LANES]: the mass of all, and of the forced ones."""

    total: tl.tensor
    forced: tl.tensor


@jit
def shared_tokens(entry, unit, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr, length, S):
    """How many tokens entries and units have in common, where a last cell ends with its sequence."""
    first = entry * STRIDE - BEFORE
    end = tl.minimum(tl.minimum(first + WIDTH, (unit + 1) * S.UNIT), length)
    return tl.maximum(end - tl.maximum(first, unit * S.UNIT), 0)


@jit
def there(rows, S, C):
    """Which rows are a head of the list: all of them, if their number is a power of two."""
    return tl.full((1, 1), True, tl.int1) if C.BLOCK_M // S.LANES == C.GROUP else rows.inside[:, None]


@jit
def of_list_head(value, seen, BY: tl.constexpr, S, C):
    """Values [LANES * heads, RANKS] reduced over the score heads of a list that have one -> [LANES, RANKS]."""
    HEADS: tl.constexpr = C.BLOCK_M // S.LANES
    if BY == "max":
        broken = tl.reshape((seen & (value != value)).to(tl.int32), (S.LANES, HEADS, S.RANKS))  # tl.max passes by NaN
        value = tl.max(tl.reshape(tl.where(seen, value, float("-inf")), (S.LANES, HEADS, S.RANKS)), 1)
        value = tl.where(tl.max(broken, 1) > 0, float("nan"), value)
    else:
        value = tl.sum(tl.reshape(tl.where(seen, value, 0.0), (S.LANES, HEADS, S.RANKS)), 1)
        if BY == "mean":
            value = value / C.GROUP
    return value


@jit
def heads_that_see(seen, S, C):
    """How many heads of a list have which pairs [LANES * heads, RANKS] -> [LANES, RANKS]."""
    return tl.sum(tl.reshape(seen.to(tl.int32), (S.LANES, C.BLOCK_M // S.LANES, S.RANKS)), 1)


@jit
def score_bits(score):
    """float32 -> the int32 that rises with it."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def no_mass(S):
    return Mass(tl.zeros((S.LANES,), tl.float32), tl.zeros((S.LANES,), tl.float32))


@jit
def more_mass(mass, score, scored, forced):
    """The mass with that of the units just scored."""
    score = score.to(tl.float32)
    score = tl.where(scored & (score > 0), score, 0.0)  # NaN is no score
    return Mass(mass.total + tl.sum(score, 1), mass.forced + tl.sum(tl.where(forced, score, 0.0), 1))


@jit
def ranked(best, score, scored, passed, forced, unit, S):
    """The KEPT best of `best` and of the units just scored, falling."""
    score = score.to(tl.float32)
    scored = scored & (score == score) & (score > float("-inf"))
    if S.LEAST == 0:
        scored = scored & passed
    bits = tl.where(forced, _LAST, tl.minimum(score_bits(score), _LAST - 1))
    rank = (bits.to(tl.int64) << 32) | (-unit + _LAST).to(tl.int64)[None, :]
    if S.LEAST:
        rank = rank | ((passed | forced).to(tl.int64) << 31)
    rank = tl.where(scored | forced, rank, NOT_RANKED)
    if tl.max((tl.max(rank, 1) > tl.min(best, 1)).to(tl.int32), 0) > 0:
        best = better(best, tl.topk(rank, S.KEPT), S.LANES, S.KEPT, S.STAGES)
    return best


# `better` for rows of 4:  9 7 4 1  and  8 5 3 2
# the second turned         2 3 5 8
# the greater of each two   9 7 5 8   the four best of all eight: they fall, then they rise
# halves  9 7 | 5 8         9 5 8 7   greater and less of 9 and 5, then greater and less of 7 and 8
# halves  9 5 | 8 7         9 8 7 5   greater and less of 9 and 8, then greater and less of 5 and 7: they fall
# A row of KEPT takes STAGES = log2(KEPT) such steps; a sort of it from nothing takes STAGES * (STAGES + 1) / 2.


@jit
def better(best, other, LANES: tl.constexpr, KEPT: tl.constexpr, STAGES: tl.constexpr):
    """The KEPT best of two tiles [LANES, KEPT] of falling ranks, falling.

    Falling meets rising: the greater of each two are the best of all, and rise once and fall once. Such a row is sorted
    by comparing its halves, STAGES times, with their results shuffled as cards are.
    """
    best = tl.maximum(best, tl.flip(other, 1))
    for _ in tl.static_range(STAGES):
        first, second = tl.split(tl.permute(tl.reshape(best, (LANES, 2, KEPT // 2)), (0, 2, 1)))
        best = tl.reshape(tl.join(tl.maximum(first, second), tl.minimum(first, second)), (LANES, KEPT))
    return best


@jit
def of_mass(best, mass, part, S):
    """Which of falling ranks a part of the mass of all takes, where the forced ones hold theirs."""
    bits = (best >> 32).to(tl.int32)
    own = tl.where((best != NOT_RANKED) & (bits != _LAST), bits, 0).to(tl.float32, bitcast=True)  # of a score >= 0
    upto = tl.cumsum(own, 1) + mass.forced[:, None]
    wanted, total = part * mass.total[:, None], mass.total[:, None]
    enough = upto <= wanted if S.BELOW else upto - own < wanted
    return ((own > 0) & (enough | (wanted >= total))) | (bits == _LAST)


@jit
def store_units(chosen, best, query, q_count, S, limits=None, mass=None):
    """The first WIDTH of `best`, from LEAST on those that passed, as unit numbers: ascending, -1 behind them.

    limits: those of the list where only the call knows them. mass: of the candidates, where lists go by it.
    """
    place = tl.arange(0, S.KEPT)[None, :]
    taken = (best != NOT_RANKED) & (place < S.WIDTH)
    if limits is not None:
        taken = taken & (place < most_of(limits))
    if S.PART > 0:
        part = tl.full((), S.PART, tl.float32) if limits is None else level_of(limits).to(tl.float32)
        least = S.LEAST if limits is None else least_of(limits)
        taken = taken & (of_mass(best, mass, part, S) | (place < least))
    elif S.LEAST:
        if limits is None:
            taken = taken & ((place < S.LEAST) | (((best >> 31) & 1) != 0))
        else:
            taken = taken & ((place < least_of(limits)) | (((best >> 31) & 1) != 0))
    unit = -(best & _LAST).to(tl.int32) + _LAST
    unit = tl.sort(tl.where(taken, unit, _LAST))
    unit = tl.where(unit == _LAST, -1, unit)
    pointers = token_pointer(chosen, 0) + query.to(tl.int64)[:, None] * chosen.token + place
    tl.store(pointers, unit, mask=(query[:, None] < q_count) & (place < S.WIDTH))


@jit
def store_ranks(ranks, best, row, split, S, mass=None):
    """The ranks of one split in the buffer [rows, SPLITS, ROOM], and behind them its mass."""
    place = tl.arange(0, S.KEPT)[None, :] + tl.zeros_like(best).to(tl.int32)
    own = ranks + (row.to(tl.int64) * S.SPLITS + split) * S.ROOM
    tl.store(own + place, best)
    if S.PART > 0:
        total, forced = tl.max(mass.total, 0), tl.max(mass.forced, 0)  # of the one query
        tl.store(own + S.KEPT, (_bits_of(total) << 32) | _bits_of(forced))


@jit
def _bits_of(mass):
    return mass.to(tl.int32, bitcast=True).to(tl.int64)  # it is not below 0


@jit
def _split_mass(own, S):
    """What `store_ranks` put behind the ranks of a split."""
    both = tl.load(own + S.KEPT)
    total, forced = (both >> 32).to(tl.int32), both.to(tl.int32)
    return total.to(tl.float32, bitcast=True), forced.to(tl.float32, bitcast=True)


@jit
def merge_ranks(ranks, chosen, S, limits=None):
    """The best units of one query over all splits.  Grid (sequences, lists)."""
    s, list_head = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, S.KEPT)[None, :]
    row = (s.to(tl.int64) * tl.num_programs(1) + list_head) * S.SPLITS
    best = tl.full((1, S.KEPT), NOT_RANKED, tl.int64)
    total, forced = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for split in tl.range(0, S.SPLITS):
        own = ranks + (row + split) * S.ROOM
        best = better(best, tl.load(own + place), 1, S.KEPT, S.STAGES)  # falling, as it was kept
        if S.PART > 0:
            own_total, own_forced = _split_mass(own, S)
            total, forced = total + own_total, forced + own_forced
    if limits is not None:
        limits = limits_of(limits, s, list_head)
    store_units(at(chosen, s, list_head, 0), best, tl.arange(0, 1), 1, S, limits, Mass(total, forced))
