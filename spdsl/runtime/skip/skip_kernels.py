"""Device functions of softmaxes that skip tiles: tiles of rows by position, the vote, what is noted and read."""

from __future__ import annotations

from typing import NamedTuple

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import LOG2E, Block, jit
from spdsl.runtime.tiles.positions import floor_div, floor_mod, row_origin
from spdsl.runtime.tiles.rows import load_qk_of, row_pointers
from spdsl.runtime.tiles.tiles import at
from spdsl.runtime.units.packed import PackedRows

_COUNTS = tl.constexpr(2)  # numbers of a slot before its bits, of which a word has 32
_WORD = tl.constexpr(32)


class Slot(NamedTuple):
    """A tile of rows: its first row, which may lie before the call's, the position of row 0, rows, and its notes."""

    row: tl.tensor
    q_origin: tl.tensor
    q_start: tl.tensor
    q_count: tl.tensor
    number: tl.tensor


class SkipTile(NamedTuple):
    """The keys of a tile, which visits count, and the blocks that it is loaded in, one or two (all tl.constexpr)."""

    BLOCK_N: tl.constexpr
    PARTS: tl.constexpr


@jit
def slot_of(call, s, q_start, q_count, tile, ROWS: tl.constexpr):
    """The `tile`-th tile of the rows of sequence s, whose bounds are positions that ROWS divides."""
    q_origin = row_origin(call, s, q_count)
    row = tile * ROWS - floor_mod(q_origin, ROWS)
    number = tile
    if call.q_spans is not None:
        number += (q_start // ROWS).to(tl.int32) + 2 * s
    return Slot(row, q_origin, q_start, q_count, number)


@jit
def voting_rows(q, slot, h, ROWS: tl.constexpr, C):
    """The rows of a tile for C.GROUP heads from h on, head after head; q from the first row of the sequence on."""
    i = tl.arange(0, C.BLOCK_M)
    lane = i % ROWS
    query = slot.row + lane
    inside = (query >= 0) & (query < slot.q_count)
    if C.GROUP * ROWS == C.BLOCK_M and C.GROUP == 1:
        heads, head = h, h
    else:
        inside = inside & (i < C.GROUP * ROWS)
        heads = h + tl.minimum(i // ROWS, C.GROUP - 1)
        head = heads[:, None]
    q0, q1 = load_qk_of(q, query, heads, inside, True, C)
    return PackedRows(q0, q1, (slot.q_origin + query)[:, None], head, query, heads, lane, inside)


@jit
def part_of_keys(keys, number, C):
    """The `number`-th block of keys; where a page is smaller, each key is found by itself (C.GATHERED)."""
    start = number * C.BLOCK_N
    i = tl.arange(0, C.BLOCK_N)
    position = (keys.origin + start + i)[None, :]
    if C.GATHERED:
        block = Block(start + i, keys.count - start - i, position)
    else:
        block = Block(number, keys.count - start, position)
    return block


@jit
def vote_room(level, C):
    """log2(min(level, 1)): how far below the maximum a row still keeps; -inf where the level is not above 0."""
    level = tl.full((), 0.0, C.ACC) + level
    return tl.where(level > 0.0, tl.log2(tl.minimum(level, 1.0)), float("-inf"))


@jit
def greatest_of(s, unit):
    """The greatest score of each row in base 2. NaN counts as infinity."""
    return tl.max(tl.where(s == s, s, float("inf")), 1) * unit


@jit
def votes_of(greatest, least, inside):
    """The vote of each row: 0 it sees nothing, 1 all is below `least`, 2 it keeps the tile. Rows that are not `inside`
    see nothing.
    """
    votes = tl.where(greatest < least, 1, 2)
    votes = tl.where(greatest == float("-inf"), 0, votes)
    return tl.where(inside, votes, 0)


@jit
def kept_step(s, unit, greatest, m, total):
    """As `softmax_step`, of scores whose greatest is known; a row with NaN becomes NaN."""
    m_new = tl.maximum(m, greatest)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * unit - shift[:, None])
    decay = tl.exp2(m - shift)
    return p, decay, m_new, total * decay + tl.sum(p, 1)


@jit
def add_sink_of_rows(acc0, acc1, m, total, sink, heads, C):
    """A sink takes its share once all keys are seen: it is in no vote."""
    logit = tl.load(sink + heads).to(C.ACC) * LOG2E
    new = tl.maximum(m, logit)
    origin = tl.where(new == float("-inf"), 0.0, new)
    decay = tl.exp2(m - origin)
    acc0 = acc0 * decay[:, None]
    if C.V1:
        acc1 = acc1 * decay[:, None]
    return acc0, acc1, new, total * decay + tl.exp2(logit - origin)


@jit
def add_bit(word, held, number, votes):
    """The word that has a bit for tile `number` of keys, and which word it is; `held` is the one before."""
    own = number // _WORD
    return tl.where(own == held, word, 0) | (tl.where(votes == 2, 1, 0) << (number % _WORD)), own


@jit
def store_word(notes, slot, s, h, own, word, C):
    """A word of the bits, for each of the heads that voted together."""
    for i in tl.static_range(C.GROUP):
        tl.store(at(notes, s, h + i, slot.number).data + _COUNTS + own, word)


@jit
def store_counts(notes, slot, s, h, kept, seen, C):
    """How many tiles were kept, and seen."""
    for i in tl.static_range(C.GROUP):
        place = at(notes, s, h + i, slot.number).data
        tl.store(place, kept)
        tl.store(place + 1, seen)


@jit
def words_of_rows(notes, call, s, h, q_start, q_origin, position, ROWS: tl.constexpr):
    """Where the bits of the tile of each row begin, in the shape of the positions."""
    slot = floor_div(position, ROWS) - floor_div(q_origin, ROWS)
    if call.q_spans is not None:
        slot += (q_start // ROWS).to(tl.int32) + 2 * s
    return at(notes, s, h, slot).data + _COUNTS


@jit
def rows_kept(words, key, inside, UNIT: tl.constexpr):
    """Of each row whether its tile was kept with the keys of the tile of `key`, 0 or 1."""
    tile = key // UNIT
    word = tl.load(words + tile // _WORD, mask=inside, other=0)
    return (word >> (tile % _WORD)) & 1


@jit
def visited_below(ranges, bound, COUNT: tl.constexpr):
    """How many blocks of the ranges lie before block `bound`."""
    found = 0
    for i in tl.static_range(COUNT):
        found += tl.maximum(tl.minimum(bound, ranges[i].end) - ranges[i].first, 0)
    return found


@jit
def store_step_counts(counts, rows, kept, seen, C):
    """Of a split of one query what each head kept and saw."""
    places = row_pointers(counts, rows.query, rows.heads)
    none = tl.zeros((C.BLOCK_M,), tl.int32)
    tl.store(places, none + kept, mask=rows.inside)
    tl.store(places + 1, none + seen, mask=rows.inside)
