"""Device functions for the gradient of what a bias reads: sums over a tile, and where a program keeps its own."""

from __future__ import annotations

from typing import NamedTuple

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import RowGrads, jit
from spdsl.runtime.tiles.tiles import load_lse, load_row_values, load_v, token_pointer
from spdsl.runtime.units.packed import load_packed_lse, load_packed_v, load_packed_values


class Table(NamedTuple):
    """What a kernel is compiled for that sums a table (all tl.constexpr)."""

    ENTRIES: tl.constexpr  # of one head
    TOTAL: tl.constexpr  # of all heads of a program
    CHUNK: tl.constexpr  # that a program keeps in registers
    CHUNKS: tl.constexpr
    DISTANCES: tl.constexpr  # of the pairs of a tile, and some more: a power of two
    STEP: tl.constexpr  # of them that are added at once


@jit
def above(a, b):
    """The derivative of max(a, b) by a: both sides have a half of a tie, as in torch."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@jit
def load_row_grads(dout, lse, delta, row, left, C):
    """What the backward knows of rows `row`.. of one head, of which `left` are there."""
    dout0, dout1 = load_v(token_pointer(dout, row), dout.token, left, C.BLOCK_M, True, C)
    row_lse = load_lse(lse, row, left, C)
    row_delta = load_row_values(delta, row, left, 0.0, C)
    return RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])


@jit
def load_packed_grads(dout, lse, delta, rows, C):
    """The same of packed or gathered rows."""
    dout0, dout1 = load_packed_v(dout, rows, C)
    row_lse = load_packed_lse(lse, rows)
    row_delta = load_packed_values(delta, rows, 0.0)
    return RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])


@jit
def add_entries(sums, x, entry, inside, T):
    """sums [CHUNK] + the numbers x of a tile by their entries, where `inside`; one pass over the tile for each entry.

    Only the entries between the least and the greatest of the tile are looked at: one where a bucket holds all of it.
    """
    number = tl.arange(0, T.CHUNK)
    least = tl.min(tl.where(inside, entry, T.CHUNK))
    greatest = tl.max(tl.where(inside, entry, -1))
    for i in tl.range(least, greatest + 1):
        own = tl.sum(tl.where(inside & (entry == i), x, 0.0))
        sums += tl.where(number == i, own, 0.0)
    return sums


@jit
def add_diagonals(sums, x, start, entry, T, C):
    """sums [CHUNK] + the numbers x [M, N] of a tile by the entries of STEP of their distances, from `start` on.

    Distance 0 is that of row 0 and the last key. Entries outside of the part count for nothing.
    """
    distance = start + tl.arange(0, T.STEP)[None, :]
    key = tl.arange(0, C.BLOCK_M)[:, None] + (C.BLOCK_N - 1) - distance
    there = (key >= 0) & (key < C.BLOCK_N)
    own = tl.gather(x, tl.minimum(tl.maximum(key, 0), C.BLOCK_N - 1), 1)
    diagonals = tl.sum(tl.where(there, own, 0.0), 0)
    number = tl.arange(0, T.CHUNK)[:, None]
    return sums + tl.sum(tl.where(number == entry[None, :], diagonals[None, :], 0.0), 1)


@jit
def add_elements(pointers, there, x):
    """Adds the numbers of a tile to memory of this program alone."""
    tl.store(pointers, tl.load(pointers, mask=there, other=0.0) + x, mask=there)
    tl.debug_barrier()  # the next head may add to the same numbers by other threads


@jit
def add_elements_of_heads(pointers, there, x, member, C):
    """The same where rows of several heads read one element: head after head, `member` of a group, [rows, 1]."""
    for i in tl.range(0, C.GROUP):
        add_elements(pointers, there & (member == i), x)


@jit
def store_entries(x, first, sums, T):
    """Entries `first`.. of the table of one program."""
    entry = first + tl.arange(0, T.CHUNK)
    tl.store(x.data + entry, sums, mask=entry < T.TOTAL)


@jit
def store_table_places(x, place, rows, h):
    """Where the table of each head of packed rows begins; h is the first of them."""
    tl.store(x.data + (rows.heads - h), place.to(tl.int64), mask=rows.inside & (rows.lane == 0))


@jit
def store_key_values(x, key, left, values, C):
    """One value for each key of a block."""
    i = tl.arange(0, C.BLOCK_N)
    tl.store(token_pointer(x, key) + i.to(tl.int64) * x.token, values.to(x.data.dtype.element_ty), mask=i < left)
