"""Device functions over positions: division, membership in a unit, where a sequence lies or a cache keeps a token."""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import jit


@jit
def floor_div(a, b):
    """a // b toward minus infinity, b > 0 (Triton's // rounds toward zero)."""
    return tl.where(a < 0, -((b - 1 - a) // b), a // b)


@jit
def floor_mod(a, b):
    return a - floor_div(a, b) * b


@jit
def member(units, head, tile, k, UNIT: tl.constexpr, tiles, most):
    """Entry (head, tile, k // UNIT) of a membership map [heads, tiles, most], 0 outside; k is one block of positions.

    A block that is no longer than a unit meets two units at most: two loads for each row then do for a whole tile.
    """
    unit = floor_div(k, UNIT)
    if k.shape[0] * k.shape[1] <= UNIT:
        first = tl.min(unit)
        here = member_of(units, head, tile, first, tiles, most)
        found = tl.where(unit == first, here, member_of(units, head, tile, first + 1, tiles, most))
    else:
        found = member_of(units, head, tile, unit, tiles, most)
    return found


@jit
def member_of(units, head, tile, unit, tiles, most):
    # The interpreter makes integers of one bool that meets a block, of bools or of pointers, and triton 3.9 refuses
    # those as a mask: so all that the pointer depends on is compared, and the result once more.
    inside = (head >= 0) & (tile >= 0) & (tile < tiles) & (unit >= 0) & (unit < most)
    row = tl.cast(head, tl.int64) * tiles + tile
    return tl.load(units + row * most + unit, mask=inside != 0, other=0)


@jit
def span(spans, s, count):
    """-> (start, count) of sequence s; without spans every sequence starts at 0 and has `count` tokens."""
    start = tl.full((), 0, tl.int64)
    if spans is not None:
        start = tl.load(spans + 2 * s).to(tl.int64)
        count = tl.load(spans + 2 * s + 1)
    return start, count


@jit
def row_origin(call, s, q_count):
    """Position of row 0. By default the last row stands at the last token."""
    _, k_count = span(call.k_spans, s, call.k_count)
    origin = k_count - q_count
    if call.q_offset is not None:
        origin = call.q_offset
    if call.q_origins is not None:
        origin = tl.load(call.q_origins + s)
    return origin


@jit
def row_of_position(call, s):
    """-> the row of the call where position 0 of sequence s is, or would be; the position behind its last row."""
    row, count = span(call.q_spans, s, call.q_count)
    origin = row_origin(call, s, count)
    return row - origin, origin + count


@jit
def row_of(call, s):
    """The row of sequence s in what a cache has of each, if a call has only some of its rows."""
    row = s
    if call.row_of is not None:
        row = tl.load(call.row_of + s)
    return row


@jit
def cached_homes(call, s, position, there, PAGE: tl.constexpr):
    """Home (page or sequence) and slot of cached tokens, and whether they have one."""
    home, slot = tl.zeros_like(position) + s, position
    if PAGE:
        page = tl.cast(s, tl.int64) * call.page_width + position // PAGE
        home = tl.load(call.pages + page, mask=there, other=-1).to(tl.int64)
        there, slot = there & (home >= 0), position % PAGE
    return home, slot, there


@jit
def cached_rows(store, h, home, slot):
    """Where the rows (home, slot) of a head begin."""
    return store.data + (tl.cast(h, tl.int64) * store.head + home * store.batch + slot * store.token)
