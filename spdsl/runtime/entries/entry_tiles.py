"""Tiles of kernels that make entries of tokens: rows of vectors, the cells of a block of entries."""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import jit


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
