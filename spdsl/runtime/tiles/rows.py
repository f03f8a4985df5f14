"""Device functions that load rows: neighbouring ones of a head, or each by its query and head."""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import Rows, RowTile, jit
from spdsl.runtime.tiles.tiles import in_base_2, load_columns, load_parts, load_qk, token_pointer


@jit
def load_rows(q, row, left, position, h, C):
    """Rows `row`.. of one head, of which `left` are there."""
    q0, q1 = load_qk(token_pointer(q, row), q.token, left, C.BLOCK_M, True, C)
    return Rows(q0, q1, (position + tl.arange(0, C.BLOCK_M))[:, None], h)


@jit
def tile_of_rows(rows, row, MASKED: tl.constexpr, C):
    """Rows `row`.. of the head of `rows` as a `RowTile`.

    What changes with a loop is in the numbers of the queries, not in a pointer: offsets of rows are then made anew, by
    one instruction for each, and do not occupy 64-bit registers throughout the loop.
    """
    i = tl.arange(0, C.BLOCK_M)
    query = row + i
    position = (rows.origin + query)[None, :]
    heads = tl.full((), 0, tl.int32)
    inside = i < rows.count - row
    q0, q1 = load_qk_of(rows.q, query, heads, inside, MASKED, C)
    return RowTile(q0, q1, position, rows.head, rows.dout, rows.lse, rows.delta, row, query, heads, inside)


@jit
def row_pointers(x, query, heads):
    """Where rows of x begin, which is a Strided from the first token of the sequence on."""
    return x.data + query.to(tl.int64) * x.token + heads.to(tl.int64) * x.head


@jit
def load_row_part(
    x, query, heads, inside, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr
):
    """[M, WIDTH] tile of columns START.. of rows; those that are not there (if MASKED) are 0."""
    return load_columns(row_pointers(x, query, heads)[:, None], inside, START, WIDTH, DIM, MASKED)


@jit
def load_qk_of(x, query, heads, inside, MASKED: tl.constexpr, C):
    """Rows of q in two parts."""
    return load_parts(row_pointers(x, query, heads)[:, None], inside, C.QK0, C.QK1, C.QK_DIM, MASKED)


@jit
def load_v_of(x, query, heads, inside, MASKED: tl.constexpr, C):
    """Rows of out or dout in two parts."""
    return load_parts(row_pointers(x, query, heads)[:, None], inside, C.V0, C.V1, C.V_DIM, MASKED)


@jit
def load_dout(tile, MASKED: tl.constexpr, C):
    return load_v_of(tile.dout, tile.query, tile.heads, tile.inside, MASKED, C)


@jit
def load_values_of(x, query, heads, inside, other):
    """One value per row [M] (lse, delta)."""
    return tl.load(row_pointers(x, query, heads), mask=inside, other=other)


@jit
def load_tile_values(x, tile, other):
    """One value per row of a tile [M]. Of neighbouring rows from one pointer on: that takes fewer registers."""
    if len(tile.heads.shape) == 0:
        i = tl.arange(0, tile.query.shape[0])
        values = tl.load(token_pointer(x, tile.first) + i.to(tl.int64) * x.token, mask=tile.inside, other=other)
    else:
        values = load_values_of(x, tile.query, tile.heads, tile.inside, other)
    return values


@jit
def load_tile_lse(tile):
    return in_base_2(load_tile_values(tile.lse, tile, float("-inf")))


@jit
def load_tile_delta(tile):
    return load_tile_values(tile.delta, tile, 0.0)
