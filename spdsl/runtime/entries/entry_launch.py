"""Starting kernels over blocks of tokens or of entries, of every sequence and head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.entries.entries import Cells, entry_count, entry_room, entry_spans, is_packed
from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import INTERPRETED, launch, strided
from spdsl.runtime.pools.pool import Streamed
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tiles.kernel import Strided


class EntryCall(NamedTuple):
    """Tokens and entries of every sequence, or where they lie: spans int32 [S, 2] = (start, count)."""

    tokens: int
    entries: int
    token_spans: torch.Tensor | None
    entry_spans: torch.Tensor | None


class EntryConst(NamedTuple):
    """What a kernel is compiled for."""

    WIDTH: tl.constexpr
    STRIDE: tl.constexpr
    BEFORE: tl.constexpr
    PARTIAL: tl.constexpr
    DIM: tl.constexpr
    DIM_PADDED: tl.constexpr  # to a power of two
    BLOCK: tl.constexpr  # entries, or tokens, of a program
    ACC: tl.constexpr  # dtype of sums
    POOL: Streamed  # its device functions


def entry_block(x: Tensor, tokens: bool) -> int:
    """Tokens or entries of a program: enough programs for short sequences, no spills. Not tuned on a GPU."""
    return 32 if tokens and x.shape[3] <= 128 and not INTERPRETED else 16


def entry_launch(
    kernel: Any, x: Tensor, cells: Cells, layout: Layout, pool: Streamed, tokens: bool, *args: Any
) -> None:
    """Starts a kernel over blocks of tokens or of entries."""
    call = EntryCall(x.shape[2], entry_room(x, cells, layout), layout.k_spans, _spans_of_entries(x, cells, layout))
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    values = (*cells, x.shape[3], triton.next_power_of_2(x.shape[3]), entry_block(x, tokens), acc)
    const = EntryConst(*(*(tl.constexpr(value) for value in values), pool))
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


def vectors_of(x: Tensor, layout: Layout) -> Strided:
    return strided(x, None if layout.k_spans is None else len(layout.k_spans))


def room_for_entries(x: Tensor, cells: Cells, layout: Layout, dtype: torch.dtype) -> Tensor:
    """[B, H, E, D], 0 where spans leave gaps that no program writes."""
    shape = (x.shape[0], x.shape[1], entry_room(x, cells, layout), x.shape[3])
    return x.new_empty(shape, dtype=dtype) if layout.k_spans is None else x.new_zeros(shape, dtype=dtype)
