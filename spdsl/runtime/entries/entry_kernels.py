"""Kernels for compressed streams that stream the tokens: no buffer of cells, for the pools that have device functions.

Backward without atomics: each token gathers from the entries that cover it, in one order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.entries.entries import Cells
from spdsl.runtime.entries.entry_launch import entry_launch, room_for_entries, vectors_of
from spdsl.runtime.entries.entry_tiles import block_rows, first_token, is_there, load_vectors, store_vectors
from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import room_like, rows_contiguous
from spdsl.runtime.pools.pool import Streamed
from spdsl.runtime.pools.table import POOLS
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tiles.kernel import Strided, jit
from spdsl.runtime.tiles.positions import span
from spdsl.runtime.tiles.tiles import at


@jit
def pool_entries(x, out, kept, weights, call, C):
    """Grid (blocks of entries, heads, sequences): entries from tokens; also, or only, what their gradient needs."""
    h, s = tl.program_id(1), tl.program_id(2)
    start, tokens = span(call.token_spans, s, call.tokens)
    entry_start, entries = span(call.entry_spans, s, call.entries)
    x = at(x, s, h, start)
    entry = block_rows(C)
    inside = entry < entries
    first = first_token(entry, C)
    state = C.POOL.start(x, first, C)
    for w in tl.range(0, C.WIDTH, loop_unroll_factor=C.POOL.UNROLL):
        there = is_there(first + w, inside, tokens, C)
        value = load_vectors(x, first + w, there, C)
        state = C.POOL.add(state, value, w, there, weights, h, C)
    if kept is not None:
        store_vectors(at(kept, s, h, entry_start), entry, inside, C.POOL.kept(state), C)
    if out is not None:
        store_vectors(at(out, s, h, entry_start), entry, inside, C.POOL.finish(state, entry, tokens, C), C)


@jit
def spread_entries(dout, dx, kept, weights, call, C):
    """Grid (blocks of tokens, heads, sequences): the gradient of tokens from that of the entries that cover them."""
    h, s = tl.program_id(1), tl.program_id(2)
    start, tokens = span(call.token_spans, s, call.tokens)
    entry_start, entries = span(call.entry_spans, s, call.entries)
    dout = at(dout, s, h, entry_start)
    if kept is not None:
        kept = at(kept, s, h, entry_start)
    token = block_rows(C)
    total = tl.zeros((C.BLOCK, C.DIM_PADDED), dtype=C.ACC)
    for back in range((C.WIDTH + C.STRIDE - 1) // C.STRIDE):
        entry = (token + C.BEFORE) // C.STRIDE - back
        place = token - first_token(entry, C)
        inside = (entry >= 0) & (entry < entries) & (place < C.WIDTH)
        value = load_vectors(dout, entry, inside, C).to(C.ACC)
        total += C.POOL.spread(value, kept, entry, place, inside, tokens, weights, h, C)
    store_vectors(at(dx, s, h, start), token, token < tokens, total, C)


def entries_forward(x: Tensor, cells: Cells, layout: Layout, by: str, *weights: Tensor) -> Tensor:
    """x [B, H, M, D] -> entries [B, H, E, D] by a pool with device functions: what `compress` with that pool gives."""
    x = rows_contiguous(x)
    out = room_for_entries(x, cells, layout, x.dtype)
    tensors = (vectors_of(x, layout), vectors_of(out, layout), None, _contiguous(weights))
    entry_launch(pool_entries, x, cells, layout, _streamed(by), False, *tensors)
    return out


def entries_backward(
    dout: Tensor, x: Tensor, cells: Cells, layout: Layout, by: str, *weights: Tensor
) -> tuple[Tensor, ...]:
    """-> dx [B, H, M, D], and the gradients of the weights. What `spread` reads is made again, not kept."""
    x, dout = rows_contiguous(x), rows_contiguous(dout)
    pool, learn, own = _streamed(by), POOLS[by].learn, _contiguous(weights)
    kept = None if pool.kept is None else _kept(x, cells, layout, pool)
    dx = room_like(x) if layout.k_spans is None else room_like(x).zero_()
    tensors = (vectors_of(dout, layout), vectors_of(dx, layout), kept, own)
    entry_launch(spread_entries, x, cells, layout, pool, True, *tensors)
    return (dx,) if learn is None or own is None else (dx, *learn(dout, x, cells, layout, *own))


def _streamed(by: str) -> Streamed:
    found = POOLS[by].streamed
    assert found is not None
    return found


def _contiguous(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return tuple(weight.contiguous() for weight in weights) or None


def _kept(x: Tensor, cells: Cells, layout: Layout, pool: Streamed) -> Strided:
    kept = vectors_of(room_for_entries(x, cells, layout, torch.int32), layout)
    entry_launch(pool_entries, x, cells, layout, pool, False, vectors_of(x, layout), None, kept, None)
    return kept
