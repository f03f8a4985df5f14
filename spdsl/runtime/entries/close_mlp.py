"""Two kernels that close entries by `mlp` in a step that closes one entry of a sequence at most: a hidden layer of
keys and values, then their entries.

A program has some columns of one layer for a block of sequences. Where none of them closes an entry it reads no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.entries.close_kernel import Closing, StoredSide, close_by_pool, whole_cells
from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import INTERPRETED, launch, precision, strided, wide
from spdsl.runtime.tiles.kernel import Strided, jit
from spdsl.runtime.tiles.positions import cached_homes, cached_rows
from spdsl.runtime.tiles.tiles import dot
from spdsl.runtime.tuning.configs import Config, chained, power_of_2
from spdsl.runtime.tuning.gpu import gpu_of


class HiddenSide(NamedTuple):
    """The first layer of keys or values. FIRST: of the programs of its columns."""

    tokens: Strided
    hidden: Strided  # [S, H, 1, HIDDEN]
    position: torch.Tensor  # [H, WIDTH, DIM]
    up: torch.Tensor  # [H, WIDTH, DIM, HIDDEN]
    FIRST: tl.constexpr
    TILES: tl.constexpr
    DIM: tl.constexpr
    HIDDEN: tl.constexpr
    DEPTH: tl.constexpr  # numbers of a token that are multiplied at once


class EntrySide(NamedTuple):
    """The second layer."""

    hidden: Strided
    entries: Strided
    down: torch.Tensor  # [H, HIDDEN, DIM]
    FIRST: tl.constexpr
    TILES: tl.constexpr
    DIM: tl.constexpr
    HIDDEN: tl.constexpr
    DEPTH: tl.constexpr


class MlpConst(NamedTuple):
    """What the kernels are compiled for (all tl.constexpr)."""

    SIDES: tl.constexpr
    ROWS: tl.constexpr  # sequences of a program
    COLUMNS: tl.constexpr  # of a program
    WIDTH: tl.constexpr
    STRIDE: tl.constexpr
    BEFORE: tl.constexpr
    PAGE: tl.constexpr
    ACC: tl.constexpr  # dtype of accumulators
    PRECISION: tl.constexpr  # of fp32 dots


@jit
def closing_rows(call, C):
    """The sequences of a program, the number of entries that are there, the next one, whether it closes: [ROWS]"""
    s = tl.program_id(0).to(tl.int64) * C.ROWS + tl.arange(0, C.ROWS)
    length = tl.load(call.spans + 2 * s + 1, mask=s < call.sequences, other=0)
    count = whole_cells(length, C.WIDTH, C.STRIDE, C.BEFORE)
    entry = whole_cells(length - call.added, C.WIDTH, C.STRIDE, C.BEFORE)
    return s, count, entry.to(tl.int64), (s < call.sequences) & (entry < count)


@jit
def hidden_columns(side, call, s, entry, closes, h, C):
    """gelu((cell + position) @ up).  The position is multiplied apart: its sum with a token is never rounded."""
    tile = tl.program_id(1) - side.FIRST
    if (tile >= 0) & (tile < side.TILES):
        column = tile * C.COLUMNS + tl.arange(0, C.COLUMNS)[None, :]
        first = entry * C.STRIDE - C.BEFORE
        total = tl.zeros((C.ROWS, C.COLUMNS), dtype=C.ACC)
        PARTS: tl.constexpr = (side.DIM + side.DEPTH - 1) // side.DEPTH
        for step in tl.range(0, C.WIDTH * PARTS):
            w = step // PARTS
            d = tl.arange(0, side.DEPTH) + (step - w * PARTS) * side.DEPTH
            there = closes & (first + w >= 0)
            home, slot, there = cached_homes(call, s, first + w, there, C.PAGE)
            inside = there[:, None] & (d < side.DIM)[None, :]
            x = tl.load(cached_rows(side.tokens, h, home, slot)[:, None] + d[None, :], mask=inside, other=0)
            row = (tl.cast(h, tl.int64) * C.WIDTH + w) * side.DIM + d
            # A tile of equal rows, for a row alone would not be loaded ahead.
            moved = tl.load(side.position + tl.zeros_like(home)[:, None] + row[None, :], mask=inside, other=0)
            known = (d < side.DIM)[:, None] & (column < side.HIDDEN)
            up = tl.load(side.up + row[:, None] * side.HIDDEN + column, mask=known, other=0).to(x.dtype)
            total = dot(x, up, total, C)
            total = dot(moved.to(x.dtype), up, total, C)
        hidden = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
        pointers = side.hidden.data + s[:, None] * side.hidden.batch + tl.cast(h, tl.int64) * side.hidden.head + column
        mask = closes[:, None] & (column < side.HIDDEN)
        tl.store(pointers, hidden.to(side.hidden.data.dtype.element_ty), mask=mask)


@jit
def close_hidden(sides, call, C):
    """Grid (blocks of sequences, tiles of the hidden columns of all sides, heads)."""
    s, _, entry, closes = closing_rows(call, C)
    if tl.max(closes.to(tl.int32), 0) > 0:
        for i in tl.static_range(C.SIDES):
            hidden_columns(sides[i], call, s, entry, closes, tl.program_id(2), C)


@jit
def entry_columns(side, call, s, entry, closes, h, C):
    """hidden @ down, to its place."""
    tile = tl.program_id(1) - side.FIRST
    if (tile >= 0) & (tile < side.TILES):
        column = tile * C.COLUMNS + tl.arange(0, C.COLUMNS)[None, :]
        total = tl.zeros((C.ROWS, C.COLUMNS), dtype=C.ACC)
        hidden = side.hidden.data + s[:, None] * side.hidden.batch + tl.cast(h, tl.int64) * side.hidden.head
        for start in tl.range(0, side.HIDDEN, side.DEPTH):
            n = start + tl.arange(0, side.DEPTH)
            x = tl.load(hidden + n[None, :], mask=closes[:, None] & (n < side.HIDDEN)[None, :], other=0)
            row = (tl.cast(h, tl.int64) * side.HIDDEN + n)[:, None]
            known = (n < side.HIDDEN)[:, None] & (column < side.DIM)
            down = tl.load(side.down + row * side.DIM + column, mask=known, other=0).to(x.dtype)
            total = dot(x, down, total, C)
        own = s
        if call.row_of is not None:
            own = tl.load(call.row_of + s, mask=closes, other=0).to(tl.int64)
        place = own * side.entries.batch + tl.cast(h, tl.int64) * side.entries.head + entry * side.entries.token
        pointers = side.entries.data + place[:, None] + column
        mask = closes[:, None] & (column < side.DIM)
        tl.store(pointers, total.to(side.entries.data.dtype.element_ty), mask=mask)


@jit
def close_outputs(sides, call, C):
    """The entries, and how many there are.  Grid (blocks of sequences, tiles of the columns of all sides, heads)."""
    s, count, entry, closes = closing_rows(call, C)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(call.entry_spans + 2 * s + 1, count, mask=s < call.sequences)
    if tl.max(closes.to(tl.int32), 0) > 0:
        for i in tl.static_range(C.SIDES):
            entry_columns(sides[i], call, s, entry, closes, tl.program_id(2), C)


def close_mlp(closing: Closing) -> None:
    """Closes entries as `pool_mlp` makes them; where a call may close several of a sequence, that itself does."""
    if closing.number > 1:
        close_by_pool(closing)
    elif closing.number == 1:
        close_one(closing)


def close_one(closing: Closing) -> None:
    """The one new entry of each sequence that has one."""
    _, sides, call, _, cells, page = closing
    tokens, config = sides[0].tokens, mlp_config(sides[0].tokens)
    acc = tl.float64 if wide(tokens.dtype) == torch.float64 else tl.float32
    values = (len(sides), config.block_m, config.block_n, *cells[:3], page, acc, precision(tokens))
    C = MlpConst(*(tl.constexpr(value) for value in values))
    hidden = [x.tokens.new_empty(call.sequences, x.tokens.shape[1], 1, x.weights[1].shape[3]) for x in sides]
    ups, up_tiles = _hidden_sides(sides, hidden, config.block_n)
    downs, down_tiles = _entry_sides(sides, hidden, config.block_n)
    blocks, heads, ahead = triton.cdiv(call.sequences, config.block_m), tokens.shape[1], chained(config, page)
    launch(
        close_hidden, (blocks, up_tiles, heads), ups, call, C,
        num_warps=ahead.num_warps, num_stages=ahead.num_stages,
    )  # fmt: skip
    launch(
        close_outputs, (blocks, down_tiles, heads), downs, call, C,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def mlp_config(tokens: Tensor) -> Config:
    """block_m sequences, block_n columns of a layer: few of them, so that one sequence has a program for most
    processors, and all time goes to loads. Not tuned on a GPU.
    """
    return Config(16, 32, 4, 5 if gpu_of(tokens.device).architecture.startswith("sm_") else 1)


def _hidden_sides(
    sides: Sequence[StoredSide], hidden: Sequence[Tensor], columns: int
) -> tuple[tuple[HiddenSide, ...], int]:  # fmt: skip
    found: list[HiddenSide] = []
    first = 0
    for side, out in zip(sides, hidden, strict=True):
        position, up, _ = (x.contiguous() for x in side.weights)
        dim, tiles = up.shape[2], triton.cdiv(up.shape[3], columns)
        sizes = (first, tiles, dim, up.shape[3], _depth(dim, side.tokens))
        tensors = (strided(side.tokens), strided(out), position, up)
        found.append(HiddenSide(*tensors, *(tl.constexpr(size) for size in sizes)))
        first += tiles
    return tuple(found), first


def _entry_sides(
    sides: Sequence[StoredSide], hidden: Sequence[Tensor], columns: int
) -> tuple[tuple[EntrySide, ...], int]:  # fmt: skip
    found: list[EntrySide] = []
    first = 0
    for side, x in zip(sides, hidden, strict=True):
        down = side.weights[2].contiguous()
        tiles = triton.cdiv(down.shape[2], columns)
        sizes = (first, tiles, down.shape[2], down.shape[1], _depth(down.shape[1], x))
        found.append(EntrySide(strided(x), strided(side.entries), down, *(tl.constexpr(size) for size in sizes)))
        first += tiles
    return tuple(found), first


def _depth(numbers: int, like: Tensor) -> int:
    """Numbers of a vector that are multiplied at once: 256 bytes at most."""
    most = 16 if INTERPRETED else 256 // like.element_size()
    return max(16, min(most, power_of_2(numbers)))
