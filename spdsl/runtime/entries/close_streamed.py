"""One kernel that closes entries by the pools that have device functions for it: from tokens in pages to entries.

A program looks at the lengths first: where a step closes nothing, that is all it does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spdsl.runtime.entries.close_kernel import Closing, StoredSide, whole_cells
from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import launch, strided, wide
from spdsl.runtime.pools.pool import Closed
from spdsl.runtime.sequences import expect
from spdsl.runtime.tiles.kernel import Strided, jit
from spdsl.runtime.tiles.positions import cached_homes, cached_rows
from spdsl.runtime.tiles.tiles import at, token_pointer


class CellSide(NamedTuple):
    """Keys or values: the stores of tokens and entries, and what weighs the tokens of a cell, where something does."""

    tokens: Strided
    entries: Strided
    logits: Strided | None
    weights: tuple[torch.Tensor, ...] | None  # of the pool
    DIM: tl.constexpr
    DIM_PADDED: tl.constexpr  # to a power of two
    LOGITS: tl.constexpr  # of a token: DIM of them, or one
    ROWS: tl.constexpr  # tokens of a cell that are loaded at once


class CloseConst(NamedTuple):
    """What the kernel is compiled for."""

    POOL: Closed  # its device functions
    SIDES: tl.constexpr
    HEADS: tl.constexpr  # of a side
    WIDTH: tl.constexpr
    STRIDE: tl.constexpr
    BEFORE: tl.constexpr
    PAGE: tl.constexpr
    ACC: tl.constexpr  # dtype of sums


@jit
def cell_places(call, s, first, w, C):
    """Home and slot of the tokens at places w of the cell that begins at token `first`, and whether they are there."""
    there = w < C.WIDTH
    if C.BEFORE:
        there = there & (first + w >= 0)
    return cached_homes(call, s, first + w, there, C.PAGE)


@jit
def cell_tokens(store, h, home, slot, there, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, DIMS: tl.constexpr):
    """Rows [ROWS, DIM_PADDED] of a head, 0 where they are not there; where they have one number of DIM, that one."""
    column = tl.arange(0, DIM_PADDED)[None, :]
    own = column if DIMS == DIM else tl.zeros_like(column)
    pointers = cached_rows(store, h, home, slot)[:, None] + own
    return tl.load(pointers, mask=there[:, None] & (column < DIM), other=0)


@jit
def close_cell(side, call, s, h, entry, C):
    first = entry * C.STRIDE - C.BEFORE
    state = C.POOL.start(side, C)
    for start in tl.range(0, C.WIDTH, side.ROWS):
        w = start + tl.arange(0, side.ROWS)
        home, slot, there = cell_places(call, s, first, w, C)
        value = cell_tokens(side.tokens, h, home, slot, there, side.DIM, side.DIM_PADDED, side.DIM)
        state = C.POOL.add(state, value, side, h, w, home, slot, there, C)
    value = C.POOL.finish(state, first, C)
    column = tl.arange(0, side.DIM_PADDED)
    pointers = token_pointer(at(side.entries, s, h, 0), entry) + column
    tl.store(pointers, value.to(side.entries.data.dtype.element_ty), mask=column < side.DIM)


@jit
def close_cells(sides, call, C):
    """The entries that have closed, and how many there are.  Grid (new entries, heads of all sides, sequences)."""
    number, row, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(call.spans + 2 * s + 1)
    count = whole_cells(length, C.WIDTH, C.STRIDE, C.BEFORE)
    entry = whole_cells(length - call.added, C.WIDTH, C.STRIDE, C.BEFORE) + number
    if (number == 0) & (row == 0):
        tl.store(call.entry_spans + 2 * s + 1, count)
    if entry < count:
        for i in tl.static_range(C.SIDES):
            if row // C.HEADS == i:
                close_cell(sides[i], call, s, row % C.HEADS, entry.to(tl.int64), C)


def close_streamed(closing: Closing) -> None:
    """Closes entries as the pool makes them."""
    pool, sides, call, number, cells, page = closing
    assert pool.closed is not None
    heads, dtype = sides[0].tokens.shape[1], sides[0].tokens.dtype
    acc = tl.float64 if wide(dtype) == torch.float64 else tl.float32
    values = (len(sides), heads, cells.width, cells.stride, cells.before, page, acc)
    launch(
        close_cells, (number, heads * len(sides), call.sequences),
        tuple(_cell_side(side, cells.width) for side in sides), call,
        CloseConst(pool.closed, *(tl.constexpr(value) for value in values)), num_warps=4, num_stages=1,
    )  # fmt: skip


def _cell_side(side: StoredSide, width: int) -> CellSide:
    """4096 numbers at once: 32 for each thread. Not tuned on a GPU."""
    dim, logits = side.tokens.shape[3], 0 if side.logits is None else side.logits.shape[3]
    expect(logits in (0, 1, dim), "logits", f"one number, or {dim}, of a token", logits)
    padded = triton.next_power_of_2(dim)
    weights = tuple(x.contiguous() for x in side.weights) or None
    sizes = (dim, padded, logits, min(triton.next_power_of_2(width), max(1, 4096 // padded)))
    return CellSide(
        strided(side.tokens), strided(side.entries), None if side.logits is None else strided(side.logits),
        weights, *(tl.constexpr(size) for size in sizes),
    )  # fmt: skip
