"""The kernel that makes the products of cells of queries and cells of keys, or of queries and entries."""

from __future__ import annotations

from typing import Any, NamedTuple

from spdsl.runtime.language import tl
from spdsl.runtime.select.cut import cut_rows
from spdsl.runtime.tiles.blocks import sequence_keys
from spdsl.runtime.tiles.kernel import jit
from spdsl.runtime.tiles.keys import load_tokens
from spdsl.runtime.tiles.tiles import at, load_parts


class CellConst(NamedTuple):
    """What the kernel is compiled for (all tl.constexpr)."""

    STEP: tl.constexpr  # queries, and keys, of a cell; 1: queries and entries
    CELLS: tl.constexpr  # of queries, of a tile of rows
    STRIDE: tl.constexpr  # tokens from one entry to the next
    BEFORE: tl.constexpr  # tokens by which an entry begins early
    PRODUCT: Any = None  # a device function like dot_rows


@jit
def multiply_cells(q, source, found, width, tiles, call, S, P, C):
    """One program: BLOCK_M cells of queries of a tile times BLOCK_N cells of keys.

    Grid (blocks of cells of a piece, heads, blocks of keys).

    Writes [heads, cells of the tiles, width]: of cells i and j the sum over s of q[i, STEP - 1 - s] . k[j, s], scaled
    and divided by STEP. A row or key that is not there is 0; nothing is hidden here.
    """
    BLOCKS: tl.constexpr = (P.CELLS + C.BLOCK_M - 1) // C.BLOCK_M
    number, head = tl.program_id(0) // BLOCKS, tl.program_id(1)
    rows = cut_rows(tiles, number, call, S)
    if rows.count <= 0:
        return
    # What begins after the last row nobody sees, where there is an order; it stays as it is.
    if S.CAUSAL & (tl.program_id(2) * C.BLOCK_N * P.STRIDE - P.BEFORE > rows.last):
        return
    first = rows.origin  # the position of the tile's first place
    if S.ROWS > 1:
        first = rows.last + 1 - S.ROWS
    cell = tl.program_id(0) % BLOCKS * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    entry = tl.program_id(2) * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    keys = sequence_keys(source, rows.s, head, call, C)
    own = at(q, rows.s, head, rows.start + rows.begin)
    total = tl.zeros((C.BLOCK_M, C.BLOCK_N), dtype=C.ACC)
    for s in tl.range(0, P.STEP, disable_licm=True):
        row = first - rows.origin + cell * P.STEP + (P.STEP - 1 - s)
        there = (row >= 0) & (row < rows.count) & (cell < P.CELLS)
        place = tl.maximum(row, 0).to(tl.int64) * own.token
        q0, q1 = load_parts((own.data + place)[:, None], there, C.QK0, C.QK1, C.QK_DIM, True)
        key = entry * P.STEP + s
        k0, k1 = load_tokens(keys.k, keys.pages, key, key < keys.count, C.QK0, C.QK1, C.QK_DIM, C)
        total += P.PRODUCT(q0, q1, k0, k1, C.QK1, C)
    out = (tl.cast(head, tl.int64) * (tl.num_programs(0) // BLOCKS) + number) * P.CELLS + cell
    inside = (cell < P.CELLS)[:, None] & (entry < width)[None, :]
    tl.store(found + out[:, None] * width + entry[None, :], total * (C.SCALE / P.STEP), mask=inside)
