"""Kernels that close entries of a compressed stream: cells out of the pages of a cache, and entries into it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spdsl.device.entries import Cells
from spdsl.device.kernel import jit
from spdsl.device.launch import launch, rows_contiguous, strided
from spdsl.device.tiles import at

_TAKEN = 32  # rows of a program, of cells or of entries


class Close(NamedTuple):
    """What the last `added` tokens closed: token spans int32 [S, 2] = (0, length), pages [S, page_width].

    `entry_spans` int32 [S, 2] = (0, entries) gets the number of entries that are there now.
    """

    spans: torch.Tensor
    entry_spans: torch.Tensor
    pages: torch.Tensor | None
    page_width: int
    added: int


@jit
def whole_cells(tokens, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr):
    return tl.maximum(tokens + BEFORE - WIDTH + STRIDE, 0) // STRIDE


@jit
def take_rows(store, cells, s, h, row, rows, home, slot, there, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """Rows (home, slot) of `store` to rows `row` of a sequence and head of `cells`; 0 where they are not there."""
    column = tl.arange(0, DIM_PADDED)[None, :]
    own = tl.cast(h, tl.int64) * store.head + home * store.batch + slot * store.token
    value = tl.load(store.data + own[:, None] + column, mask=there[:, None] & (column < DIM), other=0)
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
    home, slot = tl.zeros_like(position) + s, position
    if PAGE:
        page = tl.cast(s, tl.int64) * call.page_width + position // PAGE
        home = tl.load(call.pages + page, mask=there, other=-1).to(tl.int64)
        there, slot = there & (home >= 0), position % PAGE
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


def taken_cells(
    k: Tensor, v: Tensor | None, call: Close, number: int, cells: Cells, page: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`number` cells [B, H, number, width, dim] of the keys of a stream, and of its values unless None.

    And bool [B, number, width], which of their tokens are there; None where all are.
    """
    sequences, heads, rows = len(call.spans), k.shape[1], number * cells.width
    block = min(_TAKEN, triton.next_power_of_2(cells.width))
    found_k = k.new_empty(sequences, heads, number, cells.width, k.shape[3])
    found_v = None if v is None else v.new_empty(sequences, heads, number, cells.width, v.shape[3])
    present = k.new_empty(sequences, number, cells.width, dtype=torch.uint8) if cells.before else None
    launch(
        take_cells, (triton.cdiv(rows, block), heads, sequences),
        strided(k), strided(found_k.flatten(2, 3)), None if v is None else strided(v),
        None if found_v is None else strided(found_v.flatten(2, 3)), present, call, rows,
        num_warps=4, num_stages=1, **_dims(k, v), **_cells(cells), BLOCK=block, PAGE=page,
    )  # fmt: skip
    return found_k, found_v, None if present is None else present.view(torch.bool)


def launch_entries(
    new_k: Tensor, k: Tensor, new_v: Tensor | None, v: Tensor | None, call: Close, cells: Cells
) -> None:  # fmt: skip
    """New entries [B, H, n, dim] to the stores of their stream."""
    number = new_k.shape[2]
    block = 1 if number == 1 else _TAKEN
    launch(
        put_entries, (triton.cdiv(number, block), k.shape[1], len(call.spans)),
        strided(rows_contiguous(new_k)), strided(k),
        None if new_v is None else strided(rows_contiguous(new_v)), None if v is None else strided(v), call, number,
        num_warps=1 if block == 1 else 4, num_stages=1, **_dims(k, v),
        **_cells(cells), BLOCK=block,
    )  # fmt: skip


def _dims(k: Tensor, v: Tensor | None) -> dict[str, int]:
    """The constants of head dims for a kernel that copies rows of keys and values."""
    qk, v_dim = k.shape[3], 0 if v is None else v.shape[3]
    return {
        "QK_DIM": qk, "QK_PADDED": triton.next_power_of_2(qk),
        "V_DIM": v_dim, "V_PADDED": triton.next_power_of_2(max(1, v_dim)),
    }  # fmt: skip


def _cells(cells: Cells) -> dict[str, int]:
    return {"WIDTH": cells.width, "STRIDE": cells.stride, "BEFORE": cells.before}
