"""Kernels that append to a cache: the new rows of all streams go to their pages, then lengths move on.

A token without room, beyond the capacity or in a page that is not handed out, is not stored at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import launch, rows_contiguous, strided
from spdsl.runtime.tiles.kernel import Strided, jit
from spdsl.runtime.tiles.positions import cached_homes, cached_rows, row_of, span
from spdsl.runtime.tiles.tiles import at

_APPENDED = 32  # new tokens of a program; a decode step has one
_COLUMNS = 64  # numbers of a token that are copied at once, at most
_TABLE_ENTRIES = 64  # entries of the page table that are looked at at once


class Append(NamedTuple):
    """`added` tokens behind the last one of each sequence: spans int32 [S, 2] = (0, length), pages [S, page_width].

    new_spans int32 [S, 2] = (start, count): where a sequence's own tokens lie in the call, if not all are. row_of int32
    [S]: its row in what is not in pages, if not its own number.
    """

    spans: torch.Tensor
    pages: torch.Tensor | None
    page_width: int
    capacity: int
    added: int
    new_spans: torch.Tensor | None
    row_of: torch.Tensor | None


class Appended(NamedTuple):
    """New keys of one stream and their store, and its values if there are any. FIRST: of the programs of its heads."""

    new_k: Strided
    k: Strided
    new_v: Strided | None
    v: Strided | None
    FIRST: tl.constexpr
    HEADS: tl.constexpr
    QK_DIM: tl.constexpr
    QK_PADDED: tl.constexpr  # to a power of two
    V_DIM: tl.constexpr  # 0: no values
    V_PADDED: tl.constexpr


class AppendedValues(NamedTuple):
    """New rows [B, before, tokens, after] of a tensor over tokens, and their store, which is in no page."""

    new: Strided
    store: Strided
    ROWS: tl.constexpr
    DIM: tl.constexpr
    COLUMNS: tl.constexpr


@jit
def append_places(call, s, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """The new tokens of a program: row in the call, position, home (page or row), slot, whether it has room: [BLOCK]"""
    start, count = span(call.new_spans, s, call.added)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(call.spans + 2 * s + 1) + token
    room = (token < count) & (position < call.capacity)
    home, slot, room = cached_homes(call, s, position, room, PAGE)
    return start + token, position, home, slot, room


@jit
def copy_rows(new, store, s, h, token, home, slot, room, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """Rows `token` of a sequence and head of `new` to (home, slot) of `store`."""
    column = tl.arange(0, DIM_PADDED)[None, :]
    mask = room[:, None] & (column < DIM)
    new = at(new, s, h, 0)
    value = tl.load(new.data + token[:, None] * new.token + column, mask=mask, other=0)
    pointers = cached_rows(store, h, home, slot)[:, None] + column
    tl.store(pointers, value.to(store.data.dtype.element_ty), mask=mask)


@jit
def append_head(stream, s, row, token, home, slot, room):
    """If `row` counts a head of the stream: its keys, and values if there are any."""
    h = row - stream.FIRST
    if (h >= 0) & (h < stream.HEADS):
        copy_rows(stream.new_k, stream.k, s, h, token, home, slot, room, stream.QK_DIM, stream.QK_PADDED)
        if stream.V_DIM:
            copy_rows(stream.new_v, stream.v, s, h, token, home, slot, room, stream.V_DIM, stream.V_PADDED)


@jit
def copy_values(values, call, s, first, step, token, position, room):
    """Of a tensor over tokens every `step`-th row from `first` on: the numbers of a token, which are in no page."""
    for h in tl.range(first, values.ROWS, step):
        new, store = at(values.new, s, h, 0), at(values.store, row_of(call, s), h, 0)
        for start in tl.range(0, values.DIM, values.COLUMNS):
            column = start + tl.arange(0, values.COLUMNS)[None, :]
            mask = room[:, None] & (column < values.DIM)
            value = tl.load(new.data + token[:, None] * new.token + column, mask=mask, other=0)
            pointers = store.data + position[:, None] * store.token + column
            tl.store(pointers, value.to(store.data.dtype.element_ty), mask=mask)


@jit
def append_rows(
    streams, values, call,
    STREAMS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Keys and values of all streams, and what else each token has.  Grid (blocks of new tokens, heads, sequences).

    The heads of all streams count as one row of heads: a program has one of them.
    """
    row, s = tl.program_id(1), tl.program_id(2)
    token, position, home, slot, room = append_places(call, s, BLOCK, PAGE)
    for i in tl.static_range(STREAMS):
        append_head(streams[i], s, row, token, home, slot, room)
    for i in tl.static_range(VALUES):
        copy_values(values[i], call, s, row, tl.num_programs(1), token, position, room)


@jit
def append_lengths(dropped, call, ENTRIES: tl.constexpr, PAGE: tl.constexpr):
    """Lengths grow up to the capacity or the first hole in the pages; other tokens count as dropped.  Grid (S,)."""
    s = tl.program_id(0)
    length = tl.load(call.spans + 2 * s + 1).to(tl.int64)
    _, count = span(call.new_spans, s, call.added)
    end = tl.minimum(length + count, call.capacity)
    if PAGE:
        last = ((end + (PAGE - 1)) // PAGE).to(tl.int32)
        hole = last
        for first in tl.range((length // PAGE).to(tl.int32), last, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            page = tl.load(call.pages + tl.cast(s, tl.int64) * call.page_width + entry, mask=entry < last, other=0)
            hole = tl.minimum(hole, tl.min(tl.where(page < 0, entry, last), 0))
        end = tl.maximum(length, tl.minimum(end, hole.to(tl.int64) * PAGE))
    tl.store(call.spans + 2 * s + 1, end.to(tl.int32))
    tl.store(dropped + s, tl.load(dropped + s) + (count - (end - length)).to(tl.int32))


def append_block(call: Append) -> int:
    return 1 if call.added == 1 else _APPENDED


class NewRows(NamedTuple):
    """New keys [B, heads, T, qk] of a stream and their store, and its values if there are any."""

    new_k: Tensor
    k: Tensor
    new_v: Tensor | None
    v: Tensor | None


def launch_rows(
    streams: Sequence[NewRows], values: Sequence[tuple[Tensor, Tensor]], call: Append, page: int
) -> None:  # fmt: skip
    """The new rows of all streams, and of values: new [B, before, T, after], store [B, before, tokens, after].

    What is new may lie in one batch row for all sequences.
    """
    block, heads, sequences = append_block(call), [stream.k.shape[1] for stream in streams], len(call.spans)
    firsts = [sum(heads[:i]) for i in range(len(heads))]
    launch(
        append_rows, (triton.cdiv(call.added, block), sum(heads), sequences),
        tuple(_appended(stream, first, sequences) for stream, first in zip(streams, firsts, strict=True)),
        tuple(_appended_values(new, store, sequences) for new, store in values) or None, call,
        num_warps=1 if block == 1 else 4, num_stages=1,
        STREAMS=len(streams), VALUES=len(values), BLOCK=block, PAGE=page,
    )  # fmt: skip


def _appended(stream: NewRows, first: int, sequences: int) -> Appended:
    new_k, k, new_v, v = stream
    qk, v_dim = k.shape[3], 0 if v is None else v.shape[3]
    sizes = (first, k.shape[1], qk, triton.next_power_of_2(qk), v_dim, triton.next_power_of_2(max(1, v_dim)))
    return Appended(
        strided(rows_contiguous(new_k), sequences), strided(k),
        None if new_v is None else strided(rows_contiguous(new_v), sequences), None if v is None else strided(v),
        *(tl.constexpr(size) for size in sizes),
    )  # fmt: skip


def _appended_values(new: Tensor, store: Tensor, sequences: int) -> AppendedValues:
    new = rows_contiguous((new.view(torch.uint8) if new.dtype == torch.bool else new).to(store.dtype))
    rows, dim = store.shape[1], store.shape[3]
    columns = min(_COLUMNS, triton.next_power_of_2(max(1, dim)))
    sizes = (tl.constexpr(size) for size in (rows, dim, columns))
    return AppendedValues(strided(new, sequences), strided(store), *sizes)


def launch_lengths(dropped: Tensor, call: Append, page: int) -> None:
    """After everything that is stored at the old lengths."""
    launch(
        append_lengths, (len(call.spans),), dropped, call, num_warps=1, num_stages=1,
        ENTRIES=_TABLE_ENTRIES, PAGE=page,
    )  # fmt: skip
