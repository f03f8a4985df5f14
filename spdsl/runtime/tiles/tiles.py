"""Device functions that every kernel is built from: tiles in two parts, loaded, multiplied and stored.

Ordinary Triton functions, copied as text into each generated module.
"""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import LOG2E, Rows, Strided, jit


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
def key_pointer(x, pages, block, left, C):
    """Where the keys of a block are loaded from, of which `left` are there; key i lies i * x.token behind.

    Paged: x is [pages, Hkv, PAGE, D], and a block lies in one page, or each key has a page of its own: then that is a
    pointer for each key [BLOCK_N, 1].
    """
    start = tl.cast(block, tl.int64) * C.BLOCK_N
    data = x.data
    if C.PAGE == 1:
        i = tl.arange(0, C.BLOCK_N)[:, None]
        page = tl.load(pages + start + i, mask=i < left, other=0)
        data += page.to(tl.int64) * x.batch - i.to(tl.int64) * x.token
        start = tl.full((), 0, tl.int64)
    elif C.PAGE:
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
