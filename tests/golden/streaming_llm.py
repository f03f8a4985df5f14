# Made by spdsl 0.1.0 from streaming_llm.spat, pattern streaming_llm, source sha256 88eae28016c8027a.
"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window. Keys keep the rotation they come with.

    pattern streaming_llm {
        param  sinks = 4, window = 1020
        causal
        return attend(sink(sinks) | sliding(window))
    }

    import streaming_llm
    out = streaming_llm.attention(q, k, v)
    cache = streaming_llm.Cache(batch, capacity, ...)
    out = streaming_llm.prefill(q, k, v, cache)
    out = streaming_llm.decode(q, k, v, cache)

Needs torch, and triton on a GPU. How to read: 1 what the pattern says, 2 tiles, 3 kernels, 4 the CPU path,
5 configurations, 6 launches, 7 operators, 8 public functions.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial, wraps
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the kernels are defined and never launched: CPU tensors take the torch path
    triton = SimpleNamespace(jit=lambda f: f, knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    tl = SimpleNamespace(constexpr=lambda x: x)

PATTERN = "streaming_llm"
PARAMS = {"sinks": 4, "window": 1020}
PHASES = ("train", "prefill", "decode")
# One per module, so that two of them live side by side.
NAMESPACE = "spdsl_streaming_llm_57c8c1cdd50ed9f760d6439c8af9e1116b720f0586fe43e1c157e9983a38189a"
while hasattr(getattr(torch.ops, NAMESPACE), "attend_forward"):  # imported again, or reloaded
    NAMESPACE += "_again"
CPU_BLOCK = 64  # keys per block where a CPU tile asks the tensors what it visits


# ---- 1. What the pattern says ---------------------------------------------------------------------------------------


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT32_MOST = 2**31 - 1


def expect(holds: bool, name: str, expected: str, got: object, *filled: object) -> None:
    """Raises ValueError `name: expected ..., got ...` unless `holds`; `filled` stands for each {} of `expected`.

    Text is made of sizes only when it is needed: torch.compile would take a size that is printed for a constant, and
    compile again for every length.
    """
    if not holds:
        raise ValueError(f"{name}: expected {expected.format(*filled)}, got {got}")


def expect_tensor(name: str, x: object) -> None:
    """A tensor that lies in memory as its strides say, and of which no derivative is asked that there is not."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        kind = "a nested one" if x.is_nested else f"a quantized one, {x.dtype}" if x.is_quantized else str(x.layout)
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if not torch.compiler.is_compiling():
        refuse_transform(name, x)


def refuse_transform(name: str, x: Tensor) -> None:
    """Derivatives that do not pass a custom operator; without this check forward-mode ones would come out as 0."""
    if forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{name}: no forward-mode derivative (jvp); use backward")
    if asked_of_functorch("is_gradtrackingtensor", x):
        raise NotImplementedError(f"{name}: no derivative by torch.func (grad, vjp, jacrev); use backward")


def asked_of_functorch(question: str, x: Tensor) -> bool:
    """Private to PyTorch: a version without the question has to say by itself what it cannot do."""
    answer = getattr(getattr(torch._C, "_functorch", None), question, None)
    return answer is not None and bool(answer(x))


def expect_number(name: str, x: object, expected: str, least: int = 0, most: int = INT32_MOST) -> int:
    """x as an int between the bounds. Raises TypeError for a bool, a float or a tensor, ValueError out of bounds."""
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt | Integral):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    number: Any = x if isinstance(x, int | torch.SymInt) else int(x)
    expect(least <= number <= most, name, expected, number)
    return number  # type: ignore[no-any-return]


def expect_flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False, got {type(x).__name__}")


def expect_dtype(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    expect(dtype in DTYPES, "dtype", "float16, bfloat16, float32 or float64", dtype)


def on_host(x: Tensor) -> bool:
    """Whether its values are there to be looked at: not on a GPU, nor while PyTorch traces or maps."""
    plain = x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()
    return plain and not asked_of_functorch("is_functorch_wrapped_tensor", x)


class Layout(NamedTuple):
    """The sequences of a call.

    Dense: neither spans nor offsets; sequence s is batch row s, its last query stands at its last key.
    Spans [S, 2] = (start, count), int32: packed sequences (batch 1) or padded ones (batch S).
    Offsets: row i has position q_offset + i, key j k_offset + j (one part of a longer sequence).
    """

    q_spans: Tensor | None
    k_spans: Tensor | None
    q_offset: int | None
    k_offset: int | None
    longest: int  # rows, and with spans also keys, of the longest sequence, or more
    keys: int  # tokens of a batch row of keys


class Corner(NamedTuple):
    """One sequence (or a dense batch of them) as slices, and the positions of its first row and key.

    `keys` are entries of the stream that is read, `tokens` the tokens that they stand for.
    """

    sequences: slice
    batch: slice
    rows: slice
    keys: slice
    tokens: slice
    q_origin: int
    k_origin: int
    length: int


def checked_layout(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    lengths: Tensor | None,
    q_offset: int | None,
    k_offset: int | None,
) -> Layout:
    """As `layout_of`, with a look at the numbers of sequences where that costs nothing."""
    layout = layout_of(q, k, cu_seqlens, max_seqlen, lengths, q_offset, k_offset)
    if cu_seqlens is not None and on_host(cu_seqlens):
        _expect_rising(cu_seqlens.tolist(), q.shape[2], layout.longest)
    if lengths is not None and on_host(lengths):
        outside = [length for length in lengths.tolist() if not 0 <= length <= layout.longest]
        expect(not outside, "lengths", "numbers from 0 to {}", outside[:8], layout.longest)
    return layout


def layout_of(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    lengths: Tensor | None,
    q_offset: int | None,
    k_offset: int | None,
) -> Layout:
    """The layout that the arguments of a call describe. Raises ValueError on contradictions."""
    given = [cu_seqlens is not None, lengths is not None, q_offset is not None or k_offset is not None]
    expect(sum(given) <= 1, "cu_seqlens, lengths, q_offset", "at most one of them", sum(given))
    if cu_seqlens is not None:
        expect(q.shape[0] == 1, "q", "batch 1 with cu_seqlens", q.shape[0])
        expect(q.shape[2] == k.shape[2], "k", "{} tokens like q, with cu_seqlens", k.shape[2], q.shape[2])
        _expect_numbers("cu_seqlens", cu_seqlens, "int [sequences + 1]", q)
        expect(len(cu_seqlens) > 1, "cu_seqlens", "int [sequences + 1]", (cu_seqlens.dtype, cu_seqlens.shape))
        longest = q.shape[2] if max_seqlen is None else _longest(max_seqlen, q.shape[2])
        spans = _between(cu_seqlens, q.shape[2])
        return Layout(spans, spans, None, None, longest, k.shape[2])
    expect(max_seqlen is None, "max_seqlen", "None without cu_seqlens", max_seqlen)
    if lengths is not None:
        _expect_numbers("lengths", lengths, "int [{}]", q)
        expect(len(lengths) == q.shape[0], "lengths", "int [{}]", (lengths.dtype, lengths.shape), q.shape[0])
        most = max(q.shape[2], k.shape[2])
        q_spans, k_spans = (_at_the_end(lengths, size, most) for size in (q.shape[2], k.shape[2]))
        return Layout(q_spans, k_spans, None, None, most, k.shape[2])
    if q_offset is None and k_offset is None:
        return Layout(None, None, None, None, q.shape[2], k.shape[2])
    if q_offset is None or k_offset is None:
        raise ValueError("q_offset, k_offset: expected both of them, got one")
    q_offset = expect_number("q_offset", q_offset, "a position >= 0", 0, INT32_MOST - q.shape[2])
    k_offset = expect_number("k_offset", k_offset, "a position >= 0", 0, INT32_MOST - k.shape[2])
    return Layout(None, None, q_offset, k_offset, q.shape[2], k.shape[2])


def _expect_numbers(name: str, x: Tensor, expected: str, q: Tensor) -> None:
    """int [n] on the device of q."""
    expect_tensor(name, x)
    whole = x.dim() == 1 and x.dtype in (torch.int32, torch.int64)
    expect(whole, name, expected, (x.dtype, x.shape), q.shape[0])
    expect(x.device == q.device, name, f"device {q.device}", x.device)


def _longest(max_seqlen: int, tokens: int) -> int:
    if torch.compiler.is_compiling():  # it may be a number that nobody knows yet
        return max_seqlen
    return min(expect_number("max_seqlen", max_seqlen, "a number of tokens"), tokens)


def _expect_rising(ends: Sequence[int], tokens: int, longest: int) -> None:
    rising = ends[0] == 0 and ends[-1] <= tokens and all(first <= end for first, end in pairwise(ends))
    expect(rising, "cu_seqlens", f"rising numbers from 0 to at most {tokens}", ends[:8])
    most = max(end - first for first, end in pairwise(ends))
    expect(most <= longest, "max_seqlen", f"at least {most}", longest)


def _between(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Spans (start, count), int32. On the CPU wrong ones stay wrong, and are seen where they are read; on a GPU,
    where nobody looks, they are brought into the tensor."""
    ends = cu_seqlens.long()
    if ends.device.type != "cpu":
        ends = ends.clamp(0, tokens).cummax(0).values
    spans = torch.stack([ends[:-1], ends[1:] - ends[:-1]], 1)
    return spans.clamp(-INT32_MOST, INT32_MOST).int()


def sizes_of(q: Tensor, k: Tensor, layout: Layout) -> tuple[int, int]:
    """Entries of a token axis, and the end of all positions: both count from position 0 of the whole sequence."""
    if layout.q_offset is None or layout.k_offset is None:
        return k.shape[2], k.shape[2]
    end = _length(layout.q_offset, layout.k_offset, q.shape[2], k.shape[2])
    return end, end


def _at_the_end(lengths: Tensor, size: int, most: int) -> Tensor:
    """Left padding: the last `lengths` tokens of `size` are real. Wrong ones as in `_between`."""
    counts = lengths.clamp(0, size)
    if lengths.device.type == "cpu":
        counts = counts.masked_fill((lengths < 0) | (lengths > most), -1)
    return torch.stack([size - counts, counts], 1).int()


def corners(q: Tensor, layout: Layout) -> Iterator[Corner]:
    """The sequences one by one; a dense batch is one corner. Reads the spans on the host (CPU tensors)."""
    if layout.k_spans is None:
        rows, keys = q.shape[2], layout.keys
        q_origin = keys - rows if layout.q_offset is None else layout.q_offset
        k_origin = layout.k_offset or 0
        length = _length(q_origin, k_origin, rows, keys)
        tokens = slice(0, keys)
        yield Corner(slice(None), slice(None), slice(0, rows), tokens, tokens, q_origin, k_origin, length)
        return
    k_spans = layout.k_spans.tolist()
    q_spans = [[0, q.shape[2]]] * len(k_spans) if layout.q_spans is None else layout.q_spans.tolist()
    _expect_inside(q_spans, q.shape[2], layout)
    for s, (q_span, k_span) in enumerate(zip(q_spans, k_spans, strict=True)):
        batch = slice(None) if q.shape[0] == 1 else slice(s, s + 1)
        row_slice, key_slice = slice(q_span[0], sum(q_span)), slice(k_span[0], sum(k_span))
        yield Corner(slice(s, s + 1), batch, row_slice, key_slice, key_slice, k_span[1] - q_span[1], 0, k_span[1])


def _expect_inside(spans: list[list[int]], rows: int, layout: Layout) -> None:
    """What only the host can check: spans one after the other or at the end, none longer than stated."""
    inside = all(start >= 0 and count >= 0 and start + count <= rows for start, count in spans)
    ends = [*(start for start, _ in spans[:1]), *(start + count for start, count in spans)]
    placed = all(end == rows for end in ends[1:]) or ends[:-1] == [start for start, _ in spans]
    name, expected = "cu_seqlens, lengths", f"rising numbers from 0 to at most {rows}"
    expect(inside and placed, name, expected, f"[start, count] {spans[:8]}")
    longest = max((count for _, count in spans), default=0)
    expect(layout.q_spans is None or longest <= layout.longest, "max_seqlen", f"at least {longest}", layout.longest)


def _length(q_origin: int, k_origin: int, rows: int, keys: int) -> int:
    """Keys of the whole sequence, as far as this call knows: up to its last key or its last query."""
    return max(k_origin + keys, q_origin + rows)


def attend_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return (k <= q) & ((k < 4) | (q - k < 1020))


def attend_visits(q_first: int, q_last: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that rows q_first..q_last may see for any head: (first, end, full_first, full_end)."""
    ranges = []
    ranges.append((0, min(4, q_last + 1), 0, min(4, q_first + 1)))

    ranges.append((max(0, q_first - 1019), q_last + 1, max(0, q_last - 1019), q_first + 1))

    return ranges


def attend_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    ranges = []
    ranges.append((0, min(4, q + 1), 0, 0))

    ranges.append((max(0, q - 1019), q + 1, 0, 0))

    return ranges


# ---- 2. Tiles -------------------------------------------------------------------------------------------------------


jit = triton.jit

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E): the hardware has exp2 only
LN2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A tensor [batch, head, token, ...] for a kernel: its data and its strides in elements (the last one is 1)."""

    data: torch.Tensor
    batch: int
    head: int
    token: int


class Source(NamedTuple):
    """The keys and values of one stream: [batch, head, token, dim], or [page, head, PAGE, dim] with a page table.

    `spans` int32 [S, 2] = (start, count) of each sequence's keys; without it every sequence has `keys` of them.
    """

    k: Strided
    v: Strided
    keys: int
    spans: torch.Tensor | None
    pages: torch.Tensor | None
    page_width: int
    GROUP: tl.constexpr  # query heads per head of the stream


class Call(NamedTuple):
    """The rows and tokens of a call. Row i has position q_offset + i and token j k_offset + j, if given."""

    q_count: int
    k_count: int
    q_spans: torch.Tensor | None
    k_spans: torch.Tensor | None
    q_offset: int | None
    k_offset: int | None
    LEAVES: tl.constexpr  # whether programs of a result that does not answer at a sequence's length return at once


class Rows(NamedTuple):
    """One tile of query rows: q in two parts, positions [rows, 1], query head."""

    q0: tl.tensor
    q1: tl.tensor
    position: tl.tensor
    head: tl.tensor


class RowGrads(NamedTuple):
    """What the backward knows of a tile of rows: dout in two parts, lse [rows, 1] (base 2), delta [rows, 1]."""

    dout0: tl.tensor
    dout1: tl.tensor
    lse: tl.tensor
    delta: tl.tensor


class Keys(NamedTuple):
    """The keys of one sequence and head: key j has position origin + j; `length` is the end of all positions."""

    k: Strided
    v: Strided
    pages: tl.tensor
    origin: tl.tensor
    count: tl.tensor
    length: tl.tensor


class KeyBlock(NamedTuple):
    """One block of keys and values in two parts each, positions [keys, 1]; `end` is the position after the last key."""

    k0: tl.tensor
    k1: tl.tensor
    v0: tl.tensor
    v1: tl.tensor
    position: tl.tensor
    end: tl.tensor
    length: tl.tensor


class HeadRows(NamedTuple):
    """All rows of one query head of a sequence: row i has position origin + i."""

    q: Strided
    dout: Strided
    lse: Strided
    delta: Strided
    head: tl.tensor
    origin: tl.tensor
    count: tl.tensor


class Range(NamedTuple):
    """Blocks first..end - 1 to visit; those of full_first..full_end - 1 need no mask."""

    first: tl.tensor
    full_first: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


class RangeVisit(NamedTuple):
    """The blocks of one program: how many are full and partial, and the ranges they lie in."""

    full_count: tl.tensor
    partial_count: tl.tensor
    ranges: tl.tuple


class Const(NamedTuple):
    """What a kernel is compiled for (all tl.constexpr).

    A head dimension is loaded in at most two parts of power-of-two widths, D0 + D1 >= dim (80 = 64 + 16); D1 = 0: one.
    """

    QK_DIM: tl.constexpr
    QK0: tl.constexpr
    QK1: tl.constexpr
    V_DIM: tl.constexpr
    V0: tl.constexpr
    V1: tl.constexpr
    BLOCK_M: tl.constexpr  # rows of a tile; in decode the query heads of a program, padded to 16
    BLOCK_N: tl.constexpr  # keys of a block
    GROUP: tl.constexpr  # query heads of a program (decode, dK/dV)
    SPLITS: tl.constexpr  # programs per group in decode
    PAGE: tl.constexpr  # keys per page; 0: not paged
    SCALE: tl.constexpr
    ACC: tl.constexpr  # dtype of accumulators
    PRECISION: tl.constexpr  # of fp32 dots


@jit
def span(spans, s, count):
    """-> (start, count) of sequence s; without spans every sequence starts at 0 and has `count` tokens."""
    start = tl.full((), 0, tl.int64)
    if spans is not None:
        start = tl.load(spans + 2 * s).to(tl.int64)
        count = tl.load(spans + 2 * s + 1)
    return start, count


@jit
def row_origin(call, s, q_count):
    """Position of row 0. By default the last row stands at the last token."""
    _, k_count = span(call.k_spans, s, call.k_count)
    origin = k_count - q_count
    if call.q_offset is not None:
        origin = call.q_offset
    return origin


@jit
def cached_homes(call, s, position, there, PAGE: tl.constexpr):
    """Home (page or sequence) and slot of cached tokens, and whether they have one."""
    home, slot = tl.zeros_like(position) + s, position
    if PAGE:
        page = tl.cast(s, tl.int64) * call.page_width + position // PAGE
        home = tl.load(call.pages + page, mask=there, other=-1).to(tl.int64)
        there, slot = there & (home >= 0), position % PAGE
    return home, slot, there


@jit
def cached_rows(store, h, home, slot):
    """Where the rows (home, slot) of a head begin."""
    return store.data + (tl.cast(h, tl.int64) * store.head + home * store.batch + slot * store.token)


@jit
def at(x, s, h, start):
    """Tensor x from token `start` of a sequence and a head on.  int64: a large tensor passes 2^31 elements."""
    data = x.data + tl.cast(s, tl.int64) * x.batch + tl.cast(h, tl.int64) * x.head
    data += tl.cast(start, tl.int64) * x.token
    return Strided(data, x.batch, x.head, x.token)


@jit
def token_pointer(x, token):
    return x.data + tl.cast(token, tl.int64) * x.token


@jit
def load_row_values(x, row, left, other, C):
    """One value per row (lse, delta)."""
    i = tl.arange(0, C.BLOCK_M)
    return tl.load(token_pointer(x, row) + i.to(tl.int64) * x.token, mask=i < left, other=other)


@jit
def store_row_values(x, row, left, values, C):
    i = tl.arange(0, C.BLOCK_M)
    tl.store(token_pointer(x, row) + i.to(tl.int64) * x.token, values, mask=i < left)


@jit
def key_pointer(x, pages, block, C):
    """First key of a block.  Paged: x is [pages, Hkv, PAGE, D] and BLOCK_N divides PAGE."""
    start = tl.cast(block, tl.int64) * C.BLOCK_N
    data = x.data
    if C.PAGE:
        data += tl.load(pages + start // C.PAGE).to(tl.int64) * x.batch
        start = start % C.PAGE
    return data + start * x.token


@jit
def load_part(
    data,
    stride,
    left,
    ROWS: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    first=0,
):
    """[ROWS, WIDTH] tile of columns START.. ; rows from `left` on (if MASKED) and columns from DIM on are 0.

    `first` is the token of row 0, counted from `data`. What changes with a loop belongs here, not into `data`: offsets
    of rows are then made anew, by one instruction for each, and do not occupy 64-bit registers throughout the loop.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = START + tl.arange(0, WIDTH)[None, :]
    pointers = data + (first + row).to(tl.int64) * stride + column
    if START + WIDTH > DIM:
        if MASKED:
            tile = tl.load(pointers, mask=(row < left) & (column < DIM), other=0.0)
        else:
            tile = tl.load(pointers, mask=column < DIM, other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=row < left, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@jit
def load_qk(data, stride, left, ROWS: tl.constexpr, MASKED: tl.constexpr, C, first=0):
    """Rows of q or k in two parts; the second is the scalar 0.0 when it has no width."""
    part0 = load_part(data, stride, left, ROWS, 0, C.QK0, C.QK_DIM, MASKED, first)
    part1 = 0.0
    if C.QK1:
        part1 = load_part(data, stride, left, ROWS, C.QK0, C.QK1, C.QK_DIM, MASKED, first)
    return part0, part1


@jit
def load_v(data, stride, left, ROWS: tl.constexpr, MASKED: tl.constexpr, C, first=0):
    """Rows of v, out or dout in two parts."""
    part0 = load_part(data, stride, left, ROWS, 0, C.V0, C.V_DIM, MASKED, first)
    part1 = 0.0
    if C.V1:
        part1 = load_part(data, stride, left, ROWS, C.V0, C.V1, C.V_DIM, MASKED, first)
    return part0, part1


@jit
def store_part(
    data, stride, left, tile, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    row = tl.arange(0, ROWS)[:, None]
    column = START + tl.arange(0, WIDTH)[None, :]
    tl.store(
        data + row.to(tl.int64) * stride + column, tile.to(data.dtype.element_ty), mask=(row < left) & (column < DIM)
    )


@jit
def store_qk(data, stride, left, part0, part1, ROWS: tl.constexpr, C):
    store_part(data, stride, left, part0, ROWS, 0, C.QK0, C.QK_DIM)
    if C.QK1:
        store_part(data, stride, left, part1, ROWS, C.QK0, C.QK1, C.QK_DIM)


@jit
def store_v(data, stride, left, part0, part1, ROWS: tl.constexpr, C):
    store_part(data, stride, left, part0, ROWS, 0, C.V0, C.V_DIM)
    if C.V1:
        store_part(data, stride, left, part1, ROWS, C.V0, C.V1, C.V_DIM)


@jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """An accumulator; a part of no width is the scalar 0.0, which costs nothing."""
    if WIDTH:  # noqa: SIM108 (only a branch on a constant may give two types)
        tile = tl.zeros((ROWS, WIDTH), dtype=ACC)
    else:
        tile = 0.0
    return tile


@jit
def dot(a, b, total, C):
    """total + a b"""
    return tl.dot(a, b, total, input_precision=C.PRECISION, out_dtype=C.ACC)


@jit
def dot_rows(a0, a1, b0, b1, D1: tl.constexpr, C):
    """a b^T over both parts."""
    product = tl.dot(a0, tl.trans(b0), input_precision=C.PRECISION, out_dtype=C.ACC)
    if D1:
        product = dot(a1, tl.trans(b1), product, C)
    return product


@jit
def dot_columns(a, b0, b1, total0, total1, D1: tl.constexpr, C):
    """total + a b, both parts of it."""
    total0 = dot(a, b0, total0, C)
    if D1:
        total1 = dot(a, b1, total1, C)
    return total0, total1


@jit
def load_rows(q, row, left, position, h, C):
    q0, q1 = load_qk(token_pointer(q, row), q.token, left, C.BLOCK_M, True, C)
    return Rows(q0, q1, (position + tl.arange(0, C.BLOCK_M))[:, None], h)


@jit
def load_lse(lse, row, left, C):
    """lse in base 2.  A row without keys (-inf), or past the end, becomes +inf: p = exp2(s - inf) = 0, never NaN."""
    value = load_row_values(lse, row, left, float("-inf"), C)
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@jit
def row_delta(out, dout, dlse, delta, q_count, C):
    """delta of one tile of rows.  Rows outside of all spans get one too; nobody reads it."""
    tile, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * C.BLOCK_M
    left = q_count - row
    out = at(out, s, h, 0)
    dout = at(dout, s, h, 0)
    out0, out1 = load_v(token_pointer(out, row), out.token, left, C.BLOCK_M, True, C)
    dout0, dout1 = load_v(token_pointer(dout, row), dout.token, left, C.BLOCK_M, True, C)
    total = tl.sum(out0.to(C.ACC) * dout0.to(C.ACC), 1)
    if C.V1:
        total += tl.sum(out1.to(C.ACC) * dout1.to(C.ACC), 1)
    if dlse is not None:
        total -= load_row_values(at(dlse, s, h, 0), row, left, 0.0, C)
    store_row_values(at(delta, s, h, 0), row, left, total, C)


# A range of elements becomes blocks first..end, with full blocks (no mask) full_first..full_end inside:
#
#     first ... full_first ... full_end ... end
#        partial        full         partial
#
# Every kernel has two loops, over the full and over the partial blocks of all ranges together: one loop for each piece
# would repeat the loop body three times for each range, which costs instruction cache, registers and compile time.
# disable_licm: code hoisted out of one loop occupies registers during the other, too, and dK/dV would spill.


@jit
def to_blocks(first, end, full_first, full_end, cursor, count, BLOCK: tl.constexpr):
    """Elements -> blocks, clipped to 0..count, without the blocks before `cursor`; -> Range, new cursor.

    Ranges come ordered by `first` and may overlap: `cursor` is the first block that no range has taken yet.
    Bounds are clamped at 0 before they are divided, because // rounds toward zero.
    """
    end = tl.minimum(end, count)
    first = tl.maximum(first, 0)
    first_block = tl.where(first < end, tl.maximum(first // BLOCK, cursor), cursor)
    end_block = tl.where(first < end, tl.maximum(tl.cdiv(end, BLOCK), first_block), cursor)
    full_first_block = tl.cdiv(tl.maximum(full_first, 0), BLOCK)
    full_first_block = tl.minimum(tl.maximum(full_first_block, first_block), end_block)
    full_end_block = tl.maximum(tl.minimum(full_end, count), 0) // BLOCK
    full_end_block = tl.minimum(tl.maximum(full_end_block, full_first_block), end_block)
    return Range(first_block, full_first_block, full_end_block, end_block), end_block


@jit
def jump(block, gap_first, gap_end):
    """Blocks from gap_first on move behind the gap."""
    return block + tl.where(block >= gap_first, gap_end - gap_first, 0)


@jit
def sequence_keys(source, s, h, call, C):
    """The keys that query head h of sequence s reads."""
    start, count = span(source.spans, s, source.keys)
    origin = 0
    if call.k_offset is not None:
        origin = call.k_offset
    pages = 0  # a jit function of triton 3.6 cannot return a None
    entry = s
    if C.PAGE:  # the batch dimension holds pages, found through row s of the page table
        pages = source.pages + tl.cast(s, tl.int64) * source.page_width
        entry = 0
    head = h // source.GROUP
    _, tokens = span(call.k_spans, s, call.k_count)
    length = origin + tokens
    if call.q_offset is not None:  # the part of a longer sequence that this call knows
        length = tl.maximum(length, call.q_offset + call.q_count)
    return Keys(at(source.k, entry, head, start), at(source.v, entry, head, start), pages, origin, count, length)


@jit
def start_softmax(sink, h, C):
    """-> m, total before the first key.  A sink is a key without value that every row sees, there from the start."""
    m = tl.full((C.BLOCK_M,), float("-inf"), C.ACC)
    total = tl.zeros((C.BLOCK_M,), dtype=C.ACC)
    if sink is not None:
        m = tl.zeros((C.BLOCK_M,), dtype=C.ACC) + tl.load(sink + h).to(C.ACC) * LOG2E
        total = tl.where(m == float("-inf"), 0.0, 1.0).to(C.ACC)
    return m, total


@jit
def softmax_step(s, unit, m, total):
    """-> p, decay, m, total with one more block of scores s, which are in base 2 once multiplied by `unit`.

    m is the running maximum and total the sum of p = exp2(s - m); earlier sums shrink by decay.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * unit)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: -inf - -inf would be NaN
    p = tl.exp2(s * unit - shift[:, None])
    decay = tl.exp2(m - shift)
    return p, decay, m_new, total * decay + tl.sum(p, 1)


@jit
def add_values(acc0, acc1, p, decay, v0, v1, C):
    """Adds p v to both parts of the output."""
    p = p.to(v0.dtype)
    acc0 = dot(p, v0, acc0 * decay[:, None], C)
    if C.V1:
        acc1 = dot(p, v1, acc1 * decay[:, None], C)
    return acc0, acc1


class Splits(NamedTuple):
    """A softmax of one query, in splits over its keys: out [B, Hq, splits, D], lse [B, Hq, splits] in base 2; wide.

    A split without a visible key has lse -inf, and its out is not read. The sink, logits [Hq], is in none of them.
    """

    out: Tensor
    lse: Tensor
    sink: Tensor | None
    dtype: torch.dtype  # of the whole

    def summed(self) -> tuple[Tensor, Tensor]:
        """What two ways to split have in common: out without the sink, in the call's dtype; lse in natural units."""
        lse = self.lse * math.log(2)
        shares = torch.softmax(lse, -1).nan_to_num().unsqueeze(-1)
        return torch.where(shares > 0, shares * self.out, 0.0).sum(2).to(self.dtype), torch.logsumexp(lse, -1)


class JoinPart(NamedTuple):
    """Splits for a kernel: they belong to one branch, and `LAST` are the last of it."""

    out: Tensor
    lse: Tensor
    sink: Tensor | None
    splits: int
    BRANCH: tl.constexpr
    LAST: tl.constexpr


class JoinConst(NamedTuple):
    """What the kernel is compiled for (all tl.constexpr)."""

    PARTS: tl.constexpr
    BRANCHES: tl.constexpr
    DIM: tl.constexpr  # 0: log-sum-exps alone
    DIM_PADDED: tl.constexpr  # to a power of two
    STEP: tl.constexpr  # splits that are added at once
    ACC: tl.constexpr  # dtype of sums


@jit
def add_sink(acc, top, total, sink, h, C):
    """Takes up its share of the softmax."""
    logit = tl.load(sink + h).to(C.ACC) * LOG2E
    new = tl.maximum(top, logit)
    origin = tl.where(new == float("-inf"), 0.0, new)
    decay = tl.exp2(top - origin)
    return acc * decay, new, total * decay + tl.exp2(logit - origin)


@jit
def add_splits(acc, top, total, part, row, C):
    """Online softmax over the splits of a part: acc [DIM_PADDED], maximum and total of the weights."""
    dims = tl.arange(0, C.DIM_PADDED)
    for first in tl.range(0, part.splits, C.STEP):
        split = first + tl.arange(0, C.STEP)
        own = tl.load(part.lse + row * part.splits + split, mask=split < part.splits, other=float("-inf"))
        new = tl.maximum(top, tl.max(own, 0))
        origin = tl.where(new == float("-inf"), 0.0, new)
        decay = tl.exp2(top - origin)
        weight = tl.exp2(own - origin)
        if C.DIM:
            place = (row * part.splits + split)[:, None] * C.DIM + dims[None, :]
            x = tl.load(part.out + place, mask=(own != float("-inf"))[:, None] & (dims < C.DIM)[None, :], other=0.0)
            acc = acc * decay + tl.sum(weight[:, None] * x, 0)
        total = total * decay + tl.sum(weight, 0)
        top = new
    return acc, top, total


@jit
def join_splits(parts, gates, out, lse, C):
    """The parts of each branch merged, the branches added by gates.  Grid (sequences, heads).

    -> out [S, Hq, DIM], natural-log lse [S, Hq, BRANCHES]. A sink enters here, so once for any number of splits.
    """
    s, h = tl.program_id(0), tl.program_id(1)
    row = s.to(tl.int64) * tl.num_programs(1) + h
    whole = tl.zeros([C.DIM_PADDED], C.ACC)
    acc, top, total = whole, tl.full([], float("-inf"), C.ACC), tl.full([], 0.0, C.ACC)
    for i in tl.static_range(C.PARTS):
        part = parts[i]
        if part.sink is not None:
            acc, top, total = add_sink(acc, top, total, part.sink, h, C)
        acc, top, total = add_splits(acc, top, total, part, row, C)
        if part.LAST:
            origin = tl.where(top == float("-inf"), 0.0, top)
            tl.store(lse + row * C.BRANCHES + part.BRANCH, (origin + tl.log2(total)) * LN2)
            branch = acc / tl.where(total == 0.0, 1.0, total)
            if gates is not None:
                branch *= tl.load(at(gates, s, h, 0).data + part.BRANCH).to(C.ACC)
            whole += branch
            acc, top, total = tl.zeros_like(acc), tl.full([], float("-inf"), C.ACC), tl.full([], 0.0, C.ACC)
    if C.DIM:
        dims = tl.arange(0, C.DIM_PADDED)
        tl.store(out + row * C.DIM + dims, whole.to(out.dtype.element_ty), mask=dims < C.DIM)


# ---- 3. Kernels -----------------------------------------------------------------------------------------------------


@jit
def attend_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (streaming_llm.spat:5)"""
    return (k <= q) & ((k < 4) | (q - k < 1020))


@jit
def attend_keys_0(q_first, q_last, h, length):
    """Keys that rows q_first..q_last may see: [first, end), all of them visible in [full_first, full_end)."""
    first = 0
    end = tl.minimum(4, q_last + 1)
    full_first = 0
    full_end = tl.minimum(4, q_first + 1)
    return first, end, full_first, full_end


@jit
def attend_keys_1(q_first, q_last, h, length):
    """Keys that rows q_first..q_last may see: [first, end), all of them visible in [full_first, full_end)."""
    first = tl.maximum(0, q_first - 1019)
    end = q_last + 1
    full_first = tl.maximum(0, q_last - 1019)
    full_end = q_first + 1
    return first, end, full_first, full_end


@jit
def attend_rows_0(k_first, k_last, h, length, q_begin, q_end):
    """Rows of [q_begin, q_end) that may see keys k_first..k_last."""
    first = tl.maximum(k_first, q_begin)
    end = tl.minimum(k_last + 1020, q_end)
    full_first = tl.maximum(k_last, q_begin)
    full_end = tl.minimum(k_first + 1020, q_end)
    return first, end, full_first, full_end


@jit
def attend_rows_1(k_first, k_last, h, length, q_begin, q_end):
    """Rows of [q_begin, q_end) that may see keys k_first..k_last."""
    first = tl.maximum(k_first, q_begin)
    end = q_end
    end = tl.where(k_first < 4, end, first)
    full_first = tl.maximum(k_last, q_begin)
    full_end = q_end
    full_end = tl.where(k_last < 4, full_end, full_first)
    return first, end, full_first, full_end


@jit
def attend_visit_keys(h, q_first, q_last, keys, C):
    """The key blocks that rows q_first..q_last may see."""
    o = keys.origin  # positions -> elements of the sequence
    cursor = 0
    first, end, full_first, full_end = attend_keys_0(q_first, q_last, h, keys.length)
    range0, cursor = to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, keys.count, C.BLOCK_N)
    first, end, full_first, full_end = attend_keys_1(q_first, q_last, h, keys.length)
    range1, cursor = to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, keys.count, C.BLOCK_N)
    full = range0.full_end - range0.full_first + range1.full_end - range1.full_first
    total = range0.end - range0.first + range1.end - range1.first
    return RangeVisit(full, total - full, (range0, range1))


@jit
def attend_visit_rows(rows, k_first, k_last, length, C):
    """The row tiles that may see keys k_first..k_last."""
    o = rows.origin
    stop = rows.origin + rows.count
    cursor = 0
    first, end, full_first, full_end = attend_rows_0(k_first, k_last, rows.head, length, o, stop)
    range0, cursor = to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, rows.count, C.BLOCK_M)
    first, end, full_first, full_end = attend_rows_1(k_first, k_last, rows.head, length, o, stop)
    range1, cursor = to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, rows.count, C.BLOCK_M)
    full = range0.full_end - range0.full_first + range1.full_end - range1.full_first
    total = range0.end - range0.first + range1.end - range1.first
    return RangeVisit(full, total - full, (range0, range1))


@jit
def attend_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = visit.ranges[0].first + i
        block = jump(block, visit.ranges[0].full_first, visit.ranges[0].full_end)
        block = jump(block, visit.ranges[0].end, visit.ranges[1].first)
        block = jump(block, visit.ranges[1].full_first, visit.ranges[1].full_end)
    else:
        block = visit.ranges[0].full_first + i
        block = jump(block, visit.ranges[0].full_end, visit.ranges[1].full_first)
    return block


@jit
def attend_span_0(q, length):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = 0
    end = tl.minimum(4, q + 1)
    return first, end


@jit
def attend_span_1(q, length):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = tl.maximum(0, q - 1019)
    end = q + 1
    return first, end


@jit
def attend_scores(product, q, k, h, length, C):
    """-> scores, whose product with attend_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@jit
def attend_unit(C):
    return C.SCALE * LOG2E


@jit
def attend_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, C):
    """Online softmax over `count` blocks: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    for i in tl.range(0, count, disable_licm=True):
        block = attend_block(visit, i, MASKED)
        start = block * C.BLOCK_N
        left = keys.count - start
        k_position = (keys.origin + start + tl.arange(0, C.BLOCK_N))[None, :]

        k0, k1 = load_qk(key_pointer(keys.k, keys.pages, block, C), keys.k.token, left, C.BLOCK_N, MASKED, C)
        product = dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
        s, _ = attend_scores(product, rows.position, k_position, rows.head, keys.length, C)
        if MASKED:
            seen = attend_visible(rows.position, k_position, rows.head, keys.length)
            s = tl.where(seen & (k_position < keys.origin + keys.count), s, float("-inf"))

        p, decay, m, total = softmax_step(s, attend_unit(C), m, total)
        v0, v1 = load_v(key_pointer(keys.v, keys.pages, block, C), keys.v.token, left, C.BLOCK_N, MASKED, C)
        acc0, acc1 = add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@jit
def attend_forward(q, kv, out, lse, call, sink, C):
    """One program: one tile of rows of one query head of one sequence."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:  # the grid is made for the longest sequence
        return
    kv_keys = sequence_keys(kv, s, h, call, C)
    q_first = row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    rows = load_rows(at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = start_softmax(sink, h, C)
    visit = attend_visit_keys(h, q_first, q_last, kv_keys, C)
    acc0, acc1, m, total = attend_forward_blocks(acc0, acc1, m, total, rows, kv_keys, visit, visit.full_count, False, C)
    acc0, acc1, m, total = attend_forward_blocks(
        acc0, acc1, m, total, rows, kv_keys, visit, visit.partial_count, True, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = at(out, s, h, q_start)
    store_v(token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    store_row_values(at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * LN2, C)


# Backward:  p = exp(s - lse),  dp = dout . v,  delta = sum(dout * out) - dlse,  ds = p * (dp - delta)
#            dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout
# lse and delta are arguments: with those of a joint softmax this is the gradient of one branch of it.


@jit
def attend_dq_blocks(dq0, dq1, rows, grads, keys, visit, count, MASKED: tl.constexpr, C):
    """Adds ds k of `count` blocks."""
    for i in tl.range(0, count, disable_licm=True):
        block = attend_block(visit, i, MASKED)
        start = block * C.BLOCK_N
        left = keys.count - start
        k_position = (keys.origin + start + tl.arange(0, C.BLOCK_N))[None, :]

        k0, k1 = load_qk(key_pointer(keys.k, keys.pages, block, C), keys.k.token, left, C.BLOCK_N, MASKED, C)
        product = dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
        s, slope = attend_scores(product, rows.position, k_position, rows.head, keys.length, C)
        if MASKED:
            seen = attend_visible(rows.position, k_position, rows.head, keys.length)
            s = tl.where(seen & (k_position < keys.origin + keys.count), s, float("-inf"))
        p = tl.exp2(s * attend_unit(C) - grads.lse)

        v0, v1 = load_v(key_pointer(keys.v, keys.pages, block, C), keys.v.token, left, C.BLOCK_N, MASKED, C)
        dp = dot_rows(grads.dout0, grads.dout1, v0, v1, C.V1, C)
        ds = (p * (dp - grads.delta) * slope).to(k0.dtype)
        dq0, dq1 = dot_columns(ds, k0, k1, dq0, dq1, C.QK1, C)
    return dq0, dq1


@jit
def attend_dq(q, kv, dout, lse, delta, dq, call, C):
    """One program: one tile of rows of one query head of one sequence (the sweeps of the forward)."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:
        return
    kv_keys = sequence_keys(kv, s, h, call, C)
    q_first = row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    rows = load_rows(at(q, s, h, q_start), row, left, q_first, h, C)

    dout = at(dout, s, h, q_start)
    dout0, dout1 = load_v(token_pointer(dout, row), dout.token, left, C.BLOCK_M, True, C)
    row_lse = load_lse(at(lse, s, h, q_start), row, left, C)
    row_delta = load_row_values(at(delta, s, h, q_start), row, left, 0.0, C)
    grads = RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])

    dq0 = zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = zeros(C.BLOCK_M, C.QK1, C.ACC)
    visit = attend_visit_keys(h, q_first, q_last, kv_keys, C)
    dq0, dq1 = attend_dq_blocks(dq0, dq1, rows, grads, kv_keys, visit, visit.full_count, False, C)
    dq0, dq1 = attend_dq_blocks(dq0, dq1, rows, grads, kv_keys, visit, visit.partial_count, True, C)

    dq = at(dq, s, h, q_start)
    store_qk(token_pointer(dq, row), dq.token, left, dq0 * C.SCALE, dq1 * C.SCALE, C.BLOCK_M, C)


@jit
def attend_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, count, MASKED: tl.constexpr, C):
    """Adds ds q and p dout of `count` row tiles.  All tiles are [keys, rows], so that no dot transposes p or ds."""
    for i in tl.range(0, count, disable_licm=True):
        row = attend_block(visit, i, MASKED) * C.BLOCK_M
        left = rows.count - row
        q_position = (rows.origin + row + tl.arange(0, C.BLOCK_M))[None, :]

        q0, q1 = load_qk(rows.q.data, rows.q.token, left, C.BLOCK_M, MASKED, C, row)
        product = dot_rows(keys.k0, keys.k1, q0, q1, C.QK1, C)
        s, slope = attend_scores(product, q_position, keys.position, rows.head, keys.length, C)
        if MASKED:
            seen = attend_visible(q_position, keys.position, rows.head, keys.length)
            s = tl.where(seen & (keys.position < keys.end), s, float("-inf"))
        p = tl.exp2(s * attend_unit(C) - load_lse(rows.lse, row, left, C)[None, :])

        dout0, dout1 = load_v(rows.dout.data, rows.dout.token, left, C.BLOCK_M, MASKED, C, row)
        dv0, dv1 = dot_columns(p.to(dout0.dtype), dout0, dout1, dv0, dv1, C.V1, C)

        dp = dot_rows(keys.v0, keys.v1, dout0, dout1, C.V1, C)
        ds = p * (dp - load_row_values(rows.delta, row, left, 0.0, C)[None, :]) * slope
        ds = ds.to(q0.dtype)
        dk0, dk1 = dot_columns(ds, q0, q1, dk0, dk1, C.QK1, C)
    return dk0, dk1, dv0, dv1


@jit
def attend_dkdv(q, source, dout, lse, delta, dk, dv, call, C):
    """One program: one block of keys of one kv head of one sequence, over all query heads of its group.

    No atomics: every sum has one owner and one order, so two runs agree to the bit.
    """
    block, kv_head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start, q_count = span(call.q_spans, s, call.q_count)
    k_start, _ = span(source.spans, s, source.keys)
    keys = sequence_keys(source, s, kv_head * C.GROUP, call, C)
    key = block * C.BLOCK_N
    left = keys.count - key
    if left <= 0:
        return
    q_origin = row_origin(call, s, q_count)
    k_first = keys.origin + key
    k_last = k_first + tl.minimum(left, C.BLOCK_N) - 1
    k0, k1 = load_qk(token_pointer(keys.k, key), keys.k.token, left, C.BLOCK_N, True, C)
    v0, v1 = load_v(token_pointer(keys.v, key), keys.v.token, left, C.BLOCK_N, True, C)
    position = (k_first + tl.arange(0, C.BLOCK_N))[:, None]
    keys = KeyBlock(k0, k1, v0, v1, position, keys.origin + keys.count, keys.length)

    dk0 = zeros(C.BLOCK_N, C.QK0, C.ACC)
    dk1 = zeros(C.BLOCK_N, C.QK1, C.ACC)
    dv0 = zeros(C.BLOCK_N, C.V0, C.ACC)
    dv1 = zeros(C.BLOCK_N, C.V1, C.ACC)
    for h in range(kv_head * C.GROUP, kv_head * C.GROUP + C.GROUP):
        rows = HeadRows(
            at(q, s, h, q_start), at(dout, s, h, q_start), at(lse, s, h, q_start), at(delta, s, h, q_start),
            h, q_origin, q_count,
        )  # fmt: skip
        visit = attend_visit_rows(rows, k_first, k_last, keys.length, C)
        dk0, dk1, dv0, dv1 = attend_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.full_count, False, C)
        dk0, dk1, dv0, dv1 = attend_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.partial_count, True, C)

    dk = at(dk, s, kv_head, k_start)
    dv = at(dv, s, kv_head, k_start)
    store_qk(token_pointer(dk, key), dk.token, left, dk0 * C.SCALE, dk1 * C.SCALE, C.BLOCK_N, C)
    store_v(token_pointer(dv, key), dv.token, left, dv0, dv1, C.BLOCK_N, C)


@jit
def attend_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    block = jump(block, ranges[0].end, ranges[1].first)
    return block


@jit
def attend_decode_block(acc0, acc1, m, total, rows, keys, block, k_position, seen, C):
    left = keys.count - block * C.BLOCK_N
    k0, k1 = load_qk(key_pointer(keys.k, keys.pages, block, C), keys.k.token, left, C.BLOCK_N, True, C)
    product = dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = attend_scores(product, rows.position, k_position, rows.head, keys.length, C)
    s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = softmax_step(s, attend_unit(C), m, total)
    v0, v1 = load_v(key_pointer(keys.v, keys.pages, block, C), keys.v.token, left, C.BLOCK_N, True, C)
    acc0, acc1 = add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@jit
def attend_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, C):
    """Online softmax over visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = attend_decode_number(ranges, i)
        start = block * C.BLOCK_N
        k_position = (start + tl.arange(0, C.BLOCK_N))[None, :]
        seen = attend_visible(rows.position, k_position, rows.head, keys.length) & (k_position < keys.count)
        acc0, acc1, m, total = attend_decode_block(acc0, acc1, m, total, rows, keys, block, k_position, seen, C)
    return acc0, acc1, m, total


@jit
def attend_decode(q, kv, partial, partial_lse, call, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    kv_keys = sequence_keys(kv, s, h, call, C)
    length = kv_keys.length
    position = length - 1  # of the one query
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = load_qk(at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = start_softmax(None, h, C)
    cursor = 0
    first, end = attend_span_0(position, length)
    range0, cursor = to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    first, end = attend_span_1(position, length)
    range1, cursor = to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first + range1.end - range1.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = attend_decode_blocks(acc0, acc1, m, total, rows, kv_keys, (range0, range1), first, end, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = at(partial, s, h, split)
    store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


# ---- 4. The CPU path ------------------------------------------------------------------------------------------------


PIECES_PER_THREAD = 2  # with fewer some threads would idle, and torch shares out each operation better
_PIECES_AHEAD = 8  # per thread: what may wait in memory for the pieces before it


def in_order(count: int, run: Callable[[int], Any], take: Callable[[Any], None]) -> None:
    """take(run(i)) for i of range(count): `run` at any time in any thread, `take` in this order, one at a time.

    So sums in `take` have one order, whatever the number of threads. An exception of either comes out here.
    """
    threads = torch.get_num_threads()
    if threads == 1 or count < PIECES_PER_THREAD * threads or not _can_keep_one_core():
        for number in range(count):
            take(run(number))
        return
    line = _Line(count, run, take, _PIECES_AHEAD * threads)
    workers = [threading.Thread(target=line.work, daemon=True) for _ in range(threads - 1)]
    for worker in workers:
        worker.start()
    line.work()
    try:
        for worker in workers:
            worker.join()
    finally:  # an interrupt stops the others, too: they write to tensors of the caller
        line.stop()
        for worker in workers:
            worker.join()
    if line.failure is not None:
        raise line.failure


class _Line:
    """Hands out numbers to threads, and hands on their results in the order of the numbers."""

    def __init__(self, count: int, run: Callable[[int], Any], take: Callable[[Any], None], ahead: int) -> None:
        self.count, self.run, self.take, self.ahead = count, run, take, ahead
        self.inference = torch.is_inference_mode_enabled()  # belongs to a thread
        self.change = threading.Condition()
        self.started = self.taken = 0
        self.taking = False
        self.found: dict[int, Any] = {}
        self.failure: BaseException | None = None

    def work(self) -> None:
        try:
            with on_cores(1), torch.inference_mode(self.inference), torch.no_grad():
                while (number := self._next()) is not None:
                    self._hand_on(number, self.run(number))
        except BaseException as failure:  # raised once all threads are done
            self.failure = self.failure or failure
            self.stop()

    def stop(self) -> None:
        with self.change:
            self.count = 0
            self.change.notify_all()

    def _next(self) -> int | None:
        with self.change:
            self.change.wait_for(lambda: self.started >= self.count or self.started < self.taken + self.ahead)
            if self.started >= self.count:
                return None
            self.started += 1
            return self.started - 1

    def _hand_on(self, number: int, result: Any) -> None:
        """Nobody waits here: who finds another thread at it leaves the result to that one."""
        with self.change:
            self.found[number] = result
            if self.taking:
                return
            self.taking = True
        while True:
            with self.change:
                if self.taken not in self.found:
                    self.taking = False
                    return
                result = self.found.pop(self.taken)
            self.take(result)
            with self.change:
                self.taken += 1
                self.change.notify_all()


@lru_cache
def _can_keep_one_core() -> bool:
    """Tried in a thread of its own, which ends with it."""
    found: list[bool] = []

    def attempt() -> None:
        with on_cores(1):
            found.append(torch.get_num_threads() == 1)

    trial = threading.Thread(target=attempt, daemon=True)
    trial.start()
    trial.join()
    return found == [True]


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Torch works on as many cores in this thread. `torch.set_num_threads` would say so to threads of others, too."""
    before = torch.get_num_threads()  # the first call takes over the number of the process
    of_products = _set_cores(count, count)
    try:
        yield
    finally:
        _set_cores(before, of_products)


def _set_cores(count: int, of_products: int) -> int:
    """OpenMP's number of this thread, and that of MKL (0: that of the process), which once set follows no other."""
    library = _torch_library()
    if set_count := getattr(library, "omp_set_num_threads", None):
        set_count(count)
    set_products = getattr(library, "MKL_Set_Num_Threads_Local", None)
    return set_products(of_products) if set_products else 0


@lru_cache
def _torch_library() -> ctypes.CDLL | None:
    """The library whose functions, and those of its own libraries, torch itself calls."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        with suppress(OSError):
            return ctypes.CDLL(os.path.join(folder, name))
    return None


# Measured on 2 AVX2 cores, window 512, head dim 64: fewer rows spend more on calls and copies, more rows visit keys
# outside the window. The mask at an edge of a window has rows x rows pairs, and torch shares elementwise work among
# threads from 32768 on, which waits for every core. The backward kernel runs one thread per (batch, head), so tiles of
# equal shape share a call.
_TILE_ROWS = 160
_UNITS_PER_CALL = 16  # batch x kv heads x tiles
_KEYS_PER_CALL = 8192  # bounds the memory of the matrix products to rows x keys


class Part(NamedTuple):
    """One stream of the softmax. Rows and keys are token indices; row i has position q_origin + i."""

    k: Tensor  # [B, Hk, M, Dqk]
    v: Tensor  # [B, Hk, M, Dv]
    visits: Callable[[int, int], list[tuple[int, int, bool]]]
    """Rows [first, end) -> disjoint key ranges (first, end, full); full: every row sees every key of it."""
    visible: Callable[[Tensor, Tensor], Tensor]
    """Query positions [rows, 1], key positions [1, keys] -> bool, broadcastable to [B, Hq, rows, keys]."""
    bias: Callable[[Tensor, Tensor], Tensor] | None = None
    """As `visible`, the number added to the logits; no gradient flows into it."""


class Logits(NamedTuple):
    """How a logit follows from a product: cap(scale * q @ k.T), a cap of c being c * tanh(x / c)."""

    scale: float
    softcap: float | None = None
    q_origin: int = 0  # position of the first query


class _TileCall(NamedTuple):
    """The place of one engine call: neighbouring tiles of `rows` rows, each with as many keys."""

    first: int
    rows: int
    keys: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]  # of each tile
    partial: tuple[tuple[tuple[int, int, int], ...], ...]  # of each tile: place among its keys, key range

    @property
    def end(self) -> int:
        return self.first + self.rows * len(self.ranges)


class _TileData(NamedTuple):
    """What an engine computes with; the query heads of a kv head are rows of it."""

    q: Tensor  # [tiles * B, Hk, group * rows, Dqk]
    k: Tensor  # [tiles * B, Hk, keys, Dqk]
    v: Tensor  # [tiles * B, Hk, keys, Dv]
    added: Tensor | None  # to the logits, -inf where hidden: [tiles * B, 1 | Hk, group * rows, keys]
    form: Logits


class _KeyGrads(NamedTuple):
    """What one call adds to the gradients of the keys of a part."""

    part: int
    call: _TileCall
    dk: Tensor  # [tiles * B, Hk, keys, Dqk]
    dv: Tensor  # [tiles * B, Hk, keys, Dv]


def sparse_forward(q: Tensor, parts: Sequence[Part], form: Logits, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, N, Dqk] -> output [B, Hq, N, Dv] in q's dtype, natural-log lse [B, Hq, N].

    The lse is fp32 (fp64 for fp64 inputs). `sink` [Hq] is a logit that enters the denominator only. Query head h
    reads kv head h // (Hq // Hk) of each part.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = q.new_empty(*q.shape[:3], parts[0].v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)
    spans = _row_pieces(q, parts)
    sinks = None if sink is None else sink.detach().to(dtype).view(1, -1, 1)

    def run(number: int) -> None:
        first, end = spans[number]
        found = _span_forward(q, parts, form, first, end)
        out[:, :, first:end], lse[:, :, first:end] = found if sinks is None else _with_sink(*found, sinks)

    in_order(len(spans), run, lambda _: None)
    return out, lse


def _span_forward(q: Tensor, parts: Sequence[Part], form: Logits, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Output and lse of rows [first, end) without the sink."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:2], end - first, parts[0].v.shape[3], dtype=dtype)
    lse = q.new_full(out.shape[:3], -torch.inf, dtype=dtype)
    engine = _flash_forward if form.softcap is None else _plain_forward
    for part in parts:
        for call in _tile_calls(q, part, first, end):
            tile = _tile_data(q, part, call, form)
            o, s = engine(tile)
            if not o.sum().isfinite():
                o, s = _plain_forward(tile)
            o, s = _unfold_rows(o, call, q), _unfold_rows(s, call, q).squeeze(-1)
            rows = slice(call.first - first, call.end - first)
            _merge_rows(out[:, :, rows], lse[:, :, rows], o, s)
    return out, lse


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, sink)
    return out * _share(lse, total).unsqueeze(-1), total


def sparse_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, parts: Sequence[Part], out: Tensor, lse: Tensor, form: Logits
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients dq and (dk, dv) of each part, in the dtypes of the inputs.

    `out` and `lse` are the merged ones of the whole softmax (sink and other parts included); `dlse` may be None.
    """
    dq = torch.empty(q.shape, dtype=q.dtype)
    totals = [tuple(torch.zeros(x.shape, dtype=lse.dtype) for x in part[:2]) for part in parts]
    spans = _row_pieces(q, parts)

    def run(number: int) -> list[_KeyGrads]:
        first, end = spans[number]
        dq[:, :, first:end], found = _span_backward(dout, dlse, q, parts, out, lse, form, first, end)
        return found

    def take(found: list[_KeyGrads]) -> None:
        for grads in found:
            for total, own in zip(totals[grads.part], grads[2:], strict=True):
                _scatter_keys(total, own, grads.call)

    in_order(len(spans), run, take)
    return dq, [(dk.to(part.k.dtype), dv.to(part.v.dtype)) for (dk, dv), part in zip(totals, parts, strict=True)]


def _span_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    parts: Sequence[Part],
    out: Tensor,
    lse: Tensor,
    form: Logits,
    first: int,
    end: int,
) -> tuple[Tensor, list[_KeyGrads]]:
    """dq of rows [first, end), and what they add to the gradients of the keys."""
    dq, found = torch.zeros(*q.shape[:2], end - first, q.shape[3], dtype=lse.dtype), list[_KeyGrads]()
    engine = _flash_backward if form.softcap is None and dlse is None else _plain_backward
    for number, part in enumerate(parts):
        for call in _tile_calls(q, part, first, end):
            tile = _tile_data(q, part, call, form)
            heads = part.k.shape[1]
            do, o = (_fold_rows(x, call, heads).to(lse.dtype) for x in (dout, out))
            s = _fold_rows(lse.unsqueeze(-1), call, heads)
            s = s.masked_fill(s == -torch.inf, torch.inf)  # an empty row then has exp(logit - lse) = 0
            ds = torch.zeros_like(s) if dlse is None else _fold_rows(dlse.unsqueeze(-1), call, heads).to(lse.dtype)
            grads = engine(tile, do, o, s, ds)
            if not grads[0].sum().isfinite():
                grads = _plain_backward(tile, do, o, s, ds)
            dq[:, :, call.first - first : call.end - first] += _unfold_rows(grads[0], call, q)
            found.append(_KeyGrads(number, call, grads[1], grads[2]))
    return dq, found


def _row_pieces(q: Tensor, parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Rows [first, end) of the pieces of work: a call's tiles, fewer where threads would have less than four pieces."""
    if not q.shape[0] * q.shape[1]:
        return []
    tiles, threads = -(-q.shape[2] // _TILE_ROWS), torch.get_num_threads()
    joined = max(1, _UNITS_PER_CALL // max(1, q.shape[0] * min(part.k.shape[1] for part in parts)))
    if tiles >= PIECES_PER_THREAD * threads:
        joined = max(1, min(joined, tiles // (2 * PIECES_PER_THREAD * threads)))
    step = joined * _TILE_ROWS
    return [(first, min(first + step, q.shape[2])) for first in range(0, q.shape[2], step)]


def _tile_calls(q: Tensor, part: Part, start: int, stop: int) -> Iterator[_TileCall]:
    """The visited tiles of rows [start, stop); neighbours of equal shape are joined to the units of a call."""
    most = _UNITS_PER_CALL // max(1, part.k.shape[0] * part.k.shape[1])
    held: _TileCall | None = None
    for first in range(start, stop, _TILE_ROWS):
        rows = min(_TILE_ROWS, stop - first)
        for tile in _tile_pieces(first, rows, part.visits(first, first + rows)):
            if held and held.end == first and held[1:3] == tile[1:3] and len(held.ranges) < most:
                held = held._replace(ranges=held.ranges + tile.ranges, partial=held.partial + tile.partial)
                continue
            if held:
                yield held
            held = tile
    if held:
        yield held


def _tile_pieces(first: int, rows: int, visits: list[tuple[int, int, bool]]) -> Iterator[_TileCall]:
    """One tile, as pieces of at most _KEYS_PER_CALL keys; ranges that touch become one."""
    keys, ranges, partial = 0, list[tuple[int, int]](), list[tuple[int, int, int]]()
    for start, end, full in visits:
        while start < end:
            if keys == _KEYS_PER_CALL:
                yield _TileCall(first, rows, keys, (tuple(ranges),), (tuple(partial),))
                keys, ranges, partial = 0, [], []
            cut = min(end, start + _KEYS_PER_CALL - keys)
            if not full:
                partial.append((keys, start, cut))
            touching = ranges and ranges[-1][1] == start
            ranges.append((ranges.pop()[0] if touching else start, cut))
            keys, start = keys + cut - start, cut
    if keys:
        yield _TileCall(first, rows, keys, (tuple(ranges),), (tuple(partial),))


def _gather_keys(x: Tensor, call: _TileCall, dtype: torch.dtype) -> Tensor:
    """[B, H, M, D] -> [tiles * B, H, keys, D]: a view where a single tile has a single range."""
    if len(call.ranges) == len(call.ranges[0]) == 1:
        ((first, end),) = call.ranges[0]
        return x[:, :, first:end].to(dtype)
    tiles = x.new_empty(len(call.ranges), *x.shape[:2], call.keys, x.shape[3], dtype=dtype)
    for tile, place, keys in _places(call):
        tiles[tile, :, :, place] = x[:, :, keys]
    return tiles.flatten(0, 1)


def _scatter_keys(total: Tensor, x: Tensor, call: _TileCall) -> None:
    """Adds [tiles * B, H, keys, D] to the ranges it was gathered from, in a fixed order."""
    tiles = x.unflatten(0, (len(call.ranges), -1))
    for tile, place, keys in _places(call):
        total[:, :, keys] += tiles[tile, :, :, place]


def _places(call: _TileCall) -> Iterator[tuple[int, slice, slice]]:
    """(tile, place among the tile's keys, place among all keys) of each range."""
    for tile, ranges in enumerate(call.ranges):
        at = 0
        for first, end in ranges:
            yield tile, slice(at, at + end - first), slice(first, end)
            at += end - first


def _fold_rows(x: Tensor, call: _TileCall, heads: int) -> Tensor:
    """[B, Hq, N, D] -> [tiles * B, Hk, group * rows, D]: the query heads of a kv head share its keys as more rows."""
    x = x[:, :, call.first : call.end].unflatten(1, (heads, -1)).unflatten(3, (-1, call.rows))
    return x.permute(3, 0, 1, 2, 4, 5).flatten(0, 1).flatten(2, 3)


def _unfold_rows(x: Tensor, call: _TileCall, q: Tensor) -> Tensor:
    """[tiles * B, Hk, group * rows, D] -> [B, Hq, tiles * rows, D]."""
    x = x.unflatten(0, (-1, q.shape[0])).unflatten(3, (-1, call.rows))
    return x.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)


def _tile_data(q: Tensor, part: Part, call: _TileCall, form: Logits) -> _TileData:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (_gather_keys(x, call, dtype) for x in part[:2])
    added = _added_logits(part, call, q, form.q_origin, dtype) if part.bias or any(call.partial) else None
    return _TileData(_fold_rows(q, call, part.k.shape[1]).to(dtype), k, v, added, form)


def _added_logits(part: Part, call: _TileCall, q: Tensor, q_origin: int, dtype: torch.dtype) -> Tensor:
    """Bias where a pair is visible and -inf elsewhere, folded as the rows."""
    heads, group = part.k.shape[1], q.shape[1] // part.k.shape[1]
    tiles = []
    for tile, (ranges, partial) in enumerate(zip(call.ranges, call.partial, strict=True)):
        start = q_origin + call.first + tile * call.rows
        i = torch.arange(start, start + call.rows).unsqueeze(1)
        hidden = [~part.visible(i, torch.arange(first, end).unsqueeze(0)) for _, first, end in partial]
        added = torch.zeros(1, 1, 1, 1, dtype=dtype)
        if part.bias is not None:
            j = torch.cat([torch.arange(*keys) for keys in ranges]).unsqueeze(0)
            added = added + part.bias(i, j).to(dtype)
        lead = torch.broadcast_shapes(added.shape[:2], *(mask.shape[:-2] for mask in hidden))
        added = added.expand(*lead, call.rows, call.keys).clone(memory_format=torch.contiguous_format)
        for (at, first, end), mask in zip(partial, hidden, strict=True):
            added[..., at : at + end - first].masked_fill_(mask, -torch.inf)
        tiles.append(added.expand(q.shape[0] if len(call.ranges) > 1 else -1, *added.shape[1:]))
    logits = torch.cat(tiles) if len(tiles) > 1 else tiles[0]
    logits = logits.unflatten(1, (heads, group) if logits.shape[1] == heads * group else (1, 1))
    folded: Tensor = logits.expand(-1, -1, group, -1, -1).flatten(2, 3)
    return folded


def _share(part: Tensor, total: Tensor) -> Tensor:
    """The share of the denominator that one of its terms has, 0 for an empty one and of an empty one."""
    share: Tensor = torch.exp(part - total.masked_fill(total == -torch.inf, torch.inf))
    return share.masked_fill(part == -torch.inf, 0.0)


def _merge_rows(out: Tensor, lse: Tensor, o: Tensor, s: Tensor) -> None:
    """Exact combination, in place, of two softmax results over disjoint keys."""
    total = torch.logaddexp(lse, s)
    out.mul_(_share(lse, total).unsqueeze(-1)).addcmul_(o, _share(s, total).unsqueeze(-1))
    lse.copy_(total)


def _flash_forward(x: _TileData) -> tuple[Tensor, Tensor]:
    """Output and lse [.., rows, 1]; columns of zeros change nothing."""
    q, k, v = _for_flash(x.q, x.k, x.v)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, False, attn_mask=x.added, scale=x.form.scale)
    lse = lse.unsqueeze(-1)
    if x.added is not None:  # the kernel says 0 for the lse of an empty row
        lse = lse.masked_fill(x.added.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
    return out[..., : x.v.shape[3]], lse


def _flash_backward(x: _TileData, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    dout, q, k, v, out = _for_flash(dout, x.q, x.k, x.v, out)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = flash(dout, q, k, v, out, lse.squeeze(-1), 0.0, False, attn_mask=x.added, scale=x.form.scale)
    return tuple(grad[..., : like.shape[3]] for grad, like in zip(found, x[:3], strict=True))


def _for_flash(*tensors: Tensor) -> Iterator[Tensor]:
    """Of one head dim, and with a last stride of 1: the kernel asks for the one and takes the other for granted.

    Only here is that sure: folding, converting and padding each may keep or choose other strides.
    """
    width = max(x.shape[-1] for x in tensors)
    for x in tensors:
        same = x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))
        yield same if same.stride(-1) == 1 else same.contiguous()


def _plain_forward(x: _TileData) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(x)
    lse = scores.logsumexp(-1, keepdim=True)
    return _seen_product(_share(scores, lse), x.v), lse


def _plain_backward(x: _TileData, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    scores, slope = _scores(x)
    p = _share(scores, lse)
    dp = dout @ x.v.transpose(2, 3) - ((dout * out).sum(-1, keepdim=True) - dlse)
    ds = (p * dp * slope * x.form.scale).masked_fill(scores == -torch.inf, 0.0)
    return _seen_product(ds, x.k), _seen_product(ds.transpose(2, 3), x.q), _seen_product(p.transpose(2, 3), dout)


def _scores(x: _TileData) -> tuple[Tensor, Tensor | float]:
    """Logits, -inf where hidden whatever the key holds, and the slope of the cap."""
    slope: Tensor | float = 1.0
    scores = (x.q @ x.k.transpose(2, 3)).mul_(x.form.scale)
    if x.form.softcap is not None:
        bent = torch.tanh(scores / x.form.softcap)
        scores, slope = bent * x.form.softcap, 1 - bent * bent
    if x.added is not None:
        scores = (scores + x.added).masked_fill_(x.added == -torch.inf, -torch.inf)
    return scores, slope


def _seen_product(weights: Tensor, x: Tensor) -> Tensor:
    """weights @ x where a weight of 0 hides even NaN and infinity; a row that sees one becomes NaN."""
    if x.sum().isfinite():
        return weights @ x
    odd = ~x.isfinite()
    seen = (weights != 0).to(x.dtype) @ odd.to(x.dtype)
    product: Tensor = weights @ x.masked_fill(odd, 0.0)
    return product.masked_fill(seen > 0, torch.nan)


_STEP_BLOCK = 64  # keys of a product
_GATHERED_KEYS = 512  # copied at once: 1 MB of 8 heads of 64 in fp32
_LEAST_USED = 0.75  # of a batch that holds blocks of nobody
_SHARED_NUMBERS = 1 << 19  # from here on a product takes longer than a thread to wake up: 0.1 ms


class _Run(NamedTuple):
    """Neighbouring homes, or `gathered` ones, and slots [start, stop) of each; of homes smaller than a block of all."""

    homes: Sequence[int]
    start: int
    stop: int
    blocks: Sequence[int]  # the number of each block, home by home
    gathered: bool = False


def sparse_step(
    q: Tensor,
    parts: Sequence[Part],
    visits: Sequence[Sequence[tuple[int, int, bool]]],
    homes: Sequence[int],
    form: Logits,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query q [1, Hq, 1, Dqk] -> output [1, Hq, 1, Dv] in q's dtype, natural-log lse [1, Hq, 1].

    k and v of a part are whole stores [homes, Hk, page, D]: token t lies in slot t % page of home homes[t // page].
    `visits` are the key ranges (first, end, full) of each part. Else as `sparse_forward`.
    """
    rows = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    found = [(rows.new_zeros(*q.shape[:3], parts[0].v.shape[3]), rows.new_full(q.shape[:3], -torch.inf))]  # of no keys
    cores = torch.get_num_threads()
    with on_cores(1):
        for part, own in zip(parts, visits, strict=True):
            found += [_range_results(rows, part, visit, homes, form, cores) for visit in own]
        outs, lses = (torch.cat(x) for x in zip(*found, strict=True))
        lse = lses.logsumexp(0, keepdim=True)
        out = (outs * _share(lses, lse).unsqueeze(-1)).sum(0, keepdim=True)
        if sink is not None:
            out, lse = _with_sink(out, lse, sink.detach().to(lse.dtype).view(1, -1, 1))
        return out.to(q.dtype), lse


def _range_results(
    q: Tensor, part: Part, visit: tuple[int, int, bool], homes: Sequence[int], form: Logits, cores: int
) -> tuple[Tensor, Tensor]:
    """Output [1, Hq, 1, Dv] and lse [1, Hq, 1] over a range of keys."""
    k, v, rows = part.k, part.v, q.view(part.k.shape[1], -1, q.shape[3])  # the heads of a kv head share its keys
    segments = [(first, end, list(_runs(first, end, homes, k))) for first, end in _segments(*visit[:2])]
    logits = []
    for first, end, runs in segments:
        blocks = max(1, (end - first) // _STEP_BLOCK)
        found = _run_products(rows.expand(blocks, -1, -1, -1), k, runs, True, cores)
        logits.append(_step_logits(found, part, first, end, visit[2], form))
    top = torch.stack([x.amax((0, 3)) for x in logits]).amax(0)
    least = top.masked_fill(top == -torch.inf, 0.0).unsqueeze(-1)
    sums, values = [], []
    for weights, (_, _, runs) in zip(logits, segments, strict=True):
        weights = weights.sub_(least).exp_()
        found = _run_products(weights, v, runs, False, cores)
        # In one layout, whatever that of the store: the order of a sum of torch follows it.
        sums.append(weights.sum(3).contiguous().sum(0))
        values.append(found.contiguous().sum(0))
    total = torch.stack(sums).sum(0)
    out = torch.stack(values).sum(0) / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out.reshape(1, q.shape[1], 1, -1), (top + total.log()).reshape(1, q.shape[1], 1)


def _run_products(rows: Tensor, store: Tensor, runs: Sequence[_Run], by_key: bool, cores: int) -> Tensor:
    """Products of rows [blocks, Hk, group, x] with the blocks of a segment: [blocks, Hk, group, y].

    `by_key`: with each key of them. Else weights of their values, and a weight of 0 hides even NaN and infinity.
    """
    if len(runs) == 1 and list(runs[0].blocks) == list(range(len(rows))):
        return _block_products(rows, _blocks_of(store, runs[0], rows.dtype), by_key, cores)
    numbers = [torch.tensor(run.blocks) for run in runs]
    found = [
        _block_products(rows[own], _blocks_of(store, run, rows.dtype), by_key, cores)
        for own, run in zip(numbers, runs, strict=True)
    ]
    return torch.empty(len(rows), *found[0].shape[1:], dtype=rows.dtype).index_copy_(
        0, torch.cat(numbers), torch.cat(found)
    )


def _block_products(rows: Tensor, blocks: Tensor, by_key: bool, cores: int) -> Tensor:
    """Of rows [n * b, Hk, group, x] and blocks [n, Hk, b, keys, D]: [n * b, Hk, group, y]."""
    rows = rows.unflatten(0, (len(blocks), -1)).movedim(2, 1)
    if found := _one_batch(blocks):
        batch, of_head = found
        more = of_head - blocks.shape[2]
        room = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, more)) if more else rows
        with on_cores(cores if batch.numel() >= _SHARED_NUMBERS else 1):
            results = room.reshape(-1, *rows.shape[3:])[: len(batch)] @ (batch.mT if by_key else batch)
        sizes = (len(blocks) * blocks.shape[1], blocks.shape[2], *results.shape[1:])
        results = results.as_strided(sizes, (of_head * results.stride(0), *results.stride()))
    else:
        heads = zip(rows.flatten(0, 1), blocks.flatten(0, 1), strict=True)
        results = torch.stack([own @ (block.mT if by_key else block) for own, block in heads])
    if not by_key and not results.sum().isfinite():
        results = _seen_product(rows, blocks).flatten(0, 1)
    products: Tensor = results.unflatten(0, (len(blocks), -1)).movedim(2, 1).flatten(0, 1)
    return products


def _one_batch(blocks: Tensor) -> tuple[Tensor, int] | None:
    """Blocks [n, Hk, b, keys, D] as [batch, keys, D] without a copy, and how many of the batch each head has.

    Those behind the b of a head are nobody's; where they would be many there is no such batch.
    """
    count, heads, of_head, *block = blocks.shape
    try:
        return blocks.view(-1, *block), of_head
    except RuntimeError:
        _, head, step, *inner = blocks.stride()
    room = head // step
    if count > 1 or head % step or _LEAST_USED * room > of_head:
        return None
    return blocks.as_strided(((heads - 1) * room + of_head, *block), (step, *inner)), room


def _step_logits(products: Tensor, part: Part, first: int, end: int, full: bool, form: Logits) -> Tensor:
    """The logits, -inf where a key is hidden, of products [blocks, Hk, group, keys of a block], in place."""
    count, heads, group, size = products.shape
    logits = products.mul_(form.scale)
    if form.softcap is not None:
        logits = logits.div_(form.softcap).tanh_().mul_(form.softcap)
    i, j = torch.tensor([[form.q_origin]]), torch.arange(first, end).unsqueeze(0)

    def by_block(x: Tensor) -> Tensor:
        """[.., 1 or Hq, 1, keys, or 1: the same for all] -> broadcastable to the logits."""
        x = x.expand(*x.shape[:-1], end - first).reshape(-1, count, size)
        by_head: Tensor = x.unflatten(0, (heads, group) if len(x) == heads * group else (1, 1))
        return by_head.movedim(2, 0)

    if part.bias is not None:
        added = by_block(part.bias(i, j))
        logits = logits.add_(added).masked_fill_(added == -torch.inf, -torch.inf)
    if not full and not (seen := part.visible(i, j)).all():
        logits = logits.masked_fill_(~by_block(seen), -torch.inf)
    return logits


def _blocks_of(store: Tensor, run: _Run, dtype: torch.dtype) -> Tensor:
    """[n, Hk, blocks of a home, keys of a block, D] in `dtype`; of neighbours a view, if the store has that dtype."""
    slots = slice(run.start, run.stop)
    if not run.gathered:
        found = store[run.homes[0] : run.homes[-1] + 1, :, slots]
    else:
        found = store.index_select(0, torch.tensor(run.homes))
        if store.shape[2] < _STEP_BLOCK:
            found = found.transpose(0, 1).flatten(1, 2).unsqueeze(0)[:, :, slots]
    blocks: Tensor = found.unflatten(2, (-1, min(_STEP_BLOCK, found.shape[2])))
    return blocks.to(dtype)


def _segments(first: int, end: int) -> list[tuple[int, int]]:
    """The whole blocks of a range, and what is less than a block at its ends."""
    start = min(end, -(-first // _STEP_BLOCK) * _STEP_BLOCK)
    stop = max(start, end // _STEP_BLOCK * _STEP_BLOCK)
    return [(a, b) for a, b in ((first, start), (start, stop), (stop, end)) if a < b]


def _runs(first: int, end: int, homes: Sequence[int], store: Tensor) -> Iterator[_Run]:
    """Where the keys of a segment lie."""
    page, narrow = store.shape[2], store.element_size() < 4
    if page < _STEP_BLOCK:
        for at in range(first, end, _GATHERED_KEYS):
            stop, start = min(end, at + _GATHERED_KEYS), at % page
            blocks = range((at - first) // _STEP_BLOCK, -(-(stop - first) // _STEP_BLOCK))
            yield _Run(homes[at // page : -(-stop // page)], start, start + stop - at, blocks, True)
        return
    whole = range(-(-first // page), end // page)
    edges = [(first, min(end, whole.start * page)), (max(first, whole.stop * page), end)]
    for at, stop in edges if whole.start <= whole.stop else [(first, end)]:
        most = _GATHERED_KEYS if narrow else max(1, stop - at)
        for cut in range(at, stop, most):
            last, number = min(stop, cut + most), cut // page
            blocks = range((cut - first) // _STEP_BLOCK, -(-(last - first) // _STEP_BLOCK))
            yield _Run(homes[number : number + 1], cut % page, cut % page + last - cut, blocks)
    yield from _whole_homes(whole, first, homes, page, narrow)


def _whole_homes(whole: range, first: int, homes: Sequence[int], page: int, narrow: bool) -> Iterator[_Run]:
    """In the order of the store: neighbours together, a few at a time where they are few or narrow."""
    order = sorted(whole, key=homes.__getitem__)
    few, of_home, at = max(1, _GATHERED_KEYS // page), page // _STEP_BLOCK, 0
    while at < len(order):
        last = at + 1
        while (
            last < len(order) and homes[order[last]] == homes[order[last - 1]] + 1 and not (narrow and last - at >= few)
        ):
            last += 1
        gathered = last - at < min(few, len(order) - at)
        last = at + few if gathered else last
        numbers = [(number * page - first) // _STEP_BLOCK for number in order[at:last]]
        blocks = [block + i for block in numbers for i in range(of_home)]
        yield _Run([homes[number] for number in order[at:last]], 0, page, blocks, gathered)
        at = last


def visits_of_ranges(ranges: Iterable[tuple[int, int, int, int]], corner: Corner) -> list[tuple[int, int, bool]]:
    """Position ranges (first, end, full_first, full_end), by `first` -> disjoint key ranges (first, end, full)."""
    count, origin, cursor = corner.keys.stop - corner.keys.start, corner.k_origin, 0
    found: list[tuple[int, int, bool]] = []
    for bounds in ranges:
        first, end, full_first, full_end = (min(max(bound - origin, 0), count) for bound in bounds)
        first = max(first, cursor)
        if first >= end:
            continue
        full_first = min(max(full_first, first), end)
        full_end = max(min(full_end, end), full_first)
        found += [(first, full_first, False), (full_first, full_end, True), (full_end, end, False)]
        cursor = end
    return _joined(found)


def _joined(ranges: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Neighbours of one kind become one range; empty ones go."""
    joined: list[tuple[int, int, bool]] = []
    for first, end, full in ranges:
        if first >= end:
            continue
        if joined and joined[-1][1] == first and joined[-1][2] == full:
            joined[-1] = (joined[-1][0], end, full)
        else:
            joined.append((first, end, full))
    return joined


def dense_softmax(
    q: Tensor,
    streams: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, N, Dqk] and (k, v, visible, bias) per stream -> out, lse; visible broadcasts to [B, Hq, N, M]."""
    logits, values = [], []
    for k, v, visible, bias in streams:
        group = q.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        s = q.double() @ k.transpose(-1, -2) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if bias is None else s + bias
        logits.append(s.masked_fill(~visible.expand(s.shape), -torch.inf))
        values.append(v)
    # One more column, without value: the sink, or nothing.
    none = q.new_full((1, q.shape[1], 1, 1), -torch.inf, dtype=torch.float64)
    extra = none if sink is None else sink.double().view(1, -1, 1, 1)
    s = torch.cat([*logits, extra.expand(*q.shape[:3], 1)], -1)
    values.append(values[0].new_zeros(*values[0].shape[:2], 1, values[0].shape[3]))
    top = s.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
    weights = torch.exp(s - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = weights / total.masked_fill(empty, 1.0) @ torch.cat(values, 2)
    lse = (top + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, -torch.inf).squeeze(-1)
    return out, lse


# ---- 5. Configurations: the tables, and what tuning found -----------------------------------------------------------


class Config(NamedTuple):
    """`num_stages` is one more than the blocks that are loaded ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


SMALL = Config(16, 16, 1, 1)  # what the tables do not know, and the interpreter; one warp has 16 rows

# architecture -> kernel -> (head dim up to, as in `table_dim`, and bytes per element) -> configuration
Tables = dict[str, dict[str, dict[tuple[int, int], Config]]]
TABLES: Tables = {
    "sm_80": {
        "forward": {
            (64, 2): Config(128, 64, 8, 3),
            (128, 2): Config(128, 64, 8, 2),
            (192, 2): Config(128, 32, 8, 2),
            (256, 2): Config(64, 32, 4, 2),
            (64, 4): Config(64, 32, 4, 2),
            (128, 4): Config(32, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dq": {
            (64, 2): Config(64, 64, 4, 2),
            (96, 2): Config(64, 32, 4, 2),
            (128, 2): Config(64, 64, 8, 2),
            (192, 2): Config(64, 32, 4, 1),
            (256, 2): Config(32, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 64, 8, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dkdv": {
            (64, 2): Config(32, 64, 4, 2),
            (96, 2): Config(32, 64, 4, 2),
            (128, 2): Config(64, 64, 8, 2),
            (160, 2): Config(32, 32, 4, 1),
            (256, 2): Config(32, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 16, 4, 1),
            (256, 4): Config(16, 16, 2, 1),
        },
        "decode": {
            (128, 2): Config(16, 64, 4, 3),
            (256, 2): Config(16, 32, 4, 3),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "forward_bias": {
            (128, 2): Config(128, 32, 8, 2),
        },
        "dkdv_bias": {
            (128, 2): Config(64, 64, 8, 1),
        },
    },
    "sm_90": {
        "forward": {
            (128, 2): Config(128, 64, 8, 3),
            (192, 2): Config(128, 64, 8, 3),
            (256, 2): Config(128, 64, 8, 2),
            (64, 4): Config(64, 32, 4, 2),
            (128, 4): Config(128, 32, 8, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dq": {
            (128, 2): Config(128, 64, 8, 2),
            (192, 2): Config(128, 64, 8, 2),
            (256, 2): Config(128, 32, 8, 2),
            (64, 4): Config(64, 32, 4, 1),
            (128, 4): Config(32, 64, 8, 1),
            (192, 4): Config(16, 32, 4, 1),
            (256, 4): Config(16, 64, 8, 1),
        },
        "dkdv": {
            (64, 2): Config(64, 64, 4, 2),
            (128, 2): Config(64, 64, 4, 1),
            (160, 2): Config(32, 64, 4, 1),
            (256, 2): Config(64, 32, 8, 2),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 16, 4, 1),
            (256, 4): Config(32, 16, 4, 1),
        },
        "decode": {
            (128, 2): Config(16, 64, 4, 3),
            (256, 2): Config(16, 32, 4, 3),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dkdv_bias": {
            (128, 2): Config(32, 64, 4, 1),
        },
    },
    "sm_100": {
        "forward": {
            (128, 2): Config(128, 64, 8, 3),
            (192, 2): Config(128, 64, 8, 2),
            (256, 2): Config(64, 64, 8, 2),
            (64, 4): Config(64, 32, 4, 2),
            (128, 4): Config(32, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dq": {
            (64, 2): Config(64, 64, 8, 2),
            (128, 2): Config(128, 64, 8, 2),
            (192, 2): Config(64, 64, 4, 1),
            (256, 2): Config(64, 64, 8, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(16, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dkdv": {
            (64, 2): Config(64, 64, 8, 2),
            (128, 2): Config(64, 64, 8, 1),
            (160, 2): Config(64, 64, 4, 1),
            (256, 2): Config(32, 64, 8, 1),
            (64, 4): Config(32, 16, 4, 1),
            (128, 4): Config(32, 16, 4, 1),
            (256, 4): Config(32, 16, 4, 1),
        },
        "decode": {
            (128, 2): Config(16, 64, 4, 3),
            (256, 2): Config(16, 32, 4, 3),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
    },
    "gfx942": {
        "forward": {
            (64, 2): Config(128, 64, 4, 1),
            (128, 2): Config(64, 64, 2, 1),
            (192, 2): Config(64, 32, 2, 1),
            (256, 2): Config(64, 64, 2, 1),
            (128, 4): Config(64, 32, 2, 1),
            (256, 4): Config(32, 32, 1, 1),
        },
        "dq": {
            (64, 2): Config(64, 64, 2, 1),
            (128, 2): Config(128, 32, 4, 1),
            (192, 2): Config(64, 32, 2, 1),
            (256, 2): Config(64, 16, 4, 1),
            (128, 4): Config(32, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "dkdv": {
            (128, 2): Config(32, 64, 2, 1),
            (160, 2): Config(16, 64, 4, 1),
            (256, 2): Config(16, 64, 4, 1),
            (128, 4): Config(32, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "decode": {
            (128, 2): Config(16, 64, 1, 1),
            (256, 2): Config(16, 32, 1, 1),
            (128, 4): Config(16, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
    },
}


def tables_for(architecture: str, tables: Tables = TABLES) -> Mapping[str, dict[tuple[int, int], Config]]:
    """The tables of the architecture, or of the nearest older one.

    Compute capability 12 (GeForce, RTX Pro) is near 8 instead: mma and 99 KB of shared memory, no tensor memory.
    """
    if not architecture.startswith("sm_"):
        return tables["gfx942"]
    number = int(architecture.removeprefix("sm_"))
    known = sorted(int(name.removeprefix("sm_")) for name in tables if name.startswith("sm_"))
    older = [x for x in known if x <= number] if number < 120 else []
    return tables[f"sm_{max(older, default=known[0])}"]


def lookup(kernel: str, architecture: str, dim: int, size: int, tables: Tables = TABLES) -> Config:
    """The configuration of `forward`, `dq`, `dkdv` or `decode` for that head dim and bytes per element.

    `forward_bias` and so on: kernels with a bias, which needs registers of its own; `units_pairs` and so on: rows that
    are gathered one by one. Without an entry, the plain one.
    """
    own = tables_for(architecture, tables)
    table = {**own[plain_name(kernel)], **own.get(kernel, {})}
    dims = [most for most, bytes_per_element in table if bytes_per_element == size and most >= dim]
    return table[min(dims), size] if dims else SMALL


def plain_name(kernel: str) -> str:
    """The kernel of which `kernel` is a form with a row of its own."""
    return kernel.removesuffix("_bias").removesuffix("_pairs")


def table_dim(kernel: str, qk: int, v: int) -> int:
    """The head dim that a kernel is looked up for: the wider one; of dK and dV, with sums as wide as both, the mean."""
    return -(-(qk + v) // 2) if plain_name(kernel).endswith("dkdv") else max(qk, v)


def chained(config: Config, page: int = 0, listed: bool = False) -> Config:
    """The configuration where blocks of keys lie in pages (of `page` keys, 0: none), or their numbers in a list.

    Triton spreads the stages over a chain of loads: number in a list, page, rows. Each link takes one stage for every
    block loaded ahead, so that rows are loaded as early as without it; two links share two.
    """
    links = (page > 0) + listed
    stages = config.num_stages + min(links * (config.num_stages - 1), 2)
    return config._replace(block_n=min(config.block_n, page or config.block_n), num_stages=stages)


def split_dim(dim: int) -> tuple[int, int]:
    """dim -> two powers of two >= 16 (the second may be 0) that cover it: 80 -> 64 + 16, 192 -> 128 + 64, 24 -> 32."""
    whole = max(16, power_of_2(dim))
    half = whole // 2
    rest = max(16, power_of_2(dim - half))
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n; 1 for n < 1."""
    return 1 << max(0, n - 1).bit_length()


class Gpu(NamedTuple):
    """What kernels are made for: `sm_90` or `gfx942`, and how many programs run side by side."""

    architecture: str
    processors: int


_fixed_gpu: Gpu | None = None


def use_tables(architecture: str | None, processors: int = 1) -> None:
    """Makes every launch one for that architecture, wherever the tensors lie; with None for theirs, as at first."""
    global _fixed_gpu
    _fixed_gpu = None if architecture is None else Gpu(architecture, processors)


def gpu_of(device: torch.device) -> Gpu:
    if _fixed_gpu is not None:
        return _fixed_gpu
    return _properties(device) if device.type == "cuda" else Gpu("sm_90", 1)


@lru_cache
def _properties(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Gpu(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Gpu(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


FITTED_WITH = "3.7.1"  # triton

# architecture -> bytes of shared memory that one block can have (spdsl/targets)
SHARED_LIMITS = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

# matrix unit -> what the arithmetic is multiplied with: never under a sample it was fitted to
FACTORS = {"mma": 1.001, "wgmma": 1.001, "tcgen05": 1.001, "mfma": 1.01}

# matrix unit -> words of a thread for accumulators and scores with which some kernel of the tables does not spill
REGISTERS = {"mma": 160, "wgmma": 224, "tcgen05": 224, "mfma": 160}


_BACKWARD = ("dq", "dkdv", "units_dq", "units_dkdv")
_MOST_LANES = 64
_ALIGNED = 1024  # bytes to which tiles of the large matrix units are aligned


class KernelShape(NamedTuple):
    """A kernel of a call: `forward dq dkdv decode units units_dq units_dkdv units_decode select`."""

    name: str
    qk: int
    v: int
    size: int  # bytes per element
    group: int = 1  # query heads per list of units, or per kv head
    bias: bool = False
    paged: bool = False  # rows are found through a page table
    listed: bool = False  # blocks are found in a list
    reads: int = 0  # bytes that the mask reads for each key
    guarded: bool = False  # decode skips the blocks that tensors leave out


class Tile(NamedTuple):
    """Bytes of one step: rows that stay (`q`; in a backward `v`, too) and those that the loop loads (`k`, `value`)."""

    q: int
    v: int
    k: int
    value: int
    part: int  # the wider of the first parts of k and value
    scores: int
    resident: int  # rows that stay
    looped: int  # rows of a step


def shared_bytes(kernel: KernelShape, config: Config, architecture: str) -> int:
    """Shared memory of one block in bytes, never under what the compiler gives. `config` as in the tables."""
    config = config._replace(block_m=rows_of(kernel, config))
    unit = matrix_unit(kernel, config, architecture)
    known = {"mfma": _mfma, "mma": _mma, "wgmma": _wgmma, "tcgen05": _tcgen05}[unit]
    tile = tile_of(kernel, config)
    return round((known(kernel, config, tile) + _given_mask(kernel, config, tile, unit)) * FACTORS[unit])


def rows_of(kernel: KernelShape, config: Config) -> int:
    """Rows of a tile: in decode the heads of a group, over units some queries times their heads.

    A list of one head may have any number of rows, as rows are gathered; the union of 64 queries takes no more.
    """
    heads = power_of_2(kernel.group)
    if kernel.name.endswith("decode"):
        return max(16, heads)
    if not kernel.name.startswith("units") and kernel.name != "select":
        return config.block_m
    if heads == 1 and kernel.name != "select":
        return max(config.block_m, 16)
    return max(min(max(config.block_m, heads, 16) // heads, _MOST_LANES) * heads, 16)


def matrix_unit(kernel: KernelShape, config: Config, architecture: str) -> str:
    """`mma`, `wgmma`, `tcgen05` or `mfma`: the two large ones multiply 64 rows at least, with 4 warps at least."""
    if not architecture.startswith("sm_"):
        return "mfma"
    rows = config.block_n if kernel.name.endswith("dkdv") else rows_of(kernel, config)
    number = int(architecture.removeprefix("sm_"))
    if rows < 64 or config.num_warps < 4 or number < 90 or number >= 120:
        return "mma"
    return "wgmma" if number < 100 else "tcgen05"


def tile_of(kernel: KernelShape, config: Config) -> Tile:
    qk, v = split_dim(kernel.qk), split_dim(kernel.v) if kernel.name != "select" else (0, 0)
    resident, looped = config.block_m, config.block_n
    if kernel.name.endswith("dkdv"):
        resident, looped = looped, resident
    backward = kernel.name in _BACKWARD
    size = kernel.size
    return Tile(
        resident * sum(qk) * size, resident * sum(v) * size if backward else 0,
        looped * sum(qk) * size, looped * sum(v) * size, looped * max(qk[0], v[0]) * size,
        config.block_m * config.block_n * size, resident, looped,
    )  # fmt: skip


def depth_of(kernel: KernelShape, config: Config, amd: bool) -> int:
    """Steps whose rows are loaded ahead."""
    return 0 if _narrow(kernel) else _ahead(kernel, config, amd)


def _narrow(kernel: KernelShape) -> bool:
    """Rows of 2-byte elements that are no multiple of 16 are loaded too narrowly for asynchronous copies.

    In a forward kernel they may come from a cache, where rows of several heads lie side by side and are wide enough.
    """
    return kernel.size == 2 and kernel.name in _BACKWARD and kernel.qk % 16 + kernel.v % 16 > 0


def _ahead(kernel: KernelShape, config: Config, amd: bool) -> int:
    """Steps for which anything is loaded ahead. Triton spreads the stages over a chain of loads."""
    if config.num_stages == 1 or (kernel.guarded and kernel.name == "decode"):
        return 0
    stages = config.num_stages + min((kernel.paged + kernel.listed) * (config.num_stages - 1), 2)
    if not (kernel.paged or (kernel.listed and kernel.reads)):
        return stages - 1
    return stages - 2 if amd else (stages - 1) // 2


def _small(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """Numbers of blocks, lse and delta of rows and over units the numbers of pairs, what a mask reads; barriers."""
    of_row = {"dkdv": 8, "units_dkdv": 12}.get(kernel.name, 0) + 2 * kernel.reads
    of_step = tile.looped * of_row + 40
    return _ahead(kernel, config, amd=False) * of_step + _ranks(kernel, config)


def _ranks(kernel: KernelShape, config: Config) -> int:
    """Of `select`: 8 bytes for each query and unit of a step, as they are sorted."""
    queries = config.block_m // power_of_2(kernel.group)
    several = 4 if queries > 1 and config.block_m <= 16 * config.num_warps else 2  # warps have the scores of a head
    scores = config.block_m * config.block_n * several if config.num_warps > 4 or config.block_m > 64 else 0
    least = (512 if queries > 1 else 256) * config.num_warps
    return max(queries * config.block_n * 8, least, scores) if kernel.name == "select" else 0


def _mask(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """The mask of a list that a tensor gives, in another layout than narrow scores."""
    given = kernel.guarded and kernel.listed and not kernel.reads and max(kernel.qk, kernel.v) <= 16
    return config.block_m * config.block_n * 2 if given else 0


def _given_mask(kernel: KernelShape, config: Config, tile: Tile, unit: str) -> int:
    """The same for wide scores: a byte for each pair where they are many, and the scores themselves beside 128 keys.

    Where a warp has more than the 16 rows of one product, its part of the mask goes through shared memory, too.
    """
    if not (kernel.guarded and kernel.listed and not kernel.reads) or kernel.name not in ("forward", "dq", "dkdv"):
        return 0
    pairs, narrow = config.block_m * config.block_n, max(kernel.qk, kernel.v) < 128
    if unit == "mfma":
        return 2 * pairs if kernel.name == "forward" and config.block_n >= 128 else 0
    if unit == "tcgen05":
        return _given_in_tensor_memory(kernel, tile, 4 * pairs, narrow)
    apart = tile.resident > 16 * config.num_warps
    if kernel.name == "dkdv":
        return pairs if apart or pairs >= 8192 else 0
    if config.block_n >= 128:
        return pairs if kernel.name == "dq" else (4 if narrow else 2) * pairs
    return config.num_warps * (2048 if kernel.name == "forward" and unit == "mma" else 512) * apart


def _given_in_tensor_memory(kernel: KernelShape, tile: Tile, scores: int, narrow: bool) -> int:
    if kernel.size == 4:
        return 0
    if kernel.name == "dkdv":
        if narrow and tile.looped >= 64:
            return 4096 if tile.resident >= 256 else 0
        return scores if tile.resident >= 128 else 0
    if tile.looped < 128:
        return 0
    return scores if narrow else 4096


def _staged(kernel: KernelShape, tile: Tile) -> bool:
    """Whether scores go through shared memory between two products: their rows do not stay with one warp."""
    qk, v = (part[1] or part[0] for part in (split_dim(kernel.qk), split_dim(kernel.v)))
    return tile.resident < {"dq": qk, "units_dq": qk, "dkdv": max(qk, v), "units_dkdv": max(qk, v)}.get(kernel.name, v)


def _mma(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """sm_80 and sm_89, and small tiles elsewhere. An fp32 operand has two tf32 parts, and one layout for each use."""
    depth = depth_of(kernel, config, amd=False)
    scores, small = tile.scores * _staged(kernel, tile), _small(kernel, config, tile)
    stays, ring = tile.q + tile.v, depth * (tile.k + tile.value)
    if kernel.size == 4:
        if kernel.name.endswith("dkdv"):
            return 2 * stays + tile.part + max(2 * scores, tile.part) + small
        if kernel.name.endswith("dq"):
            return 2 * stays + depth * tile.value + (tile.part if depth else max(tile.part, 2 * scores)) + small
        if depth:
            return 2 * stays + ring + 2 * scores + small
        return stays * (1 if kernel.guarded and kernel.name == "decode" else 2) + max(tile.part, 2 * scores) + small
    if depth:
        last = tile.part if kernel.paged and kernel.listed else 0  # the loop over masked blocks keeps one part more
        return stays + ring + max(scores, last) + _mask(kernel, config, tile) + small
    if kernel.name == "select":
        return stays + max(tile.part, small)
    if kernel.name.endswith("dkdv"):
        return stays + max(tile.k, tile.value) + 2 * tile.part + small
    if kernel.name.endswith("dq"):
        return stays + tile.k + max(scores, tile.part) + small
    return stays + max(tile.part, tile.value) + scores + small


def _wgmma(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """sm_90: products run while the next ones are started, so that one step more is kept."""
    depth = depth_of(kernel, config, amd=False)
    stays, small = tile.q + tile.v, _small(kernel, config, tile)
    backward = kernel.name in _BACKWARD
    if kernel.size == 2:
        once = tile.k + tile.value if backward else max(tile.k, tile.value)
        steps = (depth + 1) * (tile.k + tile.value)
        return stays + small + (steps + min(_ALIGNED, 64 + (stays + steps) // 16) if depth else once)
    if kernel.name.endswith("dkdv"):
        second = 5 * depth * (tile.k + tile.value - 2 * tile.part) // 3 if depth else 0
        return 2 * stays + tile.part * (4 + depth if depth else 2) + max(second, 0) + small
    if backward:
        again = 5 * tile.part + 3 * max(tile.k - tile.part, 0) if depth else 2 * tile.part
        return 2 * stays + depth * tile.value + again + small
    return 2 * stays + depth * (tile.k + tile.value) + 2 * tile.part + small


def _tcgen05(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """sm_100: as above; fp32 operands that stay lie in tensor memory."""
    depth = depth_of(kernel, config, amd=False)
    stays, small = tile.q + tile.v, _small(kernel, config, tile)
    if kernel.size == 4:
        padded = sum(split_dim(kernel.qk)) > kernel.qk and tile.looped == 16
        twice = kernel.name == "units" or padded or (kernel.name.endswith("dkdv") and config.num_warps > 4)
        scores = tile.scores * (2 if twice else 1)
        return _aligned(depth * (tile.k + tile.value) + max(2 * tile.part, scores) + small)
    used_twice = {"dq": 1, "units_dq": 1, "dkdv": 2, "units_dkdv": 2}.get(kernel.name, 0)
    once = tile.k + tile.value if used_twice else max(tile.k, tile.value)
    steps = (depth + 1) * (tile.k + tile.value) if depth else once
    again = tile.k + (tile.value if used_twice == 2 else 0) if used_twice and config.num_stages > 1 else 0
    wide = (split_dim(kernel.qk), split_dim(kernel.v))[:used_twice]
    two_parts = sum(tile.looped * first * kernel.size for first, second in wide if second and depth)
    scores = 2 * tile.scores if used_twice == 2 and depth and min(tile.resident, tile.looped) == 128 else 0
    return _aligned(stays + steps + again + two_parts + scores + small)


def _aligned(total: int) -> int:
    """With the gaps in front of tiles that begin at multiples of 1 KB."""
    return total + min(4160, 64 + total // 12)


def _mfma(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """gfx942: rows that stay are kept in registers."""
    depth = depth_of(kernel, config, amd=True)
    first = tile.resident * max(split_dim(kernel.qk)[0], split_dim(kernel.v)[0] if tile.v else 0) * kernel.size
    both = 2 if kernel.reads and kernel.name == "dkdv" and config.num_stages > 1 else 1  # p and ds
    scores = both * tile.scores
    ranks = _ranks(kernel, config)
    if depth:
        slim = 16 * 16 * kernel.size * (split_dim(kernel.qk)[1] == 16) if tile.looped == 16 and kernel.size == 2 else 0
        slim *= 2 if kernel.v == kernel.qk else 1  # a part of 16 x 16 is too small to be loaded ahead
        return max(first, depth * (tile.k + tile.value - slim) + slim + scores + ranks)
    together = split_dim(kernel.v)[1] and tile.resident >= 64
    return max(first, tile.part + scores if together else max(tile.part, scores), ranks)


def spills(kernel: KernelShape, config: Config, architecture: str) -> bool:
    """Whether a thread needs more words for accumulators and scores than any kernel of the tables has.

    A coarse bound: operands are not in it. benchmarks/NOTES.md, "Footprint of a block", says how often it is right.
    """
    config = config._replace(block_m=rows_of(kernel, config))
    unit = matrix_unit(kernel, config, architecture)
    return registers(kernel, config, unit) > REGISTERS[unit]


def registers(kernel: KernelShape, config: Config, unit: str) -> int:
    """Of a thread, for accumulators and scores alone."""
    qk, v = sum(split_dim(kernel.qk)), sum(split_dim(kernel.v))
    threads = config.num_warps * (64 if unit == "mfma" else 32)
    rows = config.block_n if kernel.name.endswith("dkdv") else config.block_m
    width = {"dq": qk, "units_dq": qk, "dkdv": qk + v, "units_dkdv": qk + v, "select": 0}.get(kernel.name, v)
    scores = config.block_m * config.block_n * (2 if kernel.name in _BACKWARD else 1)
    return (rows * width + scores) // threads


def fits(kernel: KernelShape, config: Config, architecture: str) -> bool:
    """Shared memory within the limit of one block, and no spills predicted."""
    limit = SHARED_LIMITS.get(architecture, min(SHARED_LIMITS.values()))
    return shared_bytes(kernel, config, architecture) <= limit and not spills(kernel, config, architecture)


_ROWS, _COLUMNS = 16, 8  # of a warp in one instruction; with wgmma 4 warps have 64 rows
_SIDE = 32  # of a matrix instruction of CDNA, where a product has as many rows and columns; else 16


def product_repeats(kernel: KernelShape, config: Config, architecture: str) -> int:
    """How often the products of a loop are computed, at most: 1, or more where warps reach past the edge of a tile."""
    config = config._replace(block_m=rows_of(kernel, config))
    tile, warps = tile_of(kernel, config), config.num_warps
    unit = matrix_unit(kernel, config, architecture)
    if unit == "tcgen05":  # one thread starts a product for the block; its result is read once
        return 1
    if unit == "wgmma":
        return max(1, _ROWS * warps // tile.resident)
    side = _SIDE if min(tile.resident, tile.looped) >= _SIDE else _ROWS
    if _alone(kernel, unit):
        area = side * side if unit == "mfma" else _ROWS * _COLUMNS
        return max(1, area * warps // (tile.resident * tile.looped))
    if unit == "mfma":
        return max(1, side * warps // tile.resident)
    last = _last_columns(kernel, tile.looped)
    if tile.resident >= last:
        return max(1, _ROWS * warps // tile.resident)
    return max(1, _COLUMNS * warps // min(tile.looped, last))


def _alone(kernel: KernelShape, unit: str) -> bool:
    """Whether no other product follows in a step: it is spread both ways. On NVIDIA a second part of the head does."""
    return kernel.name == "select" and kernel.size == 2 and (unit == "mfma" or not split_dim(kernel.qk)[1])


def _last_columns(kernel: KernelShape, looped: int) -> int:
    """Columns of the last product of a step, after whose shape mma spreads all of them."""
    if kernel.name == "select":
        return looped
    first, second = split_dim(kernel.qk if kernel.name.endswith(("dq", "dkdv")) else kernel.v)
    return second or first


def without_repeats(kernel: KernelShape, config: Config, architecture: str) -> Config:
    """The configuration with as many warps as its tile has work for: pages, units and short groups make tiles small."""
    while config.num_warps > 1 and product_repeats(kernel, config, architecture) > 1:
        config = config._replace(num_warps=config.num_warps // 2)
    return config


_WARPS = (1, 2, 4, 8)
_LEAST_WARPS = 4  # of NVIDIA, whose large products take as many; the tables have fewer where a tile has no more rows

# One step from the configuration of the tables: factors of block_m, block_n and warps, stages more. Rows and warps also
# change together, which leaves the registers of a thread as they are; so do wider blocks and fewer of them ahead.
STEPS = (
    (1, 1, 1, 1),
    (1, 1, 1, -1),
    (1, 2, 1, 0),
    (1, 0.5, 1, 0),
    (2, 1, 1, 0),
    (0.5, 1, 1, 0),
    (1, 1, 2, 0),
    (1, 1, 0.5, 0),
    (2, 1, 2, 0),
    (0.5, 1, 0.5, 0),
    (1, 2, 1, -1),
)
# A tile over units visits what any of its queries chose. With a quarter of 64 rows a query of 16 heads has its own.
UNIT_STEPS = (*STEPS, (0.25, 1, 1, 0))
UNIT_KERNELS = ("units", "units_dq", "units_dkdv")


def candidates(kernel: KernelShape, default: Config, architecture: str, most_n: int, rows_fixed: bool) -> list[Config]:
    """The default, then its neighbours (ten at most) that are predicted to fit and to compute no product twice, in the
    order of `rank`.

    most_n: keys of a page or a unit, which a block does not exceed (0: no bound). rows_fixed: the heads of a group are
    the rows, whatever block_m says.
    """
    steps = UNIT_STEPS if kernel.name in UNIT_KERNELS else STEPS
    near = dict.fromkeys(stepped(default, of_keys(step) if kernel.name.endswith("dkdv") else step) for step in steps)
    allowed = [x for x in near if blocks_fit(x, most_n) and not (rows_fixed and x.block_m != default.block_m)]
    warps = min(default.num_warps, _LEAST_WARPS) if architecture.startswith("sm_") else 1
    shared = [x for x in allowed if x.num_warps >= warps and product_repeats(kernel, x, architecture) == 1]
    fitting = [x for x in shared if x != default and fits(kernel, x, architecture)]
    return [default, *sorted(fitting, key=lambda x: rank(kernel.name, x, default))]


def rank(kernel: str, config: Config, default: Config) -> tuple[bool, float, float]:
    """What a loop costs beside its products, which all tiles share: (loads are hidden less than by the default, loads
    for each pair of query and key, steps for each pair). Smaller is better.

    A tile keeps its rows and loads keys; that of dK and dV keeps its keys and loads rows. This is an order and no time:
    it does not know what is computed at the edges of a set and thrown away, nor how many tiles fill the device.
    """
    kept = config.block_n if kernel.endswith("dkdv") else config.block_m
    return config.num_stages < default.num_stages, 1 / kept, 1 / (config.block_m * config.block_n)


def of_keys(step: tuple[float, float, float, int]) -> tuple[float, float, float, int]:
    """The same step where a tile keeps its keys: they change with the warps, as rows do elsewhere."""
    m, n, warps, stages = step
    return (n, m, warps, stages) if warps != 1 else step


def stepped(config: Config, step: tuple[float, float, float, int]) -> Config:
    m, n, warps, stages = step
    return Config(
        int(config.block_m * m), int(config.block_n * n), int(config.num_warps * warps), config.num_stages + stages
    )


def blocks_fit(config: Config, most_n: int) -> bool:
    """Products have at least 16 rows and columns."""
    sizes = config.block_m >= 16 and 16 <= config.block_n <= (most_n or config.block_n)
    return sizes and config.num_warps in _WARPS and config.num_stages >= 1


_SHORT = 128  # lengths up to here are one bucket: a tile of rows or two


class Bucket(NamedTuple):
    """Calls that share a configuration."""

    function: str  # which launches the kernel: its name holds that of the softmax or choice
    kernel: str  # as in the tables
    architecture: str
    processors: int
    triton: str
    dtype: str
    size: int  # bytes per element
    qk: int
    v: int
    group: int  # heads that are rows of one tile
    queries: int  # up to
    keys: int  # up to
    most_n: int  # keys of a page or unit; 0: no bound
    paged: bool
    listed: bool


def length_bucket(length: int) -> int:
    """1, 128, 256, 512, ..."""
    return 1 if length <= 1 else max(_SHORT, 1 << (length - 1).bit_length())


@lru_cache(maxsize=4096)
def bucket_key(bucket: Bucket) -> str:
    return " ".join(f"{name}={value}" for name, value in bucket._asdict().items())


def bucket_candidates(bucket: Bucket, default: Config) -> list[Config]:
    return candidates(_kernel_shape(bucket), default, bucket.architecture, bucket.most_n, rows_fixed(bucket))


def rows_fixed(bucket: Bucket) -> bool:
    """The heads of a group are the rows of a tile, whatever the table says."""
    return bucket.kernel.endswith("decode") or (bucket.kernel == "select" and bucket.queries == 1)


def _kernel_shape(bucket: Bucket) -> KernelShape:
    name = plain_name(bucket.kernel)
    size = min(bucket.size, 4)  # fp64 is for the interpreter
    return KernelShape(
        name, bucket.qk, bucket.v, size, bucket.group, bucket.kernel.endswith("_bias"), bucket.paged, bucket.listed
    )


def bucket_allows(bucket: Bucket, config: Config) -> bool:
    """A configuration from a file, or for another call: it is predicted to run here, and to compute nothing twice."""
    kernel = _kernel_shape(bucket)
    return fits(kernel, config, bucket.architecture) and product_repeats(kernel, config, bucket.architecture) == 1


_FLUSH_BYTES = 256 << 20  # more than any L2 cache; as triton.testing.do_bench does
_ENOUGH_MS, _MOST_RUNS = 50.0, 25
# fp32 products may be tf32, of 10 bits; sums of fp64 in another order differ by more than one rounding.
_EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-10, torch.float64: 2.0**-40}
_OTHER_ROWS = 0.01  # of lists: units with nearly the same score change places when sums have another order
_PIECE = 1 << 24  # elements that are compared at a time


def milliseconds(run: Callable[[], object], most: float = math.inf) -> float:
    """The median of a few calls on the device, each after a write that empties the L2 cache.

    The writes last until the host has queued the call, so that its own time does not count. A call that takes twice as
    long as `most` is not repeated.
    """
    run()  # compiles
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    first, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    times: list[float] = []
    writes = 1
    while len(times) < 3 or (sum(times) < _ENOUGH_MS and len(times) < _MOST_RUNS):
        torch.cuda.synchronize()
        first.record()
        for _ in range(writes):
            flush.zero_()
        start.record()
        began = time.perf_counter()
        run()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        writes = min(64, 1 + math.ceil(writes * host * 1e3 / max(first.elapsed_time(start), 1e-3)))
        if times[0] > 2 * most:
            break
    return statistics.median(times[1:] or times)  # the first one was queued behind too few writes


def difference(wanted: object, found: object) -> str:
    """What is wrong with `found`, the results of a candidate; empty if nothing is.

    Another tile adds in another order and rounds the weights at another maximum: one rounding to the dtype each, in
    `wanted` as in `found`. So numbers may differ by two, measured at the largest; NaN and infinities stay in place.
    """
    return next(
        (text for pair in zip(tensors_of(wanted), tensors_of(found), strict=True) if (text := _wrong(*pair))), ""
    )


def tensors_of(x: Any) -> Iterator[Tensor]:
    """The tensors of a result, or of several, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Splits):  # keys go to other splits with blocks of another size
        yield from x.summed()
    elif isinstance(x, tuple | list):
        for part in x:
            yield from tensors_of(part)


def _wrong(wanted: Tensor, found: Tensor) -> str:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return "results of another shape"
    if not wanted.is_floating_point():
        share = (wanted != found).any(-1).double().mean().item() if wanted.numel() else 0.0
        return f"{share:.0%} of the lists differ" if share > _OTHER_ROWS else ""
    most, largest = 0.0, 0.0
    for a, b in zip(wanted.reshape(-1).split(_PIECE), found.reshape(-1).split(_PIECE), strict=True):
        finite = a.isfinite()
        same = torch.equal(finite, b.isfinite()) and torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
        if not same:
            return "NaN or infinity in other places"
        if finite.any():
            most = max(most, (a[finite] - b[finite]).abs().max().item())
            largest = max(largest, a[finite].abs().max().item())
    bound = 2 * _EPS[wanted.dtype] * largest
    return f"results differ by {most:.2e}, over {bound:.2e}" if most > bound else ""


def progress(text: str) -> None:
    """One line of a terminal, written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def device_name() -> str:
    """For the reader of a file: the GPU, and the CUDA or ROCm version of torch."""
    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.get_device_name()}, {torch.version.cuda or torch.version.hip}"


def config_text(config: Config) -> str:
    return f"{config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} stages"


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


STORE_FORMAT = 1
_MOST_BYTES = 1 << 22
_LOCK_SECONDS = 10.0  # a lock is held for a read and a write; its holder's death frees it
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor waiting for the writer of a pipe
_log = logging.getLogger("spdsl")
_said: set[str] = set()


class Winner(NamedTuple):
    """The configuration that was found for one key."""

    config: Config
    milliseconds: float | None  # of the calls that were timed; None: ranked by the model alone
    default: float | None  # the same for the configuration of the tables
    tried: int  # configurations
    gpu: str  # for the reader of the file


def say_once(text: str) -> None:
    """On standard error, unless the program's logging sends it elsewhere."""
    if text not in _said:
        _said.add(text)
        _log.warning("spdsl: %s", text)


class Store(NamedTuple):
    """A file of winners for one text of a module: winners of another text say nothing about this one."""

    path: Path
    digest: str
    owner: int | None = None  # of the module it lies beside, who may own the file too; None: private to the user


def store_at(path: Path, module: Path) -> Store:
    return Store(path, _text_digest(module), module.stat().st_uid)


def store_beside(module: Path) -> Store:
    return store_at(module.with_name(f"{module.stem}.tuned.json"), module)


def store_in_cache(module: Path) -> Store:
    """In the cache folder that `spdsl.load` uses."""
    folder = os.path.expanduser(os.environ.get("SPDSL_CACHE_DIR", ""))
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.expanduser("~/.cache"), "spdsl")
    digest = _text_digest(module)
    return Store(Path(folder) / f"{module.stem[:100]}_{digest}.tuned.json", digest)


def _text_digest(module: Path) -> str:
    return hashlib.sha256(module.read_bytes()).hexdigest()


def stored_winners(module: Path) -> dict[str, Winner]:
    """What both files know; measured winners before those of the model, then those beside the module."""
    return merged_winners(read_winners(store_in_cache(module)), read_winners(store_beside(module)))


def default_store(module: Path) -> Store:
    """The file beside the module where it can be written, else the one in the cache."""
    own = store_beside(module)
    usable = own.path.is_file() and not own.path.is_symlink() and os.access(own.path, os.W_OK)
    return own if usable else store_in_cache(module)


def merged_winners(old: Mapping[str, Winner], new: Mapping[str, Winner]) -> dict[str, Winner]:
    """New ones replace old ones, but a measured one is not replaced by one that the model ranked."""
    better = {key: x for key, x in new.items() if x.milliseconds is not None or key not in old or _ranked(old[key])}
    return {**old, **better}


def _ranked(winner: Winner) -> bool:
    return winner.milliseconds is None


def read_winners(store: Store) -> dict[str, Winner]:
    """Of a file that is missing, damaged, a link, for another text or somebody else's: none."""
    try:
        return _parsed(_own_bytes(store), store.digest)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        say_once(f"{store.path} is not used: {error}")
        return {}


def write_winners(store: Store, found: Mapping[str, Winner]) -> None:
    """Adds what was found; the winners of other processes stay. Readers see the old file or the new one, whole."""
    try:
        if store.owner is None:
            _make_private(store.path.parent)
        with _locked(store.path.with_name(f".{store.path.name}.lock")):
            whole = merged_winners(read_winners(store), found)
            _replace_file(store.path, _printed(whole, store.digest), 0o600 if store.owner is None else 0o644)
    except OSError as error:
        say_once(f"{store.path} cannot be written, found configurations stay in memory: {error.strerror or error}")


def _make_private(folder: Path) -> None:
    """The cache folder, made if needed. PermissionError if it is somebody else's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        state = folder.stat()
        if {state.st_uid, folder.lstat().st_uid} != {os.getuid()}:
            raise PermissionError(f"{folder} belongs to another user")
        if state.st_mode & 0o077:
            folder.chmod(0o700)


def _own_bytes(store: Store) -> bytes:
    with os.fdopen(os.open(store.path, os.O_RDONLY | _NO_LINK), "rb") as file:
        state = os.fstat(file.fileno())
        if hasattr(os, "getuid") and state.st_uid not in (os.getuid(), store.owner):
            raise PermissionError("it belongs to another user")
        if state.st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        return file.read(_MOST_BYTES)


def _body_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _printed(found: Mapping[str, Winner], digest: str) -> bytes:
    """One line for each winner."""
    winners = {key: {**x._asdict(), "config": list(x.config)} for key, x in sorted(found.items())}
    body = {"format": STORE_FORMAT, "module": digest, "winners": winners}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(x)}" for key, x in winners.items())
    head = json.dumps({"format": STORE_FORMAT, "module": digest, "sha256": _body_digest(body)})
    return f'{head[:-1]}, "winners": {{\n{lines}\n}}}}\n'.encode()


def _parsed(data: bytes, digest: str) -> dict[str, Winner]:
    """ValueError for anything but what `_printed` wrote for this text."""
    body = json.loads(data)
    _expect_stored(
        isinstance(body, dict) and body.pop("sha256", None) == _body_digest(body),
        "its contents do not match their hash",
    )
    _expect_stored(body.get("format") == STORE_FORMAT, "it has another format")
    _expect_stored(body.get("module") == digest, "it was made for another text of the module")
    _expect_stored(
        body.keys() == {"format", "module", "winners"} and isinstance(body["winners"], dict), "unknown fields"
    )
    return {key: _winner(x) for key, x in body["winners"].items()}


def _winner(x: Any) -> Winner:
    _expect_stored(isinstance(x, dict) and x.keys() == set(Winner._fields), "unknown fields")
    config = x["config"]
    numbers = isinstance(config, list) and len(config) == 4 and all(type(n) is int for n in config)
    _expect_stored(numbers and _is_possible(Config(*config)), f"no configuration: {config!r:.60}")
    times = all(
        t is None or (type(t) is float and math.isfinite(t) and t >= 0) for t in (x["milliseconds"], x["default"])
    )
    _expect_stored(times and type(x["tried"]) is int and isinstance(x["gpu"], str), "unknown values")
    return Winner(Config(*config), x["milliseconds"], x["default"], x["tried"], x["gpu"])


def _is_possible(config: Config) -> bool:
    """Powers of two that a kernel can have; whether it fits the GPU is asked where it is used."""
    blocks = all(16 <= size <= 512 and size & (size - 1) == 0 for size in config[:2])
    return blocks and config.num_warps in (1, 2, 4, 8, 16) and 1 <= config.num_stages <= 8


def _expect_stored(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; TimeoutError if that takes too long. Without flock (Windows) the last writer wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o600)
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError("another process holds its lock") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _replace_file(path: Path, data: bytes, mode: int) -> None:
    """Under the lock: drafts that are there now were left by processes that died."""
    prefix = f".{path.name}.draft-"
    for left in path.parent.glob(f"{prefix}*"):
        left.unlink(missing_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.chmod(draft, mode)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


TUNING_MODES = ("on", "stored", "off")
_FASTER = 0.98  # what a candidate must reach of the best time so far: less is noise between two runs
_SEARCH_SECONDS = 60.0  # for one kernel, compilations included


class Sought(NamedTuple):
    """What `tune` is looking for: everything anew."""

    group: Any  # torch.distributed.ProcessGroup, or None
    store: Store | None
    found: dict[Bucket, Winner]


class Search:
    """What one call of a host function asks for."""

    def __init__(self, function: str, layout: Layout) -> None:
        self.function, self.queries, self.keys = function, length_bucket(layout.longest), length_bucket(layout.keys)
        self.asked: dict[Bucket, Config] = {}  # buckets without a winner, and their defaults
        self.trial: dict[Bucket, Config] = {}  # what is tried in place of them
        self.last: tuple[Bucket, Config] | None = None
        self.searching = False  # after the first result, which is the caller's


_mode: str | None = None
_sought: Sought | None = None
_winners: dict[str, Winner] | None = None
_present = threading.local()  # its `search`: that of the call under way; a backward pass has a thread of its own
_searching = threading.Lock()


def tuning(mode: str | None) -> None:
    """`on`: kernels are tuned at their first call; `stored`: what was found before is used; `off`: the tables alone.

    None is as at first: what the environment variable SPDSL_TUNE says, `on` without it.
    """
    global _mode
    expect(mode is None or mode in TUNING_MODES, "mode", "on, stored, off or None", mode)
    _mode = mode


def tune(
    call: Callable[[], object], *, group: Any = None, store: str | os.PathLike[str] | None = None
) -> dict[Bucket, Winner]:
    """Finds the configurations of all kernels that `call()` launches, anew, and keeps them. -> winners by bucket.

    group: a torch.distributed process group. Its ranks make the same calls, and the slowest counts, so all choose the
    same. store: the file to keep them in; by default `<module>.tuned.json` where it can be written, else the cache.
    Raises RuntimeError if no kernel was launched, or a kernel runs in no configuration.
    """
    global _sought
    path = None if store is None else Path(store)
    before, _sought = _sought, Sought(group, _store(path), {})
    try:
        call()
        found = _sought.found
    finally:
        _sought = before
    if not found:
        raise RuntimeError("nothing to tune: the call launched no kernel on a GPU")
    return found


def tuned(function: Callable[..., Any]) -> Callable[..., Any]:
    """A host function with the best configurations that are known, found at its first call in a bucket.

    It takes a Layout and gives fresh tensors, so it can be run again. Nothing is found during a graph capture, nor by
    one rank of many on its own, since they must not choose differently: they use what is stored.
    """

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if not on_gpu(args) or (tuning_mode() == "off" and _sought is None):
            return function(*args, **named)
        run = partial(function, *args, **named)
        with _present_search(Search(function.__name__, next(x for x in args if isinstance(x, Layout)))) as search:
            return find_all(run, search) if may_search() else run()

    return call


def tuned_config(
    kernel: str, q: Tensor, v_dim: int, gpu: Gpu, group: int, most_n: int, paged: bool, listed: bool, default: Config
) -> Config:
    """The configuration for the call under way: on trial, the winner of its bucket, or the default."""
    search: Search | None = getattr(_present, "search", None)
    if search is None:
        return default
    bucket = Bucket(
        search.function, kernel, *gpu, triton.__version__, str(q.dtype).removeprefix("torch."), q.element_size(),
        q.shape[-1], v_dim, group, search.queries, search.keys, most_n, paged, listed,
    )  # fmt: skip
    if rows_fixed(bucket):
        default = default._replace(block_m=max(16, power_of_2(group)))
    search.last = (bucket, default)
    if bucket in search.trial:
        return search.trial[bucket]
    winner = known_winners().get(bucket_key(bucket)) if _sought is None else _sought.found.get(bucket)
    if winner is not None and bucket_allows(bucket, winner.config):
        return winner.config
    search.asked[bucket] = default
    return default


def searching() -> bool:
    """Whether the call under way is one of a search: it does all of its work, whatever is needed of its results."""
    search: Search | None = getattr(_present, "search", None)
    return search is not None and search.searching


def on_gpu(args: tuple[Any, ...]) -> bool:
    return next(x for x in args if isinstance(x, Tensor)).is_cuda


def tuning_mode() -> str:
    mode = _mode or os.environ.get("SPDSL_TUNE") or "on"
    expect(mode in TUNING_MODES, "SPDSL_TUNE", "on, stored or off", mode)
    return mode


def may_search() -> bool:
    if capturing():
        return False
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    return _sought is not None or (tuning_mode() == "on" and alone)


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def _present_search(search: Search) -> Iterator[Search]:
    before = getattr(_present, "search", None)
    _present.search = search
    try:
        yield search
    finally:
        _present.search = before


def find_all(run: Callable[[], Any], search: Search) -> Any:
    """The results of the call, from the first configurations that run; afterwards its buckets have winners."""
    result = _first_result(run, search)
    if search.asked and _searching.acquire(blocking=False):  # another thread's search would disturb the times
        try:
            if _sought is None:
                say_once("tuning kernels at the first call for a length; SPDSL_TUNE=off: never, `spdsl tune`: before")
            search.searching = True
            wanted = run()
            for bucket, default in list(search.asked.items()):
                _keep(bucket, _found(run, search, bucket, default, wanted))
        finally:
            search.searching = False
            _searching.release()
    return result


def _first_result(run: Callable[[], Any], search: Search) -> Any:
    """The default configurations are the first to be tried. RuntimeError if one kernel runs in none."""
    failed: dict[Bucket, dict[Config, str]] = {}
    while True:
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if search.last is None:
                raise
            bucket, default = search.last
            reasons = failed.setdefault(bucket, {})
            reasons[search.trial.get(bucket, default)] = failure(error)
            search.asked.setdefault(bucket, default)
            left = [x for x in bucket_candidates(bucket, default) if x not in reasons]
            if not left:
                told = "; ".join(f"{config_text(config)}: {reason}" for config, reason in reasons.items())
                raise RuntimeError(f"{bucket.function}: no configuration of {bucket.kernel} runs: {told}") from error
            search.trial[bucket] = left[0]


def _found(run: Callable[[], Any], search: Search, bucket: Bucket, default: Config, wanted: Any) -> Winner:
    """The fastest candidate whose results are those of the first. Leaves it on trial for the buckets that follow."""
    began = time.monotonic()
    first = search.trial.get(bucket, default)
    best, best_ms, first_ms, tried = first, math.inf, math.inf, 0
    configs = [first, *(x for x in bucket_candidates(bucket, default) if x != first)]
    for config in configs:
        progress(f"{bucket.function} {bucket.kernel}: {tried}/{len(configs)}, {config_text(best)} {best_ms:.3f} ms")
        search.trial[bucket] = config
        ms, reason = _attempt(run, wanted, best_ms * _FASTER)
        if reason:
            say_once(f"{bucket.function}: {bucket.kernel} with {config_text(config)} is skipped: {reason}")
        ms, seconds = agreed(ms, time.monotonic() - began)
        first_ms = ms if config == first else first_ms
        tried += 1
        if ms < best_ms * _FASTER:
            best, best_ms = config, ms
        if seconds > _SEARCH_SECONDS:
            break
    progress("")
    search.trial[bucket] = best
    best_time, first_time = (x if math.isfinite(x) else None for x in (best_ms, first_ms))
    return Winner(best, best_time, first_time, tried, device_name())


def _attempt(run: Callable[[], Any], wanted: Any, limit: float) -> tuple[float, str]:
    """-> its time, infinite if it fails or would win with other results; and why it is skipped."""
    try:
        ms = milliseconds(run, limit)
        reason = difference(wanted, run()) if ms < limit else ""
    except Exception as error:
        return math.inf, failure(error)
    return (math.inf if reason else ms), reason


def agreed(ms: float, seconds: float) -> tuple[float, float]:
    """The largest of all ranks of `tune`'s group: what follows from them is the same everywhere."""
    group = None if _sought is None else _sought.group
    if group is None:
        return ms, seconds
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    numbers = torch.tensor([ms, seconds], dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return numbers[0].item(), numbers[1].item()


def known_winners() -> dict[str, Winner]:
    global _winners
    if _winners is None:
        _winners = {}
        path = globals().get("__file__")
        if path and Path(path).is_file():
            _winners = stored_winners(Path(path).absolute())
    return _winners


def _keep(bucket: Bucket, winner: Winner) -> None:
    key = bucket_key(bucket)
    known_winners()[key] = winner
    if _sought is not None:
        _sought.found[bucket] = winner
    store = _store(None) if _sought is None else _sought.store
    if store is not None and winner.milliseconds is not None:  # else nothing could be timed: for this process only
        write_winners(store, {key: winner})


def _store(path: Path | None) -> Store | None:
    own = globals().get("__file__")
    if not own or not Path(own).is_file():
        return None
    return default_store(Path(own).absolute()) if path is None else store_at(path, Path(own).absolute())


# ---- 6. Launches ----------------------------------------------------------------------------------------------------


_KEYS_PER_SPLIT = 128  # fewer keys do not pay for one more partial result
_MOST_SPLITS = 128
_PROGRAMS_PER_PROCESSOR = 2


def lengths_to_try(most: int) -> Iterator[int]:
    """Lengths at which a step may visit most, up to `most` tokens: sets that begin anew do so at different places."""
    yield most
    yield from (most - (1 << i) for i in range((most - 1).bit_length()))


@lru_cache(maxsize=1024)  # every step of generation asks the same
def most_visited(visits: Callable[[int, int], Iterable[tuple[int, int, int, int]]], tokens: int, keys: int) -> int:
    """About as many keys as a step visits at any length up to `tokens`; visits(q, length) are ranges of its keys."""
    return max(reach(visits(length - 1, length), keys) for length in lengths_to_try(tokens))


def reach(ranges: Iterable[tuple[int, int, int, int]], keys: int) -> int:
    """Keys below `keys` in ranges (first, end, ..) in order, each once."""
    found, cursor = 0, 0
    for first, end, *_ in ranges:
        first, end = max(first, cursor), min(end, keys)
        if first < end:
            found, cursor = found + end - first, end
    return found


def split_count(groups: int, keys: int, processors: int) -> int:
    """Splits that fill the device when each of `groups` programs visits at most `keys` keys."""
    fill = -(-_PROGRAMS_PER_PROCESSOR * processors // max(groups, 1))
    return max(1, min(fill, keys // _KEYS_PER_SPLIT, _MOST_SPLITS))


# Kernels run on CUDA and ROCm tensors, and on CPU tensors under Triton's interpreter.
INTERPRETED = bool(triton.knobs.runtime.interpret)
KERNELS_ON_CPU = INTERPRETED


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constexprs: Any) -> None:
    """Starts a kernel; an empty grid is no launch."""
    if min(grid) > 0:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)


def uses_kernels(x: Tensor) -> bool:
    return x.device.type != "cpu" or KERNELS_ON_CPU


class Paged(NamedTuple):
    """Keys that lie in a cache: its page table (None: one piece per sequence), tokens per page (0) and capacity.

    spans: int32 [S, 2] = (0, entries), of a compressed stream.
    """

    table: Tensor | None
    page: int
    capacity: int
    spans: Tensor | None = None


def page_of(paged: Paged | None) -> int:
    return paged.page if paged is not None else 0


def config_for(
    kernel: str,
    q: Tensor,
    v_dim: int,
    paged: Paged | None = None,
    listed: bool = False,
    group: int = 1,
    most_n: int = 0,
    tables: Tables = TABLES,
) -> Config:
    """The configuration of `forward`, `dq`, `dkdv` or `decode` for these dims: tuned, or that of the tables.

    group: heads that are rows of one tile. A block of keys lies in one page, and has at most `most_n` keys.
    """
    gpu, page = gpu_of(q.device), page_of(paged)
    dim = table_dim(kernel, q.shape[-1], v_dim)
    found = SMALL if INTERPRETED else lookup(kernel, gpu.architecture, dim, q.element_size(), tables)
    bound = min(page or most_n, most_n or page)
    found = found._replace(block_n=min(found.block_n, bound or found.block_n))
    if not INTERPRETED:
        shape = KernelShape(plain_name(kernel), q.shape[-1], v_dim, q.element_size(), group)
        found = without_repeats(shape, found, gpu.architecture)
    found = tuned_config(kernel, q, v_dim, gpu, group, bound, page > 0, listed, found)
    return chained(found, page, listed)


def decode_config(q: Tensor, v_dim: int, group: int, paged: Paged) -> Config:
    """As above, with the group's heads as rows."""
    return config_for("decode", q, v_dim, paged, group=group)._replace(block_m=max(16, triton.next_power_of_2(group)))


def constants(
    q: Tensor, v_dim: int, scale: float, config: Config, group: int = 1, splits: int = 1, page: int = 0
) -> Const:
    """The constants of a kernel. The scale is one because a runtime float would be rounded to fp32."""
    acc = tl.float64 if q.dtype == torch.float64 else tl.float32
    values = (
        q.shape[-1], *split_dim(q.shape[-1]), v_dim, *split_dim(v_dim), config.block_m, config.block_n,
        group, splits, page, scale, acc, precision(q),
    )  # fmt: skip
    return Const(*(tl.constexpr(value) for value in values))


def precision(q: Tensor) -> str:
    """Of fp32 dots: three tf32 products on NVIDIA, which keep 21 bits; one where torch allows its 10 bits."""
    if q.dtype != torch.float32 or not gpu_of(q.device).architecture.startswith("sm_"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def strided(x: Tensor, sequences: int | None = None) -> Strided:
    """A tensor for a kernel. With `sequences`, a batch of 1 is shared by all of them."""
    batch = 0 if sequences is not None and x.shape[0] == 1 else x.stride(0)
    return Strided(x, batch, x.stride(1), x.stride(2))


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels take any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def room_like(x: Tensor) -> Tensor:
    """Memory in the shape of x whose last stride is 1, as kernels store: in the layout of x where that has it."""
    found = torch.empty_like(x)
    return found if found.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators, lse and delta."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def source(q: Tensor, k: Tensor, v: Tensor, sequences: int, layout: Layout, paged: Paged | None) -> Source:
    """The keys of one stream for a kernel."""
    group = tl.constexpr(q.shape[1] // k.shape[1])
    k, v = rows_contiguous(k), rows_contiguous(v)
    if paged is None or paged.table is None:
        return Source(strided(k, sequences), strided(v, sequences), k.shape[2], layout.k_spans, None, 0, group)
    return Source(strided(k), strided(v), 0, layout.k_spans, paged.table, paged.table.stride(0), group)


def call_of(q: Tensor, layout: Layout) -> Call:
    # Without spans the host knows what answers; and what tuning compares and times is all of the work.
    leaves = tl.constexpr(layout.k_spans is not None and not searching())
    return Call(q.shape[2], layout.keys, layout.q_spans, layout.k_spans, layout.q_offset, layout.k_offset, leaves)


def delta_of(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """sum(out * dout) - dlse, [B, Hq, N]"""
    delta = out.new_empty(out.shape[:3], dtype=wide(out.dtype))
    config = Config(16 if INTERPRETED else 64, 16, 4, 1)
    launch(
        row_delta, (triton.cdiv(out.shape[2], config.block_m), out.shape[1], out.shape[0]),
        strided(rows_contiguous(out)), strided(dout), None if dlse is None else strided(dlse), strided(delta),
        out.shape[2],
        constants(out, out.shape[3], 1.0, config), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return delta


def expect_one_dim(outs: Sequence[Tensor]) -> None:
    """ValueError unless all parts of a result have values of one dim."""
    dims = sorted({out.shape[-1] for out in outs})
    if len(dims) > 1:
        raise ValueError(f"branches with values of {' and '.join(map(str, dims))} dims cannot be one result")


_STEP = 16  # splits that a program loads at once: their latencies overlap
_Whole = tuple[Tensor, Tensor]  # out [B, H, N, D], lse [B, H, N]


def merged_part(part: Splits | _Whole) -> _Whole:
    """out, lse of one softmax."""
    if not isinstance(part, Splits):
        return part
    out, lse = launch_join([[part]], None)
    return out, lse[..., 0]


def launch_join(branches: Sequence[Sequence[Splits]], gates: Tensor | None) -> _Whole:
    """Branches, each of parts over disjoint keys, and gates [B, H, 1, branches] -> out, and lse [B, H, 1, branches]."""
    expect_one_dim([part.out for branch in branches for part in branch])
    first = branches[0][0]
    batch, heads, _, dim = first.out.shape
    out = torch.empty(batch, heads, 1, dim, device=first.out.device, dtype=first.dtype)
    lse = torch.empty(batch, heads, 1, len(branches), device=first.out.device, dtype=first.lse.dtype)
    _launch(branches, gates, out, lse)
    return out, lse


def _launch(branches: Sequence[Sequence[Splits]], gates: Tensor | None, out: Tensor | None, lse: Tensor) -> None:
    parts = tuple(
        JoinPart(x.out, x.lse, x.sink, x.lse.shape[2], tl.constexpr(i), tl.constexpr(x is branch[-1]))
        for i, branch in enumerate(branches)
        for x in branch
    )
    step = min(_STEP, triton.next_power_of_2(max(x.splits for x in parts)))
    dim = 0 if out is None else out.shape[3]
    acc = tl.float64 if lse.dtype == torch.float64 else tl.float32
    padded = triton.next_power_of_2(max(1, dim))
    values = (len(parts), len(branches), dim, padded, step, acc)
    launch(
        join_splits, tuple(lse.shape[:2]), parts, None if gates is None else strided(rows_contiguous(gates)), out, lse,
        JoinConst(*(tl.constexpr(value) for value in values)),
        num_warps=4 if step * padded > 1024 else 1, num_stages=1,
    )  # fmt: skip


_APPENDED = 32  # new tokens of a program; a decode step has one
_TABLE_ENTRIES = 64  # entries of the page table that are looked at at once


class Append(NamedTuple):
    """`added` tokens behind the last one of each sequence: spans int32 [S, 2] = (0, length), pages [S, page_width]."""

    spans: torch.Tensor
    pages: torch.Tensor | None
    page_width: int
    capacity: int
    added: int


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


@jit
def append_places(call, s, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """The new tokens of a program: number, position, home (page or sequence), slot, and whether it has room: [BLOCK]"""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(call.spans + 2 * s + 1) + token
    room = (token < call.added) & (position < call.capacity)
    home, slot, room = cached_homes(call, s, position, room, PAGE)
    return token, position, home, slot, room


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
def copy_values(new, store, s, token, position, room):
    """One value per token, never in pages."""
    value = tl.load(at(new, s, 0, 0).data + token * new.token, mask=room, other=0)
    tl.store(at(store, s, 0, 0).data + position * store.token, value.to(store.data.dtype.element_ty), mask=room)


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
        if row == 0:
            copy_values(values[i][0], values[i][1], s, token, position, room)


@jit
def append_lengths(dropped, call, ENTRIES: tl.constexpr, PAGE: tl.constexpr):
    """Lengths grow up to the capacity or the first hole in the pages; other tokens count as dropped.  Grid (S,)."""
    s = tl.program_id(0)
    length = tl.load(call.spans + 2 * s + 1).to(tl.int64)
    end = tl.minimum(length + call.added, call.capacity)
    if PAGE:
        last = ((end + (PAGE - 1)) // PAGE).to(tl.int32)
        hole = last
        for first in tl.range((length // PAGE).to(tl.int32), last, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            page = tl.load(call.pages + tl.cast(s, tl.int64) * call.page_width + entry, mask=entry < last, other=0)
            hole = tl.minimum(hole, tl.min(tl.where(page < 0, entry, last), 0))
        end = tl.maximum(length, tl.minimum(end, hole.to(tl.int64) * PAGE))
    tl.store(call.spans + 2 * s + 1, end.to(tl.int32))
    tl.store(dropped + s, tl.load(dropped + s) + (call.added - (end - length)).to(tl.int32))


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
    """The new rows of all streams, and of values (new [B, T], store [B, tokens]), one per token."""
    block, heads = append_block(call), [stream.k.shape[1] for stream in streams]
    firsts = [sum(heads[:i]) for i in range(len(heads))]
    launch(
        append_rows, (triton.cdiv(call.added, block), sum(heads), len(call.spans)),
        tuple(_appended(stream, first) for stream, first in zip(streams, firsts, strict=True)),
        tuple((_token_values(new, store), _rows(store)) for new, store in values) or None, call,
        num_warps=1 if block == 1 else 4, num_stages=1,
        STREAMS=len(streams), VALUES=len(values), BLOCK=block, PAGE=page,
    )  # fmt: skip


def _appended(stream: NewRows, first: int) -> Appended:
    new_k, k, new_v, v = stream
    qk, v_dim = k.shape[3], 0 if v is None else v.shape[3]
    sizes = (first, k.shape[1], qk, triton.next_power_of_2(qk), v_dim, triton.next_power_of_2(max(1, v_dim)))
    return Appended(
        strided(rows_contiguous(new_k)), strided(k),
        None if new_v is None else strided(rows_contiguous(new_v)), None if v is None else strided(v),
        *(tl.constexpr(size) for size in sizes),
    )  # fmt: skip


def _token_values(new: Tensor, store: Tensor) -> Strided:
    return _rows((new.view(torch.uint8) if new.dtype == torch.bool else new).to(store.dtype))


def _rows(x: Tensor) -> Strided:
    """[B, tokens]"""
    return Strided(x, x.stride(0), 0, x.stride(1))


def launch_lengths(dropped: Tensor, call: Append, page: int) -> None:
    """After everything that is stored at the old lengths."""
    launch(
        append_lengths, (len(call.spans),), dropped, call, num_warps=1, num_stages=1,
        ENTRIES=_TABLE_ENTRIES, PAGE=page,
    )  # fmt: skip


def attend_parts(heads: int, keys: Sequence[tuple[Tensor, Tensor]], corner: Corner) -> list[Part]:
    """The streams of attend for the CPU engine; `keys` and `t` belong to the corner's sequences."""
    h = torch.arange(heads).view(1, -1, 1, 1)
    parts = []

    def visits(first: int, end: int) -> list[tuple[int, int, bool]]:
        q_first, q_last = corner.q_origin + first, corner.q_origin + end - 1
        return visits_of_ranges(attend_visits(q_first, q_last, corner.length), corner)

    def visible(q: Tensor, k: Tensor) -> Tensor:
        return attend_mask(q[None, None], k[None, None] + corner.k_origin, h, corner.length)

    parts.append(Part(*keys[0], visits, visible))
    return parts


def attend_cpu_forward(q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: Layout) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(*q.shape[:3], keys[0][1].shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))
    for corner in corners(q, layout):
        own = [(k[corner.batch, :, corner.keys], v[corner.batch, :, corner.keys]) for k, v in keys]
        parts = attend_parts(q.shape[1], own, corner)
        part_out, part_lse = sparse_forward(
            q[corner.batch, :, corner.rows], parts, Logits(q.shape[-1] ** -0.5, None, corner.q_origin), None
        )
        out[corner.batch, :, corner.rows], lse[corner.batch, :, corner.rows] = part_out, part_lse
    return out, lse


def attend_cpu_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
    layout: Layout,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    dq = room_like(q).zero_()
    grads = [(room_like(k).zero_(), room_like(v).zero_()) for k, v in keys]
    for corner in corners(q, layout):
        rows = (corner.batch, slice(None), corner.rows)
        own = [(k[corner.batch, :, corner.keys], v[corner.batch, :, corner.keys]) for k, v in keys]
        parts = attend_parts(q.shape[1], own, corner)
        dq[rows], found = sparse_backward(
            dout[rows], None if dlse is None else dlse[rows], q[rows], parts, out[rows], lse[rows],
            Logits(q.shape[-1] ** -0.5, None, corner.q_origin),
        )  # fmt: skip
        for (dk, dv), (own_dk, own_dv) in zip(grads, found, strict=True):
            dk[corner.batch, :, corner.keys], dv[corner.batch, :, corner.keys] = own_dk, own_dv
    return dq, grads


@tuned
def attend_kernel_forward(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: Layout, paged: Paged | None = None
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Rows in no sequence keep out = 0, lse = -inf."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    v_dim = keys[0][1].shape[3]
    out = q.new_zeros(*q.shape[:3], v_dim)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))
    config = config_for("forward", q, v_dim, paged)
    q = rows_contiguous(q)
    C = constants(q, v_dim, q.shape[-1] ** -0.5, config, page=page_of(paged))
    launch(
        attend_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        strided(q, sequences), source(q, *keys[0], sequences, layout, paged), 
        strided(out, sequences), strided(lse, sequences), call_of(q, layout), None,
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@tuned
def attend_kernel_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
    layout: Layout,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-> dq, (dk, dv) of each stream, from the lse and out given, which may be those of a joint softmax."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    q, dout = rows_contiguous(q), rows_contiguous(dout)
    v_dim = keys[0][1].shape[3]
    delta = delta_of(out, dout, dlse)
    dq = room_like(q).zero_()
    grads = [(room_like(k).zero_(), room_like(v).zero_()) for k, v in keys]
    call = call_of(q, layout)
    rows = [strided(x, sequences) for x in (dout, lse, delta)]
    sources = [source(q, k, v, sequences, layout, None) for k, v in keys]

    config = config_for("dq", q, v_dim)
    launch(
        attend_dq, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        strided(q, sequences), *sources, *rows, strided(dq, sequences), call,
        constants(q, v_dim, q.shape[-1] ** -0.5, config), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    config = config_for("dkdv", q, v_dim)
    k, (dk, dv) = keys[0][0], grads[0]
    group = q.shape[1] // k.shape[1]
    longest = k.shape[2] if layout.k_spans is None else min(layout.longest, k.shape[2])
    launch(
        attend_dkdv, (triton.cdiv(longest, config.block_n), k.shape[1], sequences),
        strided(q, sequences), sources[0], *rows, strided(dk, sequences), strided(dv, sequences), call,
        constants(q, v_dim, q.shape[-1] ** -0.5, config, group), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, grads


@tuned
def attend_kernel_decode(q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: Layout, paged: Paged) -> Splits:
    """One query per sequence, in splits over the visited blocks."""
    batch, heads = q.shape[:2]
    v_dim = keys[0][1].shape[3]
    group = min(heads // k.shape[1] for k, _ in keys)
    config = decode_config(q, v_dim, group, paged)
    visited = most_visited(attend_decode_visits, layout.keys, paged.capacity)
    splits = split_count(batch * (heads // group), visited, gpu_of(q.device).processors)
    q = rows_contiguous(q)
    partial = torch.empty(batch, heads, splits, v_dim, device=q.device, dtype=wide(q.dtype))
    partial_lse = partial.new_empty(batch, heads, splits)
    launch(
        attend_decode, (batch, heads // group, splits),
        strided(q), source(q, *keys[0], batch, layout, paged), 
        strided(partial), strided(partial_lse), call_of(q, layout),
        constants(q, v_dim, q.shape[-1] ** -0.5, config, group, splits, page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return Splits(partial, partial_lse, None, q.dtype)


# ---- 7. Operators ---------------------------------------------------------------------------------------------------


def attend_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [
        (k, v),
    ]


def attend_forward_of(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """-> out, lse"""
    run = attend_kernel_forward if uses_kernels(q) else attend_cpu_forward
    return run(q, attend_keys(q, k, v), layout)


def attend_backward_of(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout
) -> list[Tensor]:
    """-> gradients of q, k, v; out and lse may be those of a joint softmax"""
    keys = attend_keys(q, k, v)
    run = attend_kernel_backward if uses_kernels(q) else attend_cpu_backward
    dq, grads = run(dout, dlse, q, keys, out, lse, layout)
    return [
        dq,
        grads[0][0],
        grads[0][1],
    ]


@torch.library.custom_op(
    f"{NAMESPACE}::attend_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? q_spans, Tensor? k_spans, SymInt? q_offset, SymInt? k_offset, SymInt longest, SymInt tokens) -> (Tensor, Tensor)",
)
def attend_forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_spans: Tensor | None,
    k_spans: Tensor | None,
    q_offset: int | None,
    k_offset: int | None,
    longest: int,
    tokens: int,
) -> tuple[Tensor, Tensor]:
    return attend_forward_of(q, k, v, Layout(q_spans, k_spans, q_offset, k_offset, longest, tokens))


@attend_forward_op.register_fake
def _(q, k, v, q_spans, k_spans, q_offset, k_offset, longest, tokens):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@torch.library.custom_op(
    f"{NAMESPACE}::attend_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? q_spans, Tensor? k_spans, SymInt? q_offset, SymInt? k_offset, SymInt longest, SymInt tokens) -> Tensor[]",
)
def attend_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_spans: Tensor | None,
    k_spans: Tensor | None,
    q_offset: int | None,
    k_offset: int | None,
    longest: int,
    tokens: int,
) -> list[Tensor]:
    """-> gradients of q, k, v"""
    return attend_backward_of(
        dout, dlse, out, lse, q, k, v, Layout(q_spans, k_spans, q_offset, k_offset, longest, tokens)
    )


@attend_backward_op.register_fake
def _(dout, dlse, out, lse, q, k, v, q_spans, k_spans, q_offset, k_offset, longest, tokens):
    return [
        room_like(x)
        for x in (
            q,
            k,
            v,
        )
    ]


def attend_second_derivative(ctx, *grads):
    raise NotImplementedError(f"{PATTERN}: attention has first derivatives only (no create_graph=True through it)")


attend_backward_op.register_autograd(attend_second_derivative)


def attend_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    tensors = 3
    ctx.save_for_backward(*output, *inputs[: tensors + 2])
    ctx.numbers = inputs[tensors + 2 :]


def attend_gradients(ctx, dout, dlse):
    out, lse, *inputs = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = attend_backward_op(dout, dlse, out, lse, *inputs, *ctx.numbers)
    return *grads, *[None] * 6


attend_forward_op.register_autograd(attend_gradients, setup_context=attend_save)


# ---- 8. Public functions --------------------------------------------------------------------------------------------


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_KINDS = {"float": "floating point", "int": "an integer dtype", "bool": "bool"}


def check_attention(
    queries: Mapping[str, tuple[Tensor, int | None, int | None]],
    keys: Mapping[str, tuple[Tensor, int | None, str]],
    values: Mapping[str, tuple[Tensor, int | None, str]],
) -> None:
    """queries name -> ([B, Hq, N, D], heads, dim); keys name -> ([B, Hk, M, D], heads, name of the query that asks
    them); values name -> ([B, Hk, M, Dv], dim, name of their keys).

    Declared heads and dims must match; None leaves them to the call. All queries have one number of tokens; heads and
    dim are those of the first unless declared.
    """
    first_name, (first, *_) = next(iter(queries.items()))
    for name, (x, *_) in [*queries.items(), *keys.items(), *values.items()]:
        expect_tensor(name, x)
        expect(x.dim() == 4, name, "4 dimensions [batch, heads, tokens, dim]", list(x.shape))
        expect(x.dtype in DTYPES, name, "float16, bfloat16, float32 or float64", x.dtype)
        expect(x.shape[3] > 0, name, "a head dim of 1 or more", 0)
        expect(x.dtype == first.dtype, name, f"dtype {first.dtype} like {first_name}", x.dtype)
        expect(x.device == first.device, name, f"device {first.device} like {first_name}", x.device)
        expect(x.shape[0] == first.shape[0], name, "batch {} like {}", x.shape[0], first.shape[0], first_name)
    for name, (x, heads, dim) in queries.items():
        expect(heads is None or x.shape[1] == heads, name, f"{heads} heads", x.shape[1])
        expect(dim is None or x.shape[3] == dim, name, f"head dim {dim}", x.shape[3])
        wanted = [first.shape[0], heads or first.shape[1], first.shape[2], dim or first.shape[3]]
        expect(list(x.shape) == wanted, name, "shape {} like {}", list(x.shape), wanted, first_name)
    tokens = next(iter(keys.values()))[0].shape[2]
    for name, (x, heads, asking) in keys.items():
        q = queries[asking][0]
        expect(x.shape[3] == q.shape[3], name, "head dim {} like {}", x.shape[3], q.shape[3], asking)
        expect(x.shape[2] == tokens, name, "{} tokens like the other keys", x.shape[2], tokens)
        expect(heads is None or x.shape[1] == heads, name, f"{heads} heads", x.shape[1])
        divides = x.shape[1] > 0 and q.shape[1] % x.shape[1] == 0
        expect(divides, name, "heads that divide the {} of {}", x.shape[1], q.shape[1], asking)
    for name, (x, dim, key) in values.items():
        k = keys[key][0]
        expect(list(x.shape[:3]) == list(k.shape[:3]), name, "shape {} + [dim]", list(x.shape), list(k.shape[:3]))
        expect(dim is None or x.shape[3] == dim, name, f"head dim {dim}", x.shape[3])


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values under torch.autocast: as for PyTorch's own attention, all in the type it chose."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch 2.11 cannot trace torch.amp.is_autocast_available
        return tensors
    wanted = torch.get_autocast_dtype(kind)
    return tuple(x.to(wanted) if isinstance(x, Tensor) and x.dtype in DTYPES[:3] else x for x in tensors)


def check_example(batch: int, tokens: int, dtype: torch.dtype, **sizes: int) -> None:
    """The arguments of `example_inputs`."""
    expect_number("batch", batch, "a number >= 0")
    expect_number("tokens", tokens, "a number >= 0")
    for name, size in sizes.items():
        expect_number(name, size, "a number >= 1", 1)
    expect_dtype(dtype)


_SPARE_PAGES = 1024  # storage reaches to the largest page of a table: so far beyond its entries a number is a mistake


def check_cache(
    batch: int, capacity: int, page: int | None, table: Tensor | None, dtype: torch.dtype
) -> tuple[int, int, int | None]:
    """-> batch, capacity and page as Python numbers."""
    batch = expect_number("batch", batch, "a number >= 0", 0)
    capacity = expect_number("capacity", capacity, "1 to 2**31 - 1 tokens", 1)
    if page is not None:
        page = expect_number("page", page, "None or a power of two >= 16", 16)
        expect(page & (page - 1) == 0, "page", "None or a power of two >= 16", page)
    expect(page is not None or table is None, "page_table", "None, as page is None", type(table).__name__)
    expect_dtype(dtype)
    return batch, capacity, page


def expect_cache(cache: object, kind: type) -> None:
    """A cache of this module: that of another one keeps other streams."""
    if not isinstance(cache, kind):
        got = type(cache).__name__ if type(cache).__name__ != kind.__name__ else f"that of {type(cache).__module__}"
        raise TypeError(f"cache: expected a {kind.__name__} of {kind.__module__}, got {got}")


def check_page_table(table: Tensor, batch: int, width: int) -> None:
    """int32 [batch, width]: each page once, -1 where none is handed out."""
    expect_tensor("page_table", table)
    expect(not table.is_meta, "page_table", "a tensor with numbers", table.device)
    expect(table.dtype == torch.int32, "page_table", "int32", table.dtype)
    expect(list(table.shape) == [batch, width], "page_table", f"[{batch}, {width}]", list(table.shape))
    most = 2 * table.numel() + _SPARE_PAGES
    least, last = (int(x) for x in table.aminmax()) if table.numel() else (0, 0)
    expect(least >= -1 and last < most, "page_table", f"pages below {most}, or -1", f"{least} to {last}")
    used = table[table >= 0]
    expect(used.unique().numel() == used.numel(), "page_table", "pages that are used once", "a page used twice")


def row_index(rows: int | Sequence[int] | Sequence[bool] | Tensor, batch: int, device: torch.device) -> Tensor:
    """Row numbers as int64 [n], or a mask as bool [batch], on the device of the cache."""
    if isinstance(rows, Tensor):
        expect_tensor("rows", rows)
        expect(not rows.is_meta or device.type == "meta", "rows", f"a tensor on {device} or the host", rows.device)
    found = rows if isinstance(rows, Tensor) else _row_tensor(rows)
    expected = f"None, numbers from {-batch} to {batch - 1}, or bool [{batch}]"
    if found.dtype == torch.bool:
        expect(list(found.shape) == [batch], "rows", expected, f"bool {list(found.shape)}")
        return found.to(device)
    fits = found.dtype in (torch.int32, torch.int64) and found.dim() <= 1
    expect(fits, "rows", expected, f"{found.dtype} {list(found.shape)}")
    outside = [row for row in found.reshape(-1).tolist() if not -batch <= row < batch]
    expect(not outside, "rows", expected, outside[:8])
    return (found.reshape(-1).long() % max(1, batch)).to(device)


def _row_tensor(rows: Any) -> Tensor:
    """Of a number or a sequence of numbers, or of bools: never of both, since a bool is a number, too."""
    is_list = isinstance(rows, Sequence) and not isinstance(rows, str | bytes)
    several: list[Any] = list(rows) if is_list else [rows]
    if is_list and several and all(isinstance(row, bool) for row in several):
        return torch.tensor(several)
    if not all(isinstance(row, Integral) and not isinstance(row, bool) for row in several):
        got = " and ".join(sorted({type(row).__name__ for row in several}))
        raise TypeError(f"rows: expected None, numbers, or a bool for each sequence, got {got}")
    numbers = [max(-INT32_MOST, min(int(row), INT32_MOST)) for row in several]  # no tensor has room for more
    return torch.tensor(numbers, dtype=torch.long)


class StreamShape(NamedTuple):
    heads: int
    qk_dim: int
    v_dim: int  # 0: no values of its own


class CacheStore:
    """`batch` sequences of at most `capacity` tokens.

    Paged (`page` tokens, a power of two >= 16): k[stream] [pages, heads, page, qk], page_table int32
    [batch, pages per sequence] (-1: none). `page=None`: k[stream] [batch, heads, capacity, qk].
    `lengths` and `dropped` (tokens that found no room) are int32 [batch] on the device and updated in place; `lengths`
    is the second column of `spans` [batch, 2] = (0, length), which is what kernels read. Copies (pickle, deepcopy,
    `torch.save`) are caches of their own.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        streams: Mapping[str, StreamShape],
        tokens: Mapping[str, torch.dtype],
        *,
        page: int | None,
        device: torch.device | str,
        dtype: torch.dtype,
        page_table: Tensor | None,
    ) -> None:
        batch, capacity, page = check_cache(batch, capacity, page, page_table, dtype)
        for name, shape in streams.items():
            fits = min(shape.heads, shape.qk_dim) > 0 and shape.v_dim >= 0
            expect(fits, name, "positive heads and dims", tuple(shape))
        self.batch, self.capacity, self.page = batch, capacity, page
        self.at_least = 0  # tokens that every sequence holds for certain, known without asking the device
        self.spans = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.dropped = torch.zeros(batch, dtype=torch.int32, device=device)
        self.page_table = self._table(page_table, device)
        # One home more than there are tokens: what finds no room is written there and never read.
        homes = batch if self.page_table is None else self._pages() + 1
        rows = capacity + 1 if page is None else page
        self.k = {name: _storage(homes, s.heads, rows, s.qk_dim, device, dtype) for name, s in streams.items()}
        self.v = {
            name: _storage(homes, s.heads, rows, s.v_dim, device, dtype) for name, s in streams.items() if s.v_dim
        }
        self.tokens = {
            name: torch.zeros(batch, capacity + 1, dtype=kind, device=device) for name, kind in tokens.items()
        }
        self.maps: dict[str, Tensor] = {}  # of drawn choices, made at first use

    @property
    def lengths(self) -> Tensor:
        """A view: what is written there is the length. It is no tensor of its own, or copies would part from it."""
        return self.spans[:, 1]

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        self.spans[:, 1] = lengths

    def _table(self, table: Tensor | None, device: torch.device | str) -> Tensor | None:
        if self.page is None:
            return None
        width = -(-self.capacity // self.page)
        if table is None:
            return torch.arange(self.batch * width, dtype=torch.int32, device=device).view(self.batch, width)
        check_page_table(table, self.batch, width)
        return table.to(device, copy=True).contiguous()

    def _pages(self) -> int:
        table = self.page_table
        assert table is not None
        return max(table.numel(), int(table.max()) + 1 if table.numel() else 0)

    def append(self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> None:
        """Adds T tokens behind each sequence's own last one: k[stream] [B, heads, T, qk], tokens[name] [B, T].

        Raises ValueError when every sequence is certain to overflow; otherwise tokens without room count as dropped.
        """
        added = next(iter(k.values())).shape[2]
        free = self.capacity - self.at_least
        expect(added <= free, "k", "at most {} more tokens (capacity {})", added, free, self.capacity)
        tokens = {name: x.expand(self.batch, -1) for name, x in tokens.items()}
        append = self._append_by_kernels if uses_kernels(self.lengths) else self._append_by_torch
        append(k, v, tokens, added)
        capturing = self.lengths.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:  # a capture records the step without running it
            self.at_least = min(self.at_least + added, self.capacity)

    def _append_by_kernels(
        self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor], added: int
    ) -> None:
        width = 0 if self.page_table is None else self.page_table.shape[1]
        call, page = Append(self.spans, self.page_table, width, self.capacity, added), self.page or 0
        streams = [
            NewRows(new, self.k[name], v.get(name), self.v[name] if name in v else None) for name, new in k.items()
        ]
        launch_rows(streams, [(new, self.tokens[name]) for name, new in tokens.items()], call, page)
        launch_lengths(self.dropped, call, page)

    def _append_by_torch(
        self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor], added: int
    ) -> None:
        position = self.lengths.long()[:, None] + torch.arange(added, device=self.lengths.device)
        home, slot, room = self._places(position)
        for store, new in [(self.k[name], x) for name, x in k.items()] + [(self.v[name], x) for name, x in v.items()]:
            store[home, :, slot] = new.transpose(1, 2).to(store.dtype)
        for name, values in tokens.items():
            spot = torch.where(room, position, self.capacity)
            self.tokens[name].scatter_(1, spot, values.to(self.tokens[name].dtype))
        kept = room.int().cumprod(1).sum(1, dtype=torch.int32)  # a length never covers a hole
        self.lengths.add_(kept)
        self.dropped += added - kept

    def expect_fits(self, name: str, store: Tensor, new: Tensor) -> None:
        """New keys or values [B, heads, T, dim] against the cache of their stream."""
        heads, dim = store.shape[1], store.shape[3]
        fits = new.shape[0] == self.batch and new.shape[1] == heads and new.shape[3] == dim
        expect(fits, name, "[{}, {}, tokens, {}] like the cache", list(new.shape), self.batch, heads, dim)
        expect(new.dtype == store.dtype, name, f"dtype {store.dtype} like the cache", new.dtype)
        expect(new.device == store.device, name, f"device {store.device} like the cache", new.device)

    def _places(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> (home, slot, room) of each position; without room the home or slot that is never read."""
        room = position < self.capacity
        if self.page_table is None or self.page is None:
            sequence = torch.arange(self.batch, device=position.device)[:, None].expand_as(position)
            return sequence, torch.where(room, position, self.capacity), room
        entry = (position // self.page).clamp(max=self.page_table.shape[1] - 1)
        page = self.page_table.long().gather(1, entry)
        room = room & (page >= 0)
        last = next(iter(self.k.values())).shape[0] - 1
        return torch.where(room, page, last), position % self.page, room

    def rows(self, store: Tensor, sequence: int, length: int) -> Tensor:
        """The first rows [1, heads, length, dim] of `k[stream]` or `v[stream]`; of pages a copy."""
        if self.page_table is None or self.page is None:
            return store[sequence : sequence + 1, :, :length]
        pages = self.page_table[sequence, : -(-length // self.page)].long()
        return store[pages].transpose(0, 1).flatten(1, 2)[:, :length].unsqueeze(0)

    def homes(self, sequence: int) -> list[int]:
        """Where tokens of `sequence` lie in `k[stream]`, home after home (host side)."""
        return [sequence] if self.page_table is None else self.page_table[sequence].tolist()

    def reset(self, rows: int | Sequence[int] | Sequence[bool] | Tensor | None = None) -> None:
        """Empties all sequences, or those of `rows`: their numbers (negative ones count from the end), or bool [batch].

        Numbers in a tensor are read on the host; a mask is not.
        """
        chosen = slice(None) if rows is None else row_index(rows, self.batch, self.spans.device)
        self.at_least = 0
        self.lengths[chosen] = 0
        self.dropped[chosen] = 0
        for tokens in self.tokens.values():  # a read past the end of a sequence is 0, not a token of an earlier one
            tokens[chosen] = 0


def _storage(homes: int, heads: int, rows: int, dim: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """[homes, heads, rows, dim], rows a multiple of 16 elements apart: Triton vectorises only over such strides.

    Heads are a multiple of 64 rows apart, or one page: so blocks of keys of all heads are equally far apart.
    """
    room = rows if rows & (rows - 1) == 0 else -(-rows // 64) * 64
    return torch.zeros(homes, heads, room, -(-dim // 16) * 16, device=device, dtype=dtype)[:, :, :rows, :dim]


class Inputs(NamedTuple):
    """What a call computes with, checked; choices as membership maps with their first row tile."""

    q: Tensor
    k: Tensor
    v: Tensor


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    check_attention(
        {"q": (q, None, None), },
        {"k": (k, None, "q"), },
        {"v": (v, None, "k"), },
    )  # fmt: skip


def _prepare(q: Tensor, k: Tensor, v: Tensor, layout: Layout, tokens: int, keys: int) -> Inputs:
    """Tensors batch first and choices as maps; `keys` bounds the keys of a sequence, `tokens` sizes token axes."""
    return Inputs(
        q,
        k,
        v,
    )


def finish(part: tuple[Tensor, Tensor], return_lse: bool) -> Any:
    return part if return_lse else part[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    lengths: Tensor | None = None,
    q_offset: int | None = None,
    k_offset: int | None = None,
) -> Any:
    """Attention of whole sequences, differentiable.

    q [B, Hq, N, Dqk]; k [B, Hkv, M, Dqk]; v [B, Hkv, M, Dv]. -> out [B, Hq, N, Dv] in the dtype of q.
    return_lse: also the natural-log lse, float32 [B, Hq, N].
    cu_seqlens, max_seqlen: packed sequences, batch 1, tokens cu_seqlens[i] to cu_seqlens[i + 1]; positions restart.
    lengths: int [B], the real tokens of left-padded rows.
    q_offset, k_offset: positions of the first query and key of a part of a longer sequence; by default the last
        query stands at the last key.
    Raises ValueError or TypeError naming the argument that does not fit. Under torch.autocast queries, keys and
    values are cast to its type, as for PyTorch's own attention.
    """
    q, k, v = autocast(q, k, v)
    expect_flag("return_lse", return_lse)
    _check(
        q,
        k,
        v,
    )
    layout = checked_layout(q, k, cu_seqlens, max_seqlen, lengths, q_offset, k_offset)
    inputs = _prepare(q, k, v, layout, *sizes_of(q, k, layout))

    attend_part = attend_forward_op(inputs.q, inputs.k, inputs.v, *layout)
    return finish(attend_part, return_lse)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    lengths: Tensor | None = None,
    q_offset: int | None = None,
    k_offset: int | None = None,
) -> Any:
    """What `attention` means: dense, in float64, every pair of query and key tested. Same arguments."""
    expect_flag("return_lse", return_lse)
    _check(
        q,
        k,
        v,
    )
    layout = checked_layout(q, k, cu_seqlens, max_seqlen, lengths, q_offset, k_offset)
    inputs = _prepare(q, k, v, layout, *sizes_of(q, k, layout))

    attend_part = attend_dense(inputs, layout)
    return finish(attend_part, return_lse)


class Cache(CacheStore):
    """The cache of one layer: `batch` sequences of at most `capacity` tokens.

    page: tokens per page, a power of two >= 16, or None for one piece per sequence. page_table: int32
    [batch, ceil(capacity / page)], pages used once, -1 where none is handed out; by default in order.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        *,
        kv_heads: int,
        qk_dim: int,
        v_dim: int,
        page: int | None = 64,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        page_table: Tensor | None = None,
    ) -> None:
        for name, size in (("kv_heads", kv_heads), ("qk_dim", qk_dim), ("v_dim", v_dim)):
            expect_number(name, size, "a number >= 1", 1 if name == "v_dim" else 0)
        streams = {
            "kv": StreamShape(kv_heads, qk_dim, v_dim),
        }
        tokens: dict[str, torch.dtype] = {}
        super().__init__(batch, capacity, streams, tokens, page=page, device=device, dtype=dtype, page_table=page_table)


def _check_step(q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> None:
    """The new tokens, and whether the cache is one for them."""
    expect_cache(cache, Cache)
    _check(
        q,
        k,
        v,
    )
    expect(q.shape[0] == cache.batch, "q", "batch {} like the cache", q.shape[0], cache.batch)
    expect(q.shape[2] == k.shape[2], "k", "{} tokens like q", k.shape[2], q.shape[2])
    cache.expect_fits("k", cache.k["kv"], k)
    cache.expect_fits("v", cache.v["kv"], v)


def _append(q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> tuple[Inputs, Layout]:
    """Adds the new keys to the cache; -> the call's inputs, with cached tensors in place of the new tokens."""
    cache.append(
        {
            "kv": k,
        },
        {
            "kv": v,
        },
        {},
    )
    layout = Layout(None, cache.spans, None, None, q.shape[2], cache.capacity)
    return _prepare(q, k, v, layout, cache.capacity, cache.capacity), layout


@torch.no_grad()
def prefill(q: Tensor, k: Tensor, v: Tensor, cache: Cache, *, return_lse: bool = False) -> Any:
    """Appends keys and values of N new tokens per sequence to the cache, and attends from them. Inference only.

    Call it again for the next chunk. Shapes as in `attention`; tensors over tokens hold the new tokens only.
    """
    q, k, v = autocast(q, k, v)
    expect_flag("return_lse", return_lse)
    _check_step(q, k, v, cache)
    inputs, layout = _append(q, k, v, cache)

    attend_part = attend_cached(inputs, cache, layout)
    return finish(merged_part(attend_part), return_lse)


@torch.no_grad()
def decode(q: Tensor, k: Tensor, v: Tensor, cache: Cache, *, return_lse: bool = False) -> Any:
    """One step of generation: like `prefill` with one new token per sequence. Reads no length on the host."""
    q, k, v = autocast(q, k, v)
    expect_flag("return_lse", return_lse)
    _check_step(q, k, v, cache)
    inputs, layout = _append(q, k, v, cache)

    attend_part = attend_cached(inputs, cache, layout)
    return finish(merged_part(attend_part), return_lse)


def example_inputs(
    batch: int, tokens: int, *, heads: int = 8, kv_heads: int = 2, qk_dim: int = 64, v_dim: int = 64,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Random arguments for `attention`: token tensors rise in steps, flags are rare, given lists hold near units."""
    check_example(batch, tokens, dtype, heads=heads, kv_heads=kv_heads, qk_dim=qk_dim, v_dim=v_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

    return {
        "q": normal(batch, heads, tokens, qk_dim),
        "k": normal(batch, kv_heads, tokens, qk_dim),
        "v": normal(batch, kv_heads, tokens, v_dim),
    }


def attend_dense(inputs: Inputs, layout: Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of attend."""
    q = inputs.q
    keys = attend_keys(
        q,
        inputs.k,
        inputs.v,
    )
    h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    out = q.new_zeros(*q.shape[:3], keys[0][1].shape[3], dtype=torch.float64)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for corner in corners(q, layout):
        rows, columns = q[corner.batch, :, corner.rows], corner.keys.stop - corner.keys.start
        q_at = (corner.q_origin + torch.arange(rows.shape[2], device=q.device)).view(1, 1, -1, 1)
        k_at = (corner.k_origin + torch.arange(columns, device=q.device)).view(1, 1, 1, -1)
        streams = [
            (
                *(x[corner.batch, :, corner.keys] for x in keys[0]),
                attend_mask(q_at, k_at, h, corner.length),
                None,
            ),
        ]
        found = dense_softmax(rows, streams, q.shape[-1] ** -0.5, None, None)
        if layout.k_spans is None:
            return found
        out[corner.batch, :, corner.rows], lse[corner.batch, :, corner.rows] = found
    return out, lse


def attend_cached(inputs: Inputs, cache: Cache, layout: Layout) -> Splits | tuple[Tensor, Tensor]:
    """attend of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [
        (cache.k["kv"], cache.v["kv"]),
    ]
    if uses_kernels(q):
        paged = Paged(cache.page_table, cache.page or 0, cache.capacity)
        run = attend_kernel_decode if q.shape[2] == 1 else attend_kernel_forward
        return run(q, keys, layout, paged=paged)
    out = q.new_zeros(*q.shape[:3], keys[0][1].shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))
    for corner in corners(q, layout):
        s = corner.sequences.start
        form = Logits(q.shape[-1] ** -0.5, None, corner.q_origin)
        if q.shape[2] == 1:
            parts = attend_parts(q.shape[1], keys, corner)
            out[s : s + 1], lse[s : s + 1] = sparse_step(
                q[s : s + 1], parts, attend_decode_ranges(corner), cache.homes(s), form, None
            )
            continue
        gathered = [(cache.rows(k, s, corner.length), cache.rows(v, s, corner.length)) for k, v in keys]
        parts = attend_parts(q.shape[1], gathered, corner)
        out[s : s + 1], lse[s : s + 1] = sparse_forward(q[s : s + 1], parts, form, None)
    return out, lse


def attend_decode_ranges(corner: Corner) -> list[list[tuple[int, int, bool]]]:
    """For each stream the positions that one query may see."""
    return [
        visits_of_ranges(attend_decode_visits(corner.q_origin, corner.length), corner),
    ]
