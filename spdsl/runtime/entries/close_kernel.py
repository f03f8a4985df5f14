"""Entries of a compressed stream that close in a cache: where their tokens are, and the way over any pool in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.entries.entries import Cells
from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import launch, rows_contiguous, strided
from spdsl.runtime.pools.pool import Pool
from spdsl.runtime.tiles.kernel import Strided, jit
from spdsl.runtime.tiles.positions import cached_homes, cached_rows
from spdsl.runtime.tiles.tiles import at


class Close(NamedTuple):
    """What the last `added` tokens closed: token spans int32 [S, 2] = (0, length), pages [S, page_width].

    `entry_spans` int32 [S, 2] = (0, entries) gets the number of entries that are there now.
    """

    spans: torch.Tensor
    entry_spans: torch.Tensor
    pages: torch.Tensor | None
    page_width: int
    sequences: int
    added: int


class StoredSide(NamedTuple):
    """The keys or the values of a compressed stream: tokens and entries in their stores, what its pool takes besides.

    logits: the store of the stream that weighs the tokens, if one does. weights: those of the pool, in its order.
    """

    tokens: Tensor
    entries: Tensor
    logits: Tensor | None
    weights: tuple[Tensor, ...]


class Closing(NamedTuple):
    """New entries of a compressed stream, at most `number` of each sequence. page: tokens per page, or 0."""

    pool: Pool
    sides: Sequence[StoredSide]
    call: Close
    number: int
    cells: Cells
    page: int


@jit
def whole_cells(tokens, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr):
    return tl.maximum(tokens + BEFORE - WIDTH + STRIDE, 0) // STRIDE


@jit
def take_rows(store, cells, s, h, row, rows, home, slot, there, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """Rows (home, slot) of `store` to rows `row` of a sequence and head of `cells`; 0 where they are not there."""
    column = tl.arange(0, DIM_PADDED)[None, :]
    pointers = cached_rows(store, h, home, slot)[:, None] + column
    value = tl.load(pointers, mask=there[:, None] & (column < DIM), other=0)
    cells = at(cells, s, h, 0)
    tl.store(cells.data + row[:, None] * cells.token + column, value, mask=(row < rows)[:, None] & (column < DIM))


@jit
def take_cells(
    k, cells_k, v, cells_v, present, call, rows,
    QK_DIM: tl.constexpr, QK_PADDED: tl.constexpr, V_DIM: tl.constexpr, V_PADDED: tl.constexpr,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The tokens of the cells of new entries, entry by entry.  Grid (blocks of rows, heads, sequences).

    `present` uint8 [S, rows] gets which of them the sequence has: of cells that begin before it not all.
    """
    h, s = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(call.spans + 2 * s + 1)
    entry = whole_cells(length - call.added, WIDTH, STRIDE, BEFORE) + row // WIDTH
    position = entry * STRIDE - BEFORE + row % WIDTH
    there = (row < rows) & (position < length)
    if BEFORE:
        there = there & (position >= 0)
        if h == 0:
            tl.store(present + tl.cast(s, tl.int64) * rows + row, (position >= 0).to(tl.uint8), mask=row < rows)
    home, slot, there = cached_homes(call, s, position, there, PAGE)
    take_rows(k, cells_k, s, h, row, rows, home, slot, there, QK_DIM, QK_PADDED)
    if V_DIM:
        take_rows(v, cells_v, s, h, row, rows, home, slot, there, V_DIM, V_PADDED)


@jit
def put_rows(new, store, s, h, row, entry, inside, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    column = tl.arange(0, DIM_PADDED)[None, :]
    mask = inside[:, None] & (column < DIM)
    new = at(new, s, h, 0)
    store = at(store, s, h, 0)
    value = tl.load(new.data + row[:, None] * new.token + column, mask=mask, other=0)
    tl.store(store.data + entry[:, None] * store.token + column, value.to(store.data.dtype.element_ty), mask=mask)


@jit
def put_entries(
    new_k, k, new_v, v, call, number,
    QK_DIM: tl.constexpr, QK_PADDED: tl.constexpr, V_DIM: tl.constexpr, V_PADDED: tl.constexpr,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """New entries that have closed to their places, and how many there are.  Grid (blocks of entries, heads, S)."""
    h, s = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(call.spans + 2 * s + 1)
    count = whole_cells(length, WIDTH, STRIDE, BEFORE)
    entry = whole_cells(length - call.added, WIDTH, STRIDE, BEFORE) + row
    inside = (row < number) & (entry < count)
    put_rows(new_k, k, s, h, row, entry, inside, QK_DIM, QK_PADDED)
    if V_DIM:
        put_rows(new_v, v, s, h, row, entry, inside, V_DIM, V_PADDED)
    if (tl.program_id(0) == 0) & (h == 0):
        tl.store(call.entry_spans + 2 * s + 1, count)


def close_by_pool(closing: Closing) -> None:
    """Cells are copied together, the pool makes entries of all of them, those that closed are kept."""
    made = [side.entries.new_empty(_shape_of_cells(side, closing)) for side in closing.sides]
    there = taken_cells(closing, made)
    new = [closing.pool.entries(cells, there, *side.weights) for cells, side in zip(made, closing.sides, strict=True)]
    put_new_entries(closing, new)


def taken_cells(closing: Closing, made: Sequence[Tensor]) -> Tensor | None:
    """Fills cells [B, H, number, width, dim] of each side.

    -> bool [B, number, width], which of their tokens are there; None where all are.
    """
    _, sides, call, number, cells, page = closing
    rows, (k, v) = number * cells.width, _both([side.tokens for side in sides])
    cells_k, cells_v = _both([x.flatten(2, 3) for x in made])
    block = min(32, triton.next_power_of_2(cells.width))
    present = None
    if cells.before:
        present = call.spans.new_empty(call.sequences, number, cells.width, dtype=torch.uint8)
    launch(
        take_cells, (triton.cdiv(rows, block), sides[0].tokens.shape[1], call.sequences),
        k, cells_k, v, cells_v, present, call, rows,
        num_warps=4, num_stages=1, **_dims(sides), **_cells(cells), BLOCK=block, PAGE=page,
    )  # fmt: skip
    return None if present is None else present.view(torch.bool)


def put_new_entries(closing: Closing, new: Sequence[Tensor]) -> None:
    """New entries [B, H, number, dim] of each side to their store."""
    _, sides, call, number, cells, _ = closing
    new_k, new_v = _both([rows_contiguous(x) for x in new])
    k, v = _both([side.entries for side in sides])
    block = 1 if number == 1 else 32
    launch(
        put_entries, (triton.cdiv(number, block), sides[0].entries.shape[1], call.sequences),
        new_k, k, new_v, v, call, number,
        num_warps=1 if block == 1 else 4, num_stages=1, **_dims(sides), **_cells(cells), BLOCK=block,
    )  # fmt: skip


def _shape_of_cells(side: StoredSide, closing: Closing) -> tuple[int, ...]:
    heads, dim = side.tokens.shape[1], side.tokens.shape[3]
    return closing.call.sequences, heads, closing.number, closing.cells.width, dim


def _both(tensors: Sequence[Tensor]) -> list[Strided | None]:
    """Of keys and values; None where there are no values."""
    return [strided(tensors[0]), strided(tensors[1]) if len(tensors) > 1 else None]


def _dims(sides: Sequence[StoredSide]) -> dict[str, int]:
    """The constants of head dims for a kernel that copies rows of keys and values."""
    qk, v_dim = sides[0].tokens.shape[3], sides[1].tokens.shape[3] if len(sides) > 1 else 0
    return {
        "QK_DIM": qk, "QK_PADDED": triton.next_power_of_2(qk),
        "V_DIM": v_dim, "V_PADDED": triton.next_power_of_2(max(1, v_dim)),
    }  # fmt: skip


def _cells(cells: Cells) -> dict[str, int]:
    return {"WIDTH": cells.width, "STRIDE": cells.stride, "BEFORE": cells.before}
