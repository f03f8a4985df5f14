"""weighted: the sum over the tokens w that are there of weight[h, w] * (c[.., w, :] + position[h, w, :])."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.entries.close_streamed import close_streamed
from spdsl.runtime.entries.entries import Cells
from spdsl.runtime.entries.entry_launch import entry_blocks, entry_launch, entry_sequences, vectors_of
from spdsl.runtime.entries.entry_tiles import block_rows, first_token, is_there, load_vectors
from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.pools.pool import Closed, Pool, Streamed
from spdsl.runtime.pools.sums import cell_sum_start, sum_start
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tiles.kernel import jit
from spdsl.runtime.tiles.positions import span
from spdsl.runtime.tiles.tiles import at


def pool_weighted(c: Tensor, there: Tensor | None, weight: Tensor, position: Tensor) -> Tensor:
    """weight [H, width], position [H, width, D]"""
    dtype = wide(c.dtype)
    weight, position = weight.to(dtype), position.to(dtype)
    if there is None:
        moved = torch.einsum("hw,hwd->hd", weight, position)[:, None]
    else:
        moved = torch.einsum("bew,hw,hwd->bhed", there.to(dtype), weight, position)
    return (torch.einsum("hw,bhewd->bhed", weight, c.to(dtype)) + moved).to(c.dtype)


@jit
def weighted_add(state, value, w, there, weights, h, C):
    weight, position = weights
    column = tl.arange(0, C.DIM_PADDED)
    place = h.to(tl.int64) * C.WIDTH + w
    moved = tl.load(position + place * C.DIM + column, mask=column < C.DIM, other=0).to(C.ACC)
    value = tl.where(there[:, None], value.to(C.ACC) + moved[None, :], 0.0)
    return (state[0] + tl.load(weight + place).to(C.ACC) * value,)


@jit
def weighted_finish(state, entry, tokens, C):
    return state[0]


@jit
def weighted_spread(dout, kept, entry, place, inside, tokens, weights, h, C):
    weight = tl.load(weights[0] + h.to(tl.int64) * C.WIDTH + place, mask=inside, other=0)
    return dout * weight.to(C.ACC)[:, None]


@jit
def cell_weighted_add(state, value, side, h, w, home, slot, there, C):
    weight, position = side.weights
    column = tl.arange(0, side.DIM_PADDED)[None, :]
    place = tl.cast(h, tl.int64) * C.WIDTH + w
    inside = (w < C.WIDTH)[:, None] & (column < side.DIM)
    value = value.to(C.ACC) + tl.load(position + place[:, None] * side.DIM + column, mask=inside, other=0).to(C.ACC)
    value *= tl.load(weight + place, mask=there, other=0).to(C.ACC)[:, None]
    return (state[0] + tl.sum(value, 0),)


@jit
def cell_weighted_finish(state, first, C):
    return state[0]


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


STREAMED = Streamed(sum_start, weighted_add, weighted_finish, None, weighted_spread, tl.constexpr(4))


def weight_gradients(
    dout: Tensor, x: Tensor, cells: Cells, layout: Layout, weight: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """A position meets the entries whose cells have its place, each with one weight: weight * sum of their dout."""
    programs = entry_sequences(x, layout) * entry_blocks(x, cells, layout, False)
    dtype = wide(x.dtype)
    products = x.new_empty(programs, x.shape[1], cells.width, dtype=dtype)
    sums = x.new_empty(programs, x.shape[1], cells.width if cells.clipped else 1, x.shape[3], dtype=dtype)
    tensors = (vectors_of(x, layout), vectors_of(dout, layout), products, sums)
    entry_launch(weight_sums, x, cells, layout, STREAMED, False, *tensors)
    total = sums.sum(0)
    dweight = products.sum(0) + (total * position.to(dtype)).sum(2)
    dposition = weight.to(dtype)[:, :, None] * total
    return dweight.to(weight.dtype), dposition.to(position.dtype)


WEIGHTED = Pool(
    "weighted",
    pool_weighted,
    close_streamed,
    STREAMED,
    Closed(cell_sum_start, cell_weighted_add, cell_weighted_finish),
    weight_gradients,
)
