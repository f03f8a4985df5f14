"""Device functions that every kernel is built from: tiles in two parts, where keys lie, which blocks to visit.

Ordinary Triton functions, copied as text into each generated module. A kernel gets its arguments in named tuples:
`Strided` tensors, `Source` (the keys of one stream), `Call` (rows and positions), `C` (all compile-time constants).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

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


class ListVisit(NamedTuple):
    """The blocks of one program: how many are full and partial, and the lists of their numbers."""

    full_count: tl.tensor
    partial_count: tl.tensor
    full: tl.tensor
    partial: tl.tensor


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
def floor_div(a, b):
    """a // b toward minus infinity, b > 0 (Triton's // rounds toward zero)."""
    return tl.where(a < 0, -((b - 1 - a) // b), a // b)


@jit
def floor_mod(a, b):
    return a - floor_div(a, b) * b


@jit
def member(units, head, tile, k, UNIT: tl.constexpr, tiles, most):
    """Entry (head, tile, k // UNIT) of a membership map [heads, tiles, most], 0 outside; k is one block of positions.

    A block that is no longer than a unit meets two units at most: two loads for each row then do for a whole tile.
    """
    unit = floor_div(k, UNIT)
    if k.shape[0] * k.shape[1] <= UNIT:
        first = tl.min(unit)
        here = member_of(units, head, tile, first, tiles, most)
        found = tl.where(unit == first, here, member_of(units, head, tile, first + 1, tiles, most))
    else:
        found = member_of(units, head, tile, unit, tiles, most)
    return found


@jit
def member_of(units, head, tile, unit, tiles, most):
    inside = (tile >= 0) & (tile < tiles) & (unit >= 0) & (unit < most)
    # The interpreter makes integers of a block of bools and one bool; triton 3.9 refuses those as a mask.
    return tl.load(units + (head * tiles + tile) * most + unit, mask=inside != 0, other=0)


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
def at(x, s, h, start):
    """Tensor x from token `start` of a sequence and a head on.  int64: a large tensor passes 2^31 elements."""
    data = x.data + tl.cast(s, tl.int64) * x.batch + tl.cast(h, tl.int64) * x.head + start * x.token
    return Strided(data, x.batch, x.head, x.token)


@jit
def token_pointer(x, token):
    return x.data + tl.cast(token, tl.int64) * x.token


@jit
def load_row_values(x, row, left, other, C):
    """One value per row (lse, delta)."""
    i = tl.arange(0, C.BLOCK_M)
    return tl.load(token_pointer(x, row) + i * x.token, mask=i < left, other=other)


@jit
def store_row_values(x, row, left, values, C):
    i = tl.arange(0, C.BLOCK_M)
    tl.store(token_pointer(x, row) + i * x.token, values, mask=i < left)


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
):
    """[ROWS, WIDTH] tile of columns START.. ; rows from `left` on (if MASKED) and columns from DIM on are 0."""
    row = tl.arange(0, ROWS)[:, None]
    column = START + tl.arange(0, WIDTH)[None, :]
    pointers = data + (row * stride + column)
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
def load_qk(data, stride, left, ROWS: tl.constexpr, MASKED: tl.constexpr, C):
    """Rows of q or k in two parts; the second is the scalar 0.0 when it has no width."""
    part0 = load_part(data, stride, left, ROWS, 0, C.QK0, C.QK_DIM, MASKED)
    part1 = 0.0
    if C.QK1:
        part1 = load_part(data, stride, left, ROWS, C.QK0, C.QK1, C.QK_DIM, MASKED)
    return part0, part1


@jit
def load_v(data, stride, left, ROWS: tl.constexpr, MASKED: tl.constexpr, C):
    """Rows of v, out or dout in two parts."""
    part0 = load_part(data, stride, left, ROWS, 0, C.V0, C.V_DIM, MASKED)
    part1 = 0.0
    if C.V1:
        part1 = load_part(data, stride, left, ROWS, C.V0, C.V1, C.V_DIM, MASKED)
    return part0, part1


@jit
def store_part(
    data, stride, left, tile, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    row = tl.arange(0, ROWS)[:, None]
    column = START + tl.arange(0, WIDTH)[None, :]
    tl.store(data + row * stride + column, tile.to(data.dtype.element_ty), mask=(row < left) & (column < DIM))


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
def visit_lists(lists, s, h, tile):
    """The full and the partial blocks listed for a tile of sequence s and head h."""
    entry = tl.cast(s, tl.int64) * lists.sequence + h * lists.head + tile
    offset = entry * lists.width
    full, partial = tl.load(lists.full_count + entry), tl.load(lists.partial_count + entry)
    return ListVisit(full, partial, lists.full + offset, lists.partial + offset)


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
