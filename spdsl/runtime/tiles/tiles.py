"""Device functions that every kernel is built from: tiles in two parts, loaded, multiplied and stored.

Ordinary Triton functions, copied as text into each generated module.
"""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import LOG2E, Strided, jit


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
def widened(x):
    """Numbers of 16 bits in 32: a slope times a distance needs more."""
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x


@jit
def load_columns(pointers, there, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """[n, WIDTH] tile of columns START.. of rows that begin at pointers [n, 1].

    Rows that are not there [n] (if MASKED) and columns from DIM on are 0.
    """
    column = START + tl.arange(0, WIDTH)[None, :]
    if START + WIDTH > DIM:
        if MASKED:
            tile = tl.load(pointers + column, mask=there[:, None] & (column < DIM), other=0.0)
        else:
            tile = tl.load(pointers + column, mask=column < DIM, other=0.0)
    elif MASKED:
        tile = tl.load(pointers + column, mask=there[:, None], other=0.0)
    else:
        tile = tl.load(pointers + column)
    return tile


@jit
def load_parts(pointers, there, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """The same rows whole, in two parts of columns; the second is the scalar 0.0 when it has no width."""
    part0 = load_columns(pointers, there, 0, D0, DIM, MASKED)
    part1 = 0.0
    if D1:
        part1 = load_columns(pointers, there, D0, D1, DIM, MASKED)
    return part0, part1


@jit
def load_near_parts(
    data,
    stride,
    left,
    ROWS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Both parts of rows that lie `stride` apart, of which `left` are there."""
    row = tl.arange(0, ROWS)
    return load_parts(data + row[:, None].to(tl.int64) * stride, row < left, D0, D1, DIM, MASKED)


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
    """Columns of rows that lie `stride` apart, of which `left` are there."""
    row = tl.arange(0, ROWS)
    return load_columns(data + row[:, None].to(tl.int64) * stride, row < left, START, WIDTH, DIM, MASKED)


@jit
def load_qk(data, stride, left, ROWS: tl.constexpr, MASKED: tl.constexpr, C):
    """Rows of q or k in two parts."""
    return load_near_parts(data, stride, left, ROWS, C.QK0, C.QK1, C.QK_DIM, MASKED)


@jit
def load_v(data, stride, left, ROWS: tl.constexpr, MASKED: tl.constexpr, C):
    """Rows of v, out or dout in two parts."""
    return load_near_parts(data, stride, left, ROWS, C.V0, C.V1, C.V_DIM, MASKED)


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
def in_base_2(lse):
    """A row without keys (-inf), or past the end, becomes +inf: p = exp2(s - inf) = 0, never NaN."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@jit
def load_lse(lse, row, left, C):
    return in_base_2(load_row_values(lse, row, left, float("-inf"), C))


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
