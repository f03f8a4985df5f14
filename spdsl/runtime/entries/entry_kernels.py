"""Kernels for compressed streams that stream the tokens: no buffer of cells. Mean, max and weighted sum.

Backward without atomics: each token gathers from the entries that cover it, in one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.entries.entries import Cells, entry_count, entry_room, entry_spans, is_packed
from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import INTERPRETED, launch, room_like, rows_contiguous, strided, wide
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tiles.kernel import Strided, jit
from spdsl.runtime.tiles.positions import span
from spdsl.runtime.tiles.tiles import at


class EntryCall(NamedTuple):
    """Tokens and entries of every sequence, or where they lie: spans int32 [S, 2] = (start, count)."""

    tokens: int
    entries: int
    token_spans: torch.Tensor | None
    entry_spans: torch.Tensor | None


class EntryConst(NamedTuple):
    """What a kernel is compiled for (all tl.constexpr)."""

    WIDTH: tl.constexpr
    STRIDE: tl.constexpr
    BEFORE: tl.constexpr
    PARTIAL: tl.constexpr
    DIM: tl.constexpr
    DIM_PADDED: tl.constexpr  # to a power of two
    BLOCK: tl.constexpr  # entries, or tokens, of a program
    BY: tl.constexpr  # mean, max, weighted
    ACC: tl.constexpr  # dtype of sums


@jit
def load_vectors(x, row, inside, C):
    """Rows [BLOCK, DIM_PADDED] of one sequence and head, 0 where not inside.  `row` is int64."""
    column = tl.arange(0, C.DIM_PADDED)[None, :]
    return tl.load(x.data + row[:, None] * x.token + column, mask=inside[:, None] & (column < C.DIM), other=0)


@jit
def store_vectors(x, row, inside, values, C):
    column = tl.arange(0, C.DIM_PADDED)[None, :]
    pointers = x.data + row[:, None] * x.token + column
    tl.store(pointers, values.to(x.data.dtype.element_ty), mask=inside[:, None] & (column < C.DIM))


@jit
def block_rows(C):
    return tl.program_id(0).to(tl.int64) * C.BLOCK + tl.arange(0, C.BLOCK)


@jit
def first_token(entry, C):
    """Of each cell; below 0 where the cell begins before the sequence."""
    return entry * C.STRIDE - C.BEFORE


@jit
def is_there(token, inside, tokens, C):
    """Whether the cells have this token: it may lie before the sequence or behind it."""
    if C.BEFORE:
        inside = inside & (token >= 0)
    if C.PARTIAL:
        inside = inside & (token < tokens)
    return inside


@jit
def cell_sizes(entry, tokens, C):
    """How many tokens the cells have, at least 1, as a column."""
    size = tl.full((C.BLOCK,), C.WIDTH, tl.int64)
    if C.BEFORE:
        size += tl.minimum(first_token(entry, C), 0)
    if C.PARTIAL:
        size -= tl.maximum(first_token(entry, C) + C.WIDTH - tokens, 0)
    return tl.maximum(size, 1).to(C.ACC)[:, None]


@jit
def pool_sums(x, entry, inside, tokens, weight, position, h, C):
    """Mean or weighted sum of the cells of entries."""
    column = tl.arange(0, C.DIM_PADDED)
    first = first_token(entry, C)
    total = tl.zeros((C.BLOCK, C.DIM_PADDED), dtype=C.ACC)
    for w in tl.range(0, C.WIDTH, loop_unroll_factor=4):
        there = is_there(first + w, inside, tokens, C)
        value = load_vectors(x, first + w, there, C).to(C.ACC)
        if C.BY == "weighted":
            place = h.to(tl.int64) * C.WIDTH + w
            moved = tl.load(position + place * C.DIM + column, mask=column < C.DIM, other=0).to(C.ACC)
            value = tl.where(there[:, None], value + moved[None, :], 0.0)
            total += tl.load(weight + place).to(C.ACC) * value
        else:
            total += value
    if C.BY == "mean":
        total = total / cell_sizes(entry, tokens, C)
    return total


@jit
def pool_maxima(x, entry, inside, tokens, C):
    """-> maximum of each cell and its place in the cell: the first one, or the first NaN."""
    first = first_token(entry, C)
    best = tl.full((C.BLOCK, C.DIM_PADDED), float("-inf"), x.data.dtype.element_ty)
    place = tl.zeros((C.BLOCK, C.DIM_PADDED), tl.int32) + tl.maximum(-first, 0).to(tl.int32)[:, None]
    for w in tl.range(0, C.WIDTH, loop_unroll_factor=2):
        there = is_there(first + w, inside, tokens, C)
        value = load_vectors(x, first + w, there, C)
        better = there[:, None] & ((value > best) | ((value != value) & (best == best)))
        best = tl.where(better, value, best)
        place = tl.where(better, w, place)
    return best, place


@jit
def pool_entries(x, out, places, weight, position, call, C):
    """Grid (blocks of entries, heads, sequences): entries from tokens; of maxima also, or only, their places."""
    h, s = tl.program_id(1), tl.program_id(2)
    start, tokens = span(call.token_spans, s, call.tokens)
    entry_start, entries = span(call.entry_spans, s, call.entries)
    x = at(x, s, h, start)
    entry = block_rows(C)
    inside = entry < entries
    if C.BY == "max":
        value, place = pool_maxima(x, entry, inside, tokens, C)
        if places is not None:
            store_vectors(at(places, s, h, entry_start), entry, inside, place, C)
    else:
        value = pool_sums(x, entry, inside, tokens, weight, position, h, C)
    if out is not None:
        store_vectors(at(out, s, h, entry_start), entry, inside, value, C)


@jit
def spread_entries(dout, dx, places, weight, call, C):
    """Grid (blocks of tokens, heads, sequences): the gradient of tokens from that of the entries that cover them."""
    h, s = tl.program_id(1), tl.program_id(2)
    start, tokens = span(call.token_spans, s, call.tokens)
    entry_start, entries = span(call.entry_spans, s, call.entries)
    dout = at(dout, s, h, entry_start)
    token = block_rows(C)
    total = tl.zeros((C.BLOCK, C.DIM_PADDED), dtype=C.ACC)
    for back in range((C.WIDTH + C.STRIDE - 1) // C.STRIDE):
        entry = (token + C.BEFORE) // C.STRIDE - back
        place = token - first_token(entry, C)
        inside = (entry >= 0) & (entry < entries) & (place < C.WIDTH)
        value = load_vectors(dout, entry, inside, C).to(C.ACC)
        if C.BY == "max":
            taken = load_vectors(at(places, s, h, entry_start), entry, inside, C)
            value = tl.where(taken == place.to(tl.int32)[:, None], value, 0.0)
        elif C.BY == "weighted":
            value *= tl.load(weight + h.to(tl.int64) * C.WIDTH + place, mask=inside, other=0).to(C.ACC)[:, None]
        else:
            value = value / cell_sizes(entry, tokens, C)
        total += value
    store_vectors(at(dx, s, h, start), token, token < tokens, total, C)


@jit
def weight_sums(x, dout, products, sums, call, C):
    """Grid (blocks of entries, heads, sequences): for each program the sum over its entries of dout, and of dout . x.

    products [S, blocks, H, WIDTH] and sums [S, blocks, H, places, DIM], contiguous. Places of a cell are counted apart
    where cells may be clipped; else they are one.
    """
    tile, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, tokens = span(call.token_spans, s, call.tokens)
    entry_start, entries = span(call.entry_spans, s, call.entries)
    x = at(x, s, h, start)
    entry = block_rows(C)
    inside = entry < entries
    value = load_vectors(at(dout, s, h, entry_start), entry, inside, C).to(C.ACC)
    program = (s.to(tl.int64) * tl.num_programs(0) + tile) * tl.num_programs(1) + h
    column = tl.arange(0, C.DIM_PADDED)
    if not (C.BEFORE or C.PARTIAL):
        tl.store(sums + program * C.DIM + column, tl.sum(value, 0), mask=column < C.DIM)
    for w in tl.range(0, C.WIDTH, loop_unroll_factor=4):
        own = first_token(entry, C) + w
        there = is_there(own, inside, tokens, C)
        token = load_vectors(x, own, there, C).to(C.ACC)
        if C.BEFORE or C.PARTIAL:
            here = tl.sum(tl.where(there[:, None], value, 0.0), 0)
            tl.store(sums + (program * C.WIDTH + w) * C.DIM + column, here, mask=column < C.DIM)
        tl.store(products + program * C.WIDTH + w, tl.sum(tl.sum(token * value, 1), 0))


def entry_block(x: Tensor, tokens: bool) -> int:
    """Tokens or entries of a program: enough programs for short sequences, no spills. Not tuned on a GPU."""
    return 32 if tokens and x.shape[3] <= 128 and not INTERPRETED else 16


def entry_launch(kernel: Any, x: Tensor, cells: Cells, layout: Layout, by: str, tokens: bool, *args: Any) -> None:
    """Starts a kernel over blocks of tokens or of entries."""
    call = EntryCall(x.shape[2], entry_room(x, cells, layout), layout.k_spans, _spans_of_entries(x, cells, layout))
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    values = (*cells, x.shape[3], triton.next_power_of_2(x.shape[3]), entry_block(x, tokens), by, acc)
    const = EntryConst(*(tl.constexpr(value) for value in values))
    grid = (entry_blocks(x, cells, layout, tokens), x.shape[1], entry_sequences(x, layout))
    launch(kernel, grid, *args, call, const, num_warps=4, num_stages=1)


def entry_blocks(x: Tensor, cells: Cells, layout: Layout, tokens: bool) -> int:
    """Programs for the longest sequence."""
    longest = x.shape[2] if layout.k_spans is None else min(layout.longest, x.shape[2])
    count = longest if tokens else entry_count(longest, cells)
    return -(-count // entry_block(x, tokens))


def entry_sequences(x: Tensor, layout: Layout) -> int:
    return x.shape[0] if layout.k_spans is None else len(layout.k_spans)


def _spans_of_entries(x: Tensor, cells: Cells, layout: Layout) -> Tensor | None:
    return None if layout.k_spans is None else entry_spans(layout.k_spans, cells, is_packed(x, layout))


def _vectors(x: Tensor, layout: Layout) -> Strided:
    return strided(x, None if layout.k_spans is None else len(layout.k_spans))


def _entry_tensor(x: Tensor, cells: Cells, layout: Layout, dtype: torch.dtype) -> Tensor:
    """[B, H, E, D], 0 where spans leave gaps that no program writes."""
    shape = (x.shape[0], x.shape[1], entry_room(x, cells, layout), x.shape[3])
    return x.new_empty(shape, dtype=dtype) if layout.k_spans is None else x.new_zeros(shape, dtype=dtype)


def entries_forward(
    x: Tensor, cells: Cells, layout: Layout, by: str, weight: Tensor | None = None, position: Tensor | None = None
) -> Tensor:
    """x [B, H, M, D] -> entries [B, H, E, D] by `mean`, `max` or `weighted`: what `compress` with that pool gives.

    weight [H, width], position [H, width, D].
    """
    x = rows_contiguous(x)
    weight, position = (None if given is None else given.contiguous() for given in (weight, position))
    out = _entry_tensor(x, cells, layout, x.dtype)
    tensors = (_vectors(x, layout), _vectors(out, layout), None, weight, position)
    entry_launch(pool_entries, x, cells, layout, by, False, *tensors)
    return out


def entries_backward(
    dout: Tensor,
    x: Tensor,
    cells: Cells,
    layout: Layout,
    by: str,
    weight: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> dx [B, H, M, D], and for `weighted` dweight and dposition. The places of maxima are found again, not kept."""
    x, dout = rows_contiguous(x), rows_contiguous(dout)
    places = _places_of_maxima(x, cells, layout) if by == "max" else None
    weight = None if weight is None else weight.contiguous()
    dx = room_like(x) if layout.k_spans is None else room_like(x).zero_()
    tensors = (_vectors(dout, layout), _vectors(dx, layout), places, weight)
    entry_launch(spread_entries, x, cells, layout, by, True, *tensors)
    if by != "weighted" or weight is None or position is None:
        return dx, None, None
    return dx, *_weight_gradients(dout, x, cells, layout, weight, position)


def _places_of_maxima(x: Tensor, cells: Cells, layout: Layout) -> Strided:
    places = _vectors(_entry_tensor(x, cells, layout, torch.int32), layout)
    entry_launch(pool_entries, x, cells, layout, "max", False, _vectors(x, layout), None, places, None, None)
    return places


def _weight_gradients(
    dout: Tensor, x: Tensor, cells: Cells, layout: Layout, weight: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """A position meets the entries whose cells have its place, each with one weight: weight * sum of their dout."""
    programs = entry_sequences(x, layout) * entry_blocks(x, cells, layout, False)
    dtype = wide(x.dtype)
    products = x.new_empty(programs, x.shape[1], cells.width, dtype=dtype)
    sums = x.new_empty(programs, x.shape[1], cells.width if cells.clipped else 1, x.shape[3], dtype=dtype)
    tensors = (_vectors(x, layout), _vectors(dout, layout), products, sums)
    entry_launch(weight_sums, x, cells, layout, "weighted", False, *tensors)
    total = sums.sum(0)
    dweight = products.sum(0) + (total * position.to(dtype)).sum(2)
    dposition = weight.to(dtype)[:, :, None] * total
    return dweight.to(weight.dtype), dposition.to(position.dtype)
