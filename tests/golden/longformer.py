# Made by spdsl 0.1.0 from longformer.spat, pattern longformer, source sha256 7300081d28bc2566.
"""Longformer (arXiv 2004.05150): a window to each side, and marked tokens that see all and are seen by all. The rows
of marked tokens have projections of their own: q_all, and the stream `other`.

    pattern longformer {
        param  window = 256
        allow(W404)                              # an encoder sees later keys, too
        mark   = tensor(token, bool)
        q_all  = query()
        other  = stream()
        local  = attend((sliding(window + 1, ahead = window) | where(mark[k])) - where(mark[q]))
        wide   = attend(other[where(mark[q])], query = q_all)
        return merge(local, wide)
    }

    import longformer
    out = longformer.attention(q, k, v, q_all, k_other, v_other, mark)
    cache = longformer.Cache(batch, capacity, ...)
    out = longformer.prefill(q, k, v, q_all, k_other, v_other, mark, cache)
    out = longformer.decode(q, k, v, q_all, k_other, v_other, mark, cache)

Needs torch, triton on a GPU, and spdsl. How to read: 1 what the pattern says,
2 kernels, 3 launches and the CPU path, 4 operators, 5 public functions. What `rt` has is the same for all patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime import rt
from spdsl.runtime.language import tl, triton

PATTERN = "longformer"
PARAMS = {"window": 256}
PHASES = ("train", "prefill", "decode")
MODULE = rt.Module(
    __name__, PATTERN, PARAMS, "9afd60a9ff8f0ee7458a2498da19df32f77a4d6cbf321c29bd91c9609914569a", runtime=4
)
tune, tuning, use_tables = MODULE.tune, MODULE.tuning, rt.use_tables


# ---- 1. What the pattern says ---------------------------------------------------------------------------------------


class LocalReads(NamedTuple):
    """What the sets of local look up, batch first."""

    mark: Tensor


def local_mask(q: Tensor, k: Tensor, h: Tensor, length: int, t: LocalReads) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return (rt.read(t.mark, q) == 0) & (((k - q < 257) & (q - k < 257)) | (rt.read(t.mark, k) != 0))


def local_tiles(tiles: rt.Tiles, h: Tensor, t: LocalReads) -> tuple[Tensor, Tensor]:
    """Tiles in which some pair may be visible, and tiles in which every pair must be: [S, H, tiles, blocks]."""
    q_first, q_last, k_first, k_last, length = tiles[:5]
    mark_k_low, mark_k_high = rt.key_extremes(t.mark, tiles)
    mark_q_low, mark_q_high = rt.row_extremes(t.mark, tiles)
    k = tiles.k_first  # a shape for tests that hold always or never
    may = (
        (mark_q_high >= 0)
        & (mark_q_low <= 0)
        & (((k_first - q_last < 257) & (q_first - k_last < 257)) | (mark_k_high > 0) | (mark_k_low < 0))
    )
    must = (
        (mark_q_low >= 0)
        & (mark_q_high <= 0)
        & (((k_last - q_first < 257) & (q_last - k_first < 257)) | (mark_k_low > 0) | (mark_k_high < 0))
    )
    shape = torch.broadcast_shapes(may.shape, must.shape, tiles.inside.shape)
    return may.expand(shape), must.expand(shape)


def local_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(0, length, 0, 0), (max(0, q - 256), min(length, q + 257), 0, 0)]


def local_reads(heads: int, mark) -> LocalReads:
    return LocalReads(
        mark,
    )  # fmt: skip


def local_reads_of(t: LocalReads, s: slice, keys: slice | None) -> LocalReads:
    """The part of sequences s; token axes are cut to `keys`."""

    def rows(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[s]

    return t._replace(
        mark=rows(t.mark) if keys is None else rows(t.mark)[:, keys],
    )  # fmt: skip


def local_tensors(t: LocalReads, sequences: int) -> LocalTensors:
    """The same for kernels."""

    def sequence(x: Tensor) -> int:
        return 0 if x.shape[0] == 1 else x.stride(0)

    return LocalTensors(
        t.mark, sequence(t.mark),
        t.mark.stride(1),
    )  # fmt: skip


local_form = rt.Form(
    sweeps=(rt.Sweep(local_mask, tiles=local_tiles, decode=local_decode_visits),), reads_of=local_reads_of
)


class WideReads(NamedTuple):
    """What the sets of wide look up, batch first."""

    mark: Tensor


def wide_mask(q: Tensor, k: Tensor, h: Tensor, length: int, t: WideReads) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return rt.read(t.mark, q) != 0


def wide_tiles(tiles: rt.Tiles, h: Tensor, t: WideReads) -> tuple[Tensor, Tensor]:
    """Tiles in which some pair may be visible, and tiles in which every pair must be: [S, H, tiles, blocks]."""
    q_first, q_last, k_first, k_last, length = tiles[:5]
    mark_q_low, mark_q_high = rt.row_extremes(t.mark, tiles)
    k = tiles.k_first  # a shape for tests that hold always or never
    may = (mark_q_high > 0) | (mark_q_low < 0)
    must = (mark_q_low > 0) | (mark_q_high < 0)
    shape = torch.broadcast_shapes(may.shape, must.shape, tiles.inside.shape)
    return may.expand(shape), must.expand(shape)


def wide_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(0, length, 0, 0)]


def wide_reads(heads: int, mark) -> WideReads:
    return WideReads(
        mark,
    )  # fmt: skip


def wide_reads_of(t: WideReads, s: slice, keys: slice | None) -> WideReads:
    """The part of sequences s; token axes are cut to `keys`."""

    def rows(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[s]

    return t._replace(
        mark=rows(t.mark) if keys is None else rows(t.mark)[:, keys],
    )  # fmt: skip


def wide_tensors(t: WideReads, sequences: int) -> WideTensors:
    """The same for kernels."""

    def sequence(x: Tensor) -> int:
        return 0 if x.shape[0] == 1 else x.stride(0)

    return WideTensors(
        t.mark, sequence(t.mark),
        t.mark.stride(1),
    )  # fmt: skip


wide_form = rt.Form(sweeps=(rt.Sweep(wide_mask, tiles=wide_tiles, decode=wide_decode_visits),), reads_of=wide_reads_of)


# ---- 2. Kernels -----------------------------------------------------------------------------------------------------


class LocalTensors(NamedTuple):
    """What local reads: pointers, strides in elements, sizes."""

    mark: Tensor
    mark_sequence: int
    mark_0: int  # stride of the axis `token`


@rt.jit
def local_of_sequence(t, s, spans):
    """The tensors of sequence s; packed sequences share a batch row and start at their first key."""
    start, _ = rt.span(spans, s, 0)
    s = tl.cast(s, tl.int64)
    return LocalTensors(
        t.mark + s * t.mark_sequence + start * t.mark_0, t.mark_sequence,
        t.mark_0,
    )  # fmt: skip


@rt.jit
def local_visible(q, k, h, length, t):
    """May the row at position q see the key at position k?  (longformer.spat:9)"""
    return (tl.load(t.mark + tl.cast(q, tl.int64) * t.mark_0, mask=(q >= 0) & (q < length), other=0) == 0) & (
        ((k - q < 257) & (q - k < 257))
        | (tl.load(t.mark + tl.cast(k, tl.int64) * t.mark_0, mask=(k >= 0) & (k < length), other=0) != 0)
    )


@rt.jit
def local_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = tl.load(visit.partial + i)
    else:
        block = tl.load(visit.full + i)
    return block


@rt.jit
def local_span_0(q, length, t):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = 0
    end = length
    return first, end


@rt.jit
def local_span_1(q, length, t):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = tl.maximum(0, q - 256)
    end = tl.minimum(length, q + 257)
    return first, end


@rt.jit
def local_scores(product, q, k, h, length, t, C):
    """-> scores, whose product with local_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def local_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def local_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED: tl.constexpr, t, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = local_scores(product, rows.position, block.position, rows.head, keys.length, t, C)
    if MASKED:
        seen = local_visible(rows.position, block.position, rows.head, keys.length, t)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, local_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def local_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, t, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, local_block(visit, i, MASKED), C)
        acc0, acc1, m, total = local_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED, t, C)
    return acc0, acc1, m, total


@rt.jit
def local_forward(q, kv, out, lse, call, sink, kv_lists, t, C):
    """One program: one tile of rows of one query head of one sequence."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:  # the grid is made for the longest sequence
        return
    kv_keys = rt.sequence_keys(kv, s, h, call, C)
    q_first = rt.row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    t = local_of_sequence(t, s, kv.spans)
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, h, C)
    visit = rt.visit_lists(kv_lists, s, h, tile)
    acc0, acc1, m, total = local_forward_blocks(
        acc0, acc1, m, total, rows, kv_keys, visit, visit.full_count, False, t, C
    )
    acc0, acc1, m, total = local_forward_blocks(
        acc0, acc1, m, total, rows, kv_keys, visit, visit.partial_count, True, t, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = rt.at(out, s, h, q_start)
    rt.store_v(rt.token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    rt.store_row_values(rt.at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * rt.LN2, C)


# Backward:  p = exp(s - lse),  dp = dout . v,  delta = sum(dout * out) - dlse,  ds = p * (dp - delta)
#            dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout
# lse and delta are arguments: with those of a joint softmax this is the gradient of one branch of it.


@rt.jit
def local_dq_step(dq0, dq1, rows, grads, keys, block, MASKED: tl.constexpr, t, C):
    """Adds ds k of one block."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, slope = local_scores(product, rows.position, block.position, rows.head, keys.length, t, C)
    if MASKED:
        seen = local_visible(rows.position, block.position, rows.head, keys.length, t)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * local_unit(C) - grads.lse)

    v0, v1 = rt.load_values(keys, block, MASKED, C)
    dp = rt.dot_rows(grads.dout0, grads.dout1, v0, v1, C.V1, C)
    ds = (p * (dp - grads.delta) * slope).to(k0.dtype)
    dq0, dq1 = rt.dot_columns(ds, k0, k1, dq0, dq1, C.QK1, C)
    return dq0, dq1


@rt.jit
def local_dq_blocks(dq0, dq1, rows, grads, keys, visit, count, MASKED: tl.constexpr, t, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, local_block(visit, i, MASKED), C)
        dq0, dq1 = local_dq_step(dq0, dq1, rows, grads, keys, block, MASKED, t, C)
    return dq0, dq1


@rt.jit
def local_dq(q, kv, dout, lse, delta, dq, call, kv_lists, t, C):
    """One program: one tile of rows of one query head of one sequence (the sweeps of the forward)."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:
        return
    kv_keys = rt.sequence_keys(kv, s, h, call, C)
    q_first = rt.row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    t = local_of_sequence(t, s, kv.spans)
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    dout = rt.at(dout, s, h, q_start)
    dout0, dout1 = rt.load_v(rt.token_pointer(dout, row), dout.token, left, C.BLOCK_M, True, C)
    row_lse = rt.load_lse(rt.at(lse, s, h, q_start), row, left, C)
    row_delta = rt.load_row_values(rt.at(delta, s, h, q_start), row, left, 0.0, C)
    grads = rt.RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])

    dq0 = rt.zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = rt.zeros(C.BLOCK_M, C.QK1, C.ACC)
    visit = rt.visit_lists(kv_lists, s, h, tile)
    dq0, dq1 = local_dq_blocks(dq0, dq1, rows, grads, kv_keys, visit, visit.full_count, False, t, C)
    dq0, dq1 = local_dq_blocks(dq0, dq1, rows, grads, kv_keys, visit, visit.partial_count, True, t, C)

    dq = rt.at(dq, s, h, q_start)
    rt.store_qk(rt.token_pointer(dq, row), dq.token, left, dq0 * C.SCALE, dq1 * C.SCALE, C.BLOCK_M, C)


@rt.jit
def local_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED: tl.constexpr, t, C):
    """Adds ds q and p dout of one tile of rows.  All is [keys, rows], so that no dot transposes p or ds."""
    product = rt.dot_rows(keys.k0, keys.k1, tile.q0, tile.q1, C.QK1, C)
    s, slope = local_scores(product, tile.position, keys.position, tile.head, keys.length, t, C)
    if MASKED:
        seen = local_visible(tile.position, keys.position, tile.head, keys.length, t)
        seen = seen & (keys.position < keys.end)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * local_unit(C) - rt.load_tile_lse(tile)[None, :])

    dout0, dout1 = rt.load_dout(tile, MASKED, C)
    dv0, dv1 = rt.dot_columns(p.to(dout0.dtype), dout0, dout1, dv0, dv1, C.V1, C)

    dp = rt.dot_rows(keys.v0, keys.v1, dout0, dout1, C.V1, C)
    ds = p * (dp - rt.load_tile_delta(tile)[None, :]) * slope
    ds = ds.to(tile.q0.dtype)
    dk0, dk1 = rt.dot_columns(ds, tile.q0, tile.q1, dk0, dk1, C.QK1, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def local_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, count, MASKED: tl.constexpr, t, C):
    for i in tl.range(0, count, disable_licm=True):
        tile = rt.tile_of_rows(rows, local_block(visit, i, MASKED) * C.BLOCK_M, MASKED, C)
        dk0, dk1, dv0, dv1 = local_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED, t, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def local_dkdv(q, source, dout, lse, delta, dk, dv, call, lists, t, C):
    """One program: one block of keys of one kv head of one sequence, over all query heads of its group.

    No atomics: every sum has one owner and one order, so two runs agree to the bit.
    """
    block, kv_head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    k_start, _ = rt.span(source.spans, s, source.keys)
    keys = rt.sequence_keys(source, s, kv_head * C.GROUP, call, C)
    key = block * C.BLOCK_N
    left = keys.count - key
    if left <= 0:
        return
    q_origin = rt.row_origin(call, s, q_count)
    k_first = keys.origin + key
    k_last = k_first + tl.minimum(left, C.BLOCK_N) - 1
    k0, k1 = rt.load_qk(rt.token_pointer(keys.k, key), keys.k.token, left, C.BLOCK_N, True, C)
    v0, v1 = rt.load_v(rt.token_pointer(keys.v, key), keys.v.token, left, C.BLOCK_N, True, C)
    position = (k_first + tl.arange(0, C.BLOCK_N))[:, None]
    keys = rt.KeyBlock(k0, k1, v0, v1, position, keys.origin + keys.count, keys.length)
    t = local_of_sequence(t, s, source.spans)

    dk0 = rt.zeros(C.BLOCK_N, C.QK0, C.ACC)
    dk1 = rt.zeros(C.BLOCK_N, C.QK1, C.ACC)
    dv0 = rt.zeros(C.BLOCK_N, C.V0, C.ACC)
    dv1 = rt.zeros(C.BLOCK_N, C.V1, C.ACC)
    for h in range(kv_head * C.GROUP, kv_head * C.GROUP + C.GROUP):
        rows = rt.HeadRows(
            rt.at(q, s, h, q_start), rt.at(dout, s, h, q_start), rt.at(lse, s, h, q_start), rt.at(delta, s, h, q_start),
            h, q_origin, q_count,
        )  # fmt: skip
        visit = rt.visit_lists(lists, s, h, block)
        dk0, dk1, dv0, dv1 = local_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.full_count, False, t, C)
        dk0, dk1, dv0, dv1 = local_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.partial_count, True, t, C)

    dk = rt.at(dk, s, kv_head, k_start)
    dv = rt.at(dv, s, kv_head, k_start)
    rt.store_qk(rt.token_pointer(dk, key), dk.token, left, dk0 * C.SCALE, dk1 * C.SCALE, C.BLOCK_N, C)
    rt.store_v(rt.token_pointer(dv, key), dv.token, left, dv0, dv1, C.BLOCK_N, C)


@rt.jit
def local_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    block = rt.jump(block, ranges[0].end, ranges[1].first)
    return block


@rt.jit
def local_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, t, C):
    """Visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = rt.block_of(keys, local_decode_number(ranges, i), C)
        seen = local_visible(rows.position, block.position, rows.head, keys.length, t) & rt.keys_there(keys, block)
        if tl.max(seen.to(tl.int32)) > 0:  # blocks that the tensors leave out are not loaded
            acc0, acc1, m, total = local_forward_step(acc0, acc1, m, total, rows, keys, block, True, t, C)
    return acc0, acc1, m, total


@rt.jit
def local_decode(q, kv, partial, partial_lse, call, t, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    kv_keys = rt.sequence_keys(kv, s, h, call, C)
    length = kv_keys.length
    position = length - 1  # of the one query
    t = local_of_sequence(t, s, None)
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = rt.load_qk(rt.at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = rt.Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    cursor = 0
    first, end = local_span_0(position, length, t)
    range0, cursor = rt.to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    first, end = local_span_1(position, length, t)
    range1, cursor = rt.to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first + range1.end - range1.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = local_decode_blocks(acc0, acc1, m, total, rows, kv_keys, (range0, range1), first, end, t, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = rt.at(partial, s, h, split)
    rt.store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = rt.at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


class WideTensors(NamedTuple):
    """What wide reads: pointers, strides in elements, sizes."""

    mark: Tensor
    mark_sequence: int
    mark_0: int  # stride of the axis `token`


@rt.jit
def wide_of_sequence(t, s, spans):
    """The tensors of sequence s; packed sequences share a batch row and start at their first key."""
    start, _ = rt.span(spans, s, 0)
    s = tl.cast(s, tl.int64)
    return WideTensors(
        t.mark + s * t.mark_sequence + start * t.mark_0, t.mark_sequence,
        t.mark_0,
    )  # fmt: skip


@rt.jit
def wide_visible(q, k, h, length, t):
    """May the row at position q see the key at position k?  (longformer.spat:10)"""
    return tl.load(t.mark + tl.cast(q, tl.int64) * t.mark_0, mask=(q >= 0) & (q < length), other=0) != 0


@rt.jit
def wide_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = tl.load(visit.partial + i)
    else:
        block = tl.load(visit.full + i)
    return block


@rt.jit
def wide_span_0(q, length, t):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = 0
    end = length
    return first, end


@rt.jit
def wide_scores(product, q, k, h, length, t, C):
    """-> scores, whose product with wide_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def wide_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def wide_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED: tl.constexpr, t, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = wide_scores(product, rows.position, block.position, rows.head, keys.length, t, C)
    if MASKED:
        seen = wide_visible(rows.position, block.position, rows.head, keys.length, t)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, wide_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def wide_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, t, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, wide_block(visit, i, MASKED), C)
        acc0, acc1, m, total = wide_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED, t, C)
    return acc0, acc1, m, total


@rt.jit
def wide_forward(q, other, out, lse, call, sink, other_lists, t, C):
    """One program: one tile of rows of one query head of one sequence."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:  # the grid is made for the longest sequence
        return
    other_keys = rt.sequence_keys(other, s, h, call, C)
    q_first = rt.row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    t = wide_of_sequence(t, s, other.spans)
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, h, C)
    visit = rt.visit_lists(other_lists, s, h, tile)
    acc0, acc1, m, total = wide_forward_blocks(
        acc0, acc1, m, total, rows, other_keys, visit, visit.full_count, False, t, C
    )
    acc0, acc1, m, total = wide_forward_blocks(
        acc0, acc1, m, total, rows, other_keys, visit, visit.partial_count, True, t, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = rt.at(out, s, h, q_start)
    rt.store_v(rt.token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    rt.store_row_values(rt.at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * rt.LN2, C)


# Backward:  p = exp(s - lse),  dp = dout . v,  delta = sum(dout * out) - dlse,  ds = p * (dp - delta)
#            dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout
# lse and delta are arguments: with those of a joint softmax this is the gradient of one branch of it.


@rt.jit
def wide_dq_step(dq0, dq1, rows, grads, keys, block, MASKED: tl.constexpr, t, C):
    """Adds ds k of one block."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, slope = wide_scores(product, rows.position, block.position, rows.head, keys.length, t, C)
    if MASKED:
        seen = wide_visible(rows.position, block.position, rows.head, keys.length, t)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * wide_unit(C) - grads.lse)

    v0, v1 = rt.load_values(keys, block, MASKED, C)
    dp = rt.dot_rows(grads.dout0, grads.dout1, v0, v1, C.V1, C)
    ds = (p * (dp - grads.delta) * slope).to(k0.dtype)
    dq0, dq1 = rt.dot_columns(ds, k0, k1, dq0, dq1, C.QK1, C)
    return dq0, dq1


@rt.jit
def wide_dq_blocks(dq0, dq1, rows, grads, keys, visit, count, MASKED: tl.constexpr, t, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, wide_block(visit, i, MASKED), C)
        dq0, dq1 = wide_dq_step(dq0, dq1, rows, grads, keys, block, MASKED, t, C)
    return dq0, dq1


@rt.jit
def wide_dq(q, other, dout, lse, delta, dq, call, other_lists, t, C):
    """One program: one tile of rows of one query head of one sequence (the sweeps of the forward)."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:
        return
    other_keys = rt.sequence_keys(other, s, h, call, C)
    q_first = rt.row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    t = wide_of_sequence(t, s, other.spans)
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    dout = rt.at(dout, s, h, q_start)
    dout0, dout1 = rt.load_v(rt.token_pointer(dout, row), dout.token, left, C.BLOCK_M, True, C)
    row_lse = rt.load_lse(rt.at(lse, s, h, q_start), row, left, C)
    row_delta = rt.load_row_values(rt.at(delta, s, h, q_start), row, left, 0.0, C)
    grads = rt.RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])

    dq0 = rt.zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = rt.zeros(C.BLOCK_M, C.QK1, C.ACC)
    visit = rt.visit_lists(other_lists, s, h, tile)
    dq0, dq1 = wide_dq_blocks(dq0, dq1, rows, grads, other_keys, visit, visit.full_count, False, t, C)
    dq0, dq1 = wide_dq_blocks(dq0, dq1, rows, grads, other_keys, visit, visit.partial_count, True, t, C)

    dq = rt.at(dq, s, h, q_start)
    rt.store_qk(rt.token_pointer(dq, row), dq.token, left, dq0 * C.SCALE, dq1 * C.SCALE, C.BLOCK_M, C)


@rt.jit
def wide_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED: tl.constexpr, t, C):
    """Adds ds q and p dout of one tile of rows.  All is [keys, rows], so that no dot transposes p or ds."""
    product = rt.dot_rows(keys.k0, keys.k1, tile.q0, tile.q1, C.QK1, C)
    s, slope = wide_scores(product, tile.position, keys.position, tile.head, keys.length, t, C)
    if MASKED:
        seen = wide_visible(tile.position, keys.position, tile.head, keys.length, t)
        seen = seen & (keys.position < keys.end)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * wide_unit(C) - rt.load_tile_lse(tile)[None, :])

    dout0, dout1 = rt.load_dout(tile, MASKED, C)
    dv0, dv1 = rt.dot_columns(p.to(dout0.dtype), dout0, dout1, dv0, dv1, C.V1, C)

    dp = rt.dot_rows(keys.v0, keys.v1, dout0, dout1, C.V1, C)
    ds = p * (dp - rt.load_tile_delta(tile)[None, :]) * slope
    ds = ds.to(tile.q0.dtype)
    dk0, dk1 = rt.dot_columns(ds, tile.q0, tile.q1, dk0, dk1, C.QK1, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def wide_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, count, MASKED: tl.constexpr, t, C):
    for i in tl.range(0, count, disable_licm=True):
        tile = rt.tile_of_rows(rows, wide_block(visit, i, MASKED) * C.BLOCK_M, MASKED, C)
        dk0, dk1, dv0, dv1 = wide_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED, t, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def wide_dkdv(q, source, dout, lse, delta, dk, dv, call, lists, t, C):
    """One program: one block of keys of one kv head of one sequence, over all query heads of its group.

    No atomics: every sum has one owner and one order, so two runs agree to the bit.
    """
    block, kv_head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    k_start, _ = rt.span(source.spans, s, source.keys)
    keys = rt.sequence_keys(source, s, kv_head * C.GROUP, call, C)
    key = block * C.BLOCK_N
    left = keys.count - key
    if left <= 0:
        return
    q_origin = rt.row_origin(call, s, q_count)
    k_first = keys.origin + key
    k_last = k_first + tl.minimum(left, C.BLOCK_N) - 1
    k0, k1 = rt.load_qk(rt.token_pointer(keys.k, key), keys.k.token, left, C.BLOCK_N, True, C)
    v0, v1 = rt.load_v(rt.token_pointer(keys.v, key), keys.v.token, left, C.BLOCK_N, True, C)
    position = (k_first + tl.arange(0, C.BLOCK_N))[:, None]
    keys = rt.KeyBlock(k0, k1, v0, v1, position, keys.origin + keys.count, keys.length)
    t = wide_of_sequence(t, s, source.spans)

    dk0 = rt.zeros(C.BLOCK_N, C.QK0, C.ACC)
    dk1 = rt.zeros(C.BLOCK_N, C.QK1, C.ACC)
    dv0 = rt.zeros(C.BLOCK_N, C.V0, C.ACC)
    dv1 = rt.zeros(C.BLOCK_N, C.V1, C.ACC)
    for h in range(kv_head * C.GROUP, kv_head * C.GROUP + C.GROUP):
        rows = rt.HeadRows(
            rt.at(q, s, h, q_start), rt.at(dout, s, h, q_start), rt.at(lse, s, h, q_start), rt.at(delta, s, h, q_start),
            h, q_origin, q_count,
        )  # fmt: skip
        visit = rt.visit_lists(lists, s, h, block)
        dk0, dk1, dv0, dv1 = wide_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.full_count, False, t, C)
        dk0, dk1, dv0, dv1 = wide_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.partial_count, True, t, C)

    dk = rt.at(dk, s, kv_head, k_start)
    dv = rt.at(dv, s, kv_head, k_start)
    rt.store_qk(rt.token_pointer(dk, key), dk.token, left, dk0 * C.SCALE, dk1 * C.SCALE, C.BLOCK_N, C)
    rt.store_v(rt.token_pointer(dv, key), dv.token, left, dv0, dv1, C.BLOCK_N, C)


@rt.jit
def wide_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    return block


@rt.jit
def wide_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, t, C):
    """Visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = rt.block_of(keys, wide_decode_number(ranges, i), C)
        seen = wide_visible(rows.position, block.position, rows.head, keys.length, t) & rt.keys_there(keys, block)
        if tl.max(seen.to(tl.int32)) > 0:  # blocks that the tensors leave out are not loaded
            acc0, acc1, m, total = wide_forward_step(acc0, acc1, m, total, rows, keys, block, True, t, C)
    return acc0, acc1, m, total


@rt.jit
def wide_decode(q, other, partial, partial_lse, call, t, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    other_keys = rt.sequence_keys(other, s, h, call, C)
    length = other_keys.length
    position = length - 1  # of the one query
    t = wide_of_sequence(t, s, None)
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = rt.load_qk(rt.at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = rt.Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    cursor = 0
    first, end = wide_span_0(position, length, t)
    range0, cursor = rt.to_blocks(first, end, first, first, cursor, other_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = wide_decode_blocks(acc0, acc1, m, total, rows, other_keys, (range0,), first, end, t, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = rt.at(partial, s, h, split)
    rt.store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = rt.at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


# ---- 3. Launches ----------------------------------------------------------------------------------------------------


def local_lists(
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    layout: rt.Layout,
    most_keys: int,
    config: rt.Config,
    t: LocalReads,
    longest: int,
) -> dict[str, tuple[rt.BlockLists, rt.BlockLists]]:
    """For each stream with a tile map: key blocks of every row tile, and row tiles of every key block."""
    heads = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    lists = {}
    k = keys[0][0]
    sizes = (-(-layout.longest // config.block_m), config.block_m, -(-most_keys // config.block_n), config.block_n)
    tiles = rt.tiles_of(*rt.sequence_counts(q, k, layout), sizes)
    may, must = local_tiles(tiles, heads, local_reads_per_sequence(t, layout, longest))
    lists["kv"] = rt.block_lists(may, must, tiles, q.shape[1])
    return lists


def local_reads_per_sequence(t: LocalReads, layout: rt.Layout, longest: int) -> LocalReads:
    """Token axes start at each sequence's first key, of which there are `longest` or less."""
    if layout.q_spans is None or layout.k_spans is None:
        return t
    return t._replace(
        mark=rt.per_sequence(t.mark, 1, layout.k_spans, longest),
    )  # fmt: skip


@MODULE.tuned
def local_kernel_forward(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, t: LocalReads, paged: rt.Paged | None = None
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Rows in no sequence keep out = 0, lse = -inf."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    v_dim = keys[0][1].shape[3]
    out, lse = rt.empty_rows(q, v_dim)
    config = rt.config_for("forward", q, v_dim, paged, listed=True)
    q = rt.rows_contiguous(q)
    C = rt.constants(q, v_dim, rt.scale_of(q, layout), config, page=rt.page_of(paged))
    lists = local_lists(
        q,
        keys,
        layout,
        paged.capacity if paged else keys[0][0].shape[2],
        config,
        t,
        paged.capacity if paged else layout.longest,
    )
    rt.launch(
        local_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        lists["kv"][0],
        local_tensors(t, sequences),
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def local_kernel_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
    layout: rt.Layout,
    t: LocalReads,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-> dq, (dk, dv) of each stream, from the lse and out given, which may be those of a joint softmax."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    q, dout = rt.rows_contiguous(q), rt.rows_contiguous(dout)
    v_dim = keys[0][1].shape[3]
    delta = rt.delta_of(out, dout, dlse)
    dq, grads = rt.gradient_room(q, keys)
    call = rt.call_of(q, layout)
    rows = [rt.strided(x, sequences) for x in (dout, lse, delta)]
    sources = [rt.source(q, k, v, sequences, layout, None) for k, v in keys]
    tensors = local_tensors(t, sequences)

    config = rt.config_for("dq", q, v_dim, listed=True)
    lists = local_lists(q, keys, layout, keys[0][0].shape[2], config, t, layout.longest)
    rt.launch(
        local_dq, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), *sources, *rows, rt.strided(dq, sequences), call,
        lists["kv"][0],
        tensors,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    config = rt.config_for("dkdv", q, v_dim, listed=True)
    lists = local_lists(q, keys, layout, keys[0][0].shape[2], config, t, layout.longest)
    k, (dk, dv) = keys[0][0], grads[0]
    group = q.shape[1] // k.shape[1]
    longest = k.shape[2] if layout.k_spans is None else min(layout.longest, k.shape[2])
    rt.launch(
        local_dkdv, (triton.cdiv(longest, config.block_n), k.shape[1], sequences),
        rt.strided(q, sequences), sources[0], *rows, rt.strided(dk, sequences), rt.strided(dv, sequences), call,
        lists["kv"][1],
        tensors,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, grads


@MODULE.tuned
def local_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, t: LocalReads, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the visited blocks."""
    batch, heads = q.shape[:2]
    v_dim = keys[0][1].shape[3]
    group = min(heads // k.shape[1] for k, _ in keys)
    config = rt.decode_config(q, v_dim, group, paged)
    visited = rt.most_visited(local_decode_visits, layout.keys, paged.capacity)
    splits = rt.split_count(batch * (heads // group), visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        local_decode, (batch, heads // group, splits),
        rt.strided(q), rt.source(q, *keys[0], batch, layout, paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout),
        local_tensors(t, batch),
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group, splits, rt.page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


def wide_lists(
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    layout: rt.Layout,
    most_keys: int,
    config: rt.Config,
    t: WideReads,
    longest: int,
) -> dict[str, tuple[rt.BlockLists, rt.BlockLists]]:
    """For each stream with a tile map: key blocks of every row tile, and row tiles of every key block."""
    heads = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    lists = {}
    k = keys[0][0]
    sizes = (-(-layout.longest // config.block_m), config.block_m, -(-most_keys // config.block_n), config.block_n)
    tiles = rt.tiles_of(*rt.sequence_counts(q, k, layout), sizes)
    may, must = wide_tiles(tiles, heads, wide_reads_per_sequence(t, layout, longest))
    lists["other"] = rt.block_lists(may, must, tiles, q.shape[1])
    return lists


def wide_reads_per_sequence(t: WideReads, layout: rt.Layout, longest: int) -> WideReads:
    """Token axes start at each sequence's first key, of which there are `longest` or less."""
    if layout.q_spans is None or layout.k_spans is None:
        return t
    return t._replace(
        mark=rt.per_sequence(t.mark, 1, layout.k_spans, longest),
    )  # fmt: skip


@MODULE.tuned
def wide_kernel_forward(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, t: WideReads, paged: rt.Paged | None = None
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Rows in no sequence keep out = 0, lse = -inf."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    v_dim = keys[0][1].shape[3]
    out, lse = rt.empty_rows(q, v_dim)
    config = rt.config_for("forward", q, v_dim, paged, listed=True)
    q = rt.rows_contiguous(q)
    C = rt.constants(q, v_dim, rt.scale_of(q, layout), config, page=rt.page_of(paged))
    lists = wide_lists(
        q,
        keys,
        layout,
        paged.capacity if paged else keys[0][0].shape[2],
        config,
        t,
        paged.capacity if paged else layout.longest,
    )
    rt.launch(
        wide_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        lists["other"][0],
        wide_tensors(t, sequences),
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def wide_kernel_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
    layout: rt.Layout,
    t: WideReads,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-> dq, (dk, dv) of each stream, from the lse and out given, which may be those of a joint softmax."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    q, dout = rt.rows_contiguous(q), rt.rows_contiguous(dout)
    v_dim = keys[0][1].shape[3]
    delta = rt.delta_of(out, dout, dlse)
    dq, grads = rt.gradient_room(q, keys)
    call = rt.call_of(q, layout)
    rows = [rt.strided(x, sequences) for x in (dout, lse, delta)]
    sources = [rt.source(q, k, v, sequences, layout, None) for k, v in keys]
    tensors = wide_tensors(t, sequences)

    config = rt.config_for("dq", q, v_dim, listed=True)
    lists = wide_lists(q, keys, layout, keys[0][0].shape[2], config, t, layout.longest)
    rt.launch(
        wide_dq, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), *sources, *rows, rt.strided(dq, sequences), call,
        lists["other"][0],
        tensors,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    config = rt.config_for("dkdv", q, v_dim, listed=True)
    lists = wide_lists(q, keys, layout, keys[0][0].shape[2], config, t, layout.longest)
    k, (dk, dv) = keys[0][0], grads[0]
    group = q.shape[1] // k.shape[1]
    longest = k.shape[2] if layout.k_spans is None else min(layout.longest, k.shape[2])
    rt.launch(
        wide_dkdv, (triton.cdiv(longest, config.block_n), k.shape[1], sequences),
        rt.strided(q, sequences), sources[0], *rows, rt.strided(dk, sequences), rt.strided(dv, sequences), call,
        lists["other"][1],
        tensors,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, grads


@MODULE.tuned
def wide_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, t: WideReads, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the visited blocks."""
    batch, heads = q.shape[:2]
    v_dim = keys[0][1].shape[3]
    group = min(heads // k.shape[1] for k, _ in keys)
    config = rt.decode_config(q, v_dim, group, paged)
    visited = rt.most_visited(wide_decode_visits, layout.keys, paged.capacity)
    splits = rt.split_count(batch * (heads // group), visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        wide_decode, (batch, heads // group, splits),
        rt.strided(q), rt.source(q, *keys[0], batch, layout, paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout),
        wide_tensors(t, batch),
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group, splits, rt.page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


# ---- 4. Operators ---------------------------------------------------------------------------------------------------


def local_keys(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k, v)]


def local_forward_of(q: Tensor, k: Tensor, v: Tensor, mark: Tensor, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """-> out, lse"""
    keys = local_keys(q, k, v)
    if rt.uses_kernels(q):
        return local_kernel_forward(q, keys, layout, local_reads(q.shape[1], mark))
    return rt.cpu_forward(local_form, q, keys, layout, None, local_reads(q.shape[1], mark))


def local_backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mark: Tensor,
    layout: rt.Layout,
) -> list[Tensor]:
    """-> gradients of q, k, v; out and lse may be those of a joint softmax"""
    given = dout, dlse, q, local_keys(q, k, v), out, lse, layout, local_reads(q.shape[1], mark)
    if rt.uses_kernels(q):
        dq, grads = local_kernel_backward(*given)
    else:
        dq, grads = rt.cpu_backward(local_form, *given)
    return [dq, *grads[0]]


def wide_keys(q: Tensor, k_other: Tensor, v_other: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k_other, v_other)]


def wide_forward_of(
    q_all: Tensor, k_other: Tensor, v_other: Tensor, mark: Tensor, layout: rt.Layout
) -> tuple[Tensor, Tensor]:
    """-> out, lse"""
    keys = wide_keys(q_all, k_other, v_other)
    if rt.uses_kernels(q_all):
        return wide_kernel_forward(q_all, keys, layout, wide_reads(q_all.shape[1], mark))
    return rt.cpu_forward(wide_form, q_all, keys, layout, None, wide_reads(q_all.shape[1], mark))


def wide_backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q_all: Tensor,
    k_other: Tensor,
    v_other: Tensor,
    mark: Tensor,
    layout: rt.Layout,
) -> list[Tensor]:
    """-> gradients of q_all, k_other, v_other; out and lse may be those of a joint softmax"""
    given = dout, dlse, q_all, wide_keys(q_all, k_other, v_other), out, lse, layout, wide_reads(q_all.shape[1], mark)
    if rt.uses_kernels(q_all):
        dq, grads = wide_kernel_backward(*given)
    else:
        dq, grads = rt.cpu_backward(wide_form, *given)
    return [dq, *grads[0]]


def local_joint_forward_of(
    q: Tensor, k: Tensor, v: Tensor, q_all: Tensor, k_other: Tensor, v_other: Tensor, mark: Tensor, layout: rt.Layout
) -> tuple[Tensor, Tensor]:
    """-> out, lse of one softmax over the keys of local, wide"""
    return rt.merged_parts(
        [local_forward_of(q, k, v, mark, layout), wide_forward_of(q_all, k_other, v_other, mark, layout)]
    )


def local_joint_backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_all: Tensor,
    k_other: Tensor,
    v_other: Tensor,
    mark: Tensor,
    layout: rt.Layout,
) -> list[Tensor]:
    """-> gradients of q, k, v, q_all, k_other, v_other.

    Each part adds its share, as exp(score - lse) is that of the whole.
    """
    return rt.summed(
        ("q", "k", "v", "q_all", "k_other", "v_other"),
        [
            (("q", "k", "v"), local_backward_of(dout, dlse, out, lse, q, k, v, mark, layout)),
            (
                ("q_all", "k_other", "v_other"),
                wide_backward_of(dout, dlse, out, lse, q_all, k_other, v_other, mark, layout),
            ),
        ],
    )


local_joint_forward_op, local_joint_backward_op = rt.attention_operators(
    MODULE, "local_joint", ("q", "k", "v", "q_all", "k_other", "v_other"), ("mark",),
    local_keys, local_joint_forward_of, local_joint_backward_of
)  # fmt: skip


# ---- 5. Public functions --------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a call computes with; choices as membership maps with their first row tile."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_all: Tensor
    k_other: Tensor
    v_other: Tensor
    mark: Tensor | None = None


ARGUMENTS = rt.Arguments(
    queries=(rt.QueryArgument("q"), rt.QueryArgument("q_all")),
    streams=(rt.StreamArgument("kv", "k", "v", "q"), rt.StreamArgument("other", "k_other", "v_other", "q_all")),
    tensors=(rt.TensorArgument("mark", ("token",), "bool", kept=True),),
    sums={"train": (("v", "v_other"),), "prefill": (("v", "v_other"),), "decode": (("v", "v_other"),)},
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_all: Tensor, k_other: Tensor, v_other: Tensor, mark: Tensor, *,
    return_lse: bool = False, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None, lengths: Tensor | None = None,
    side: str = "left", q_offset: int | None = None, k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of whole sequences, differentiable.

    q [B, Hq, N, Dqk]; q_all [B, Hq, N, Dqk]; k [B, Hkv, M, Dqk]; v [B, Hkv, M, Dv]; k_other [B, Hkv, M, Dqk];
    v_other [B, Hkv, M, Dv]; mark bool [B, token]. -> out [B, Hq, N, Dv] in the dtype of q.
    return_lse: also the natural-log lse, float32 [B, Hq, N].
    cu_seqlens, max_seqlen: packed sequences, batch 1, tokens cu_seqlens[i] to cu_seqlens[i + 1]; positions restart.
    cu_seqlens_k, max_seqlen_k: their keys, where those are not as many.
    lengths, side: int [B], the real tokens of rows that are padded at the side "left" or "right".
    q_offset, k_offset: positions of the first query and key of a part of a longer sequence; by default the last
        query stands at the last key.
    scale: in place of 1 / sqrt(dim).
    """
    inputs = rt.checked(ARGUMENTS, Inputs(q, k, v, q_all, k_other, v_other, mark=mark), "train", return_lse)
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k, options)
    inputs = rt.prepared(ARGUMENTS, inputs, layout)

    local_joint_part = local_joint_forward_op(
        inputs.q, inputs.k, inputs.v, inputs.q_all, inputs.k_other, inputs.v_other, inputs.mark, *layout
    )
    return rt.finish(local_joint_part, return_lse)


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_all: Tensor, k_other: Tensor, v_other: Tensor, mark: Tensor, *,
    return_lse: bool = False, phase: str = "train", cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None, lengths: Tensor | None = None,
    side: str = "left", q_offset: int | None = None, k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """What the pattern means: dense, in float64, every pair of query and key tested.

    Arguments as of `attention`. phase: "decode" makes every row the last token of its
    sequence, "prefill" takes the results of that phase.
    """
    rt.expect_phase(phase, PHASES)
    inputs = rt.checked(ARGUMENTS, Inputs(q, k, v, q_all, k_other, v_other, mark=mark), phase, return_lse, cast=False)
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k, options)
    return rt.reference_in(phase, _reference, ARGUMENTS, inputs, None, layout, return_lse)


def _reference(inputs: Inputs, gates: Tensor | None, layout: rt.Layout, return_lse: bool) -> Any:
    """The float64 meaning in every phase."""
    inputs = rt.prepared(ARGUMENTS, inputs, layout)

    local_part = local_dense(inputs, layout)
    wide_part = wide_dense(inputs, layout)
    return rt.finish(rt.merge([local_part, wide_part]), return_lse)


class Cache(rt.CacheStore):
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
        rt.expect_sizes(kv_heads, qk_dim, v_dim)
        streams = {"kv": rt.StreamShape(kv_heads, qk_dim, v_dim), "other": rt.StreamShape(kv_heads, qk_dim, v_dim)}
        tokens = rt.token_states(ARGUMENTS, dtype, kv_heads)
        super().__init__(batch, capacity, streams, tokens, page=page, device=device, dtype=dtype, page_table=page_table)

    @MODULE.step
    @torch.no_grad()
    def append(
        self, *given: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None, rows: Sequence[int] | Tensor | None = None, side: str = "left", **named: Tensor
    ) -> None:  # fmt: skip
        """What `prefill` does, but for attending: its arguments without queries, gates and choices."""
        brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
        rt.append_alone(ARGUMENTS, Inputs, self, given, named, brought)


@rt.cached_call(MODULE, ARGUMENTS, Cache, rt.Result("v.kv"))
@torch.no_grad()
def prefill(
    q: Tensor, k: Tensor, v: Tensor, q_all: Tensor, k_other: Tensor, v_other: Tensor, mark: Tensor, cache: Cache, *,
    return_lse: bool = False, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, rows: Sequence[int] | Tensor | None = None, side: str = "left",
    scale: float | None = None,
) -> Any:  # fmt: skip
    """Appends keys and values of N new tokens per sequence to the cache, and attends from them. Inference only.

    Shapes as in `attention`, of the new tokens alone; call it again for the next chunk. lengths, cu_seqlens,
    max_seqlen, side, scale: as there; rows: the sequences of the cache that the call is for, each once, by default all
    in order. A token without room is dropped: out 0, lse -inf.
    """
    inputs = Inputs(q, k, v, q_all, k_other, v_other, mark=mark)
    brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
    inputs, own, layout, done = rt.step(ARGUMENTS, inputs, "prefill", cache, Cache, return_lse, brought, scale)
    local_part = local_cached(inputs, own, layout)
    wide_part = wide_cached(inputs, own, layout)
    return rt.answer(rt.merged_parts([local_part, wide_part]), done, return_lse)


@rt.cached_call(MODULE, ARGUMENTS, Cache, rt.Result("v.kv"))
@torch.no_grad()
def decode(
    q: Tensor, k: Tensor, v: Tensor, q_all: Tensor, k_other: Tensor, v_other: Tensor, mark: Tensor, cache: Cache, *,
    return_lse: bool = False, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, rows: Sequence[int] | Tensor | None = None, side: str = "left",
    scale: float | None = None,
) -> Any:  # fmt: skip
    """One step of generation: like `prefill` with one new token for each sequence, or for those of `rows`."""
    inputs = Inputs(q, k, v, q_all, k_other, v_other, mark=mark)
    brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
    inputs, own, layout, done = rt.step(ARGUMENTS, inputs, "decode", cache, Cache, return_lse, brought, scale)
    local_part = local_cached(inputs, own, layout)
    wide_part = wide_cached(inputs, own, layout)
    return rt.answer(rt.merged_parts([local_part, wide_part]), done, return_lse)


@MODULE.step
@torch.no_grad()
def attend_paged(
    q: Tensor, q_all: Tensor, k_pages: Tensor, v_pages: Tensor, k_other_pages: Tensor, v_other_pages: Tensor,
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, mark: Tensor, *, max_seqlen_q: int | None = None,
    scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of packed queries [T, heads, dim] over pages [pages, page, heads, dim] that hold the keys already.

    Request r has queries cu_seqlens_q[r] to cu_seqlens_q[r + 1], the last one at seq_lens[r] - 1, and its pages in
    block_table[r]. max_seqlen_q: the most queries of a request. -> out [T, heads, dim], lse [T, heads].
    scale: as in `attention`.
    """
    inputs, own, layout, requests = rt.from_pages(
        ARGUMENTS,
        Inputs(q, k_pages, v_pages, q_all, k_other_pages, v_other_pages, mark=mark),
        "prefill",
        block_table,
        seq_lens,
        cu_seqlens_q,
        max_seqlen_q,
        scale,
    )
    local_part = local_cached(inputs, own, layout)
    wide_part = wide_cached(inputs, own, layout)
    return rt.unpacked(rt.merged_parts([local_part, wide_part]), requests)


def example_inputs(
    batch: int, tokens: int, *, heads: int = 8, kv_heads: int = 2, qk_dim: int = 64, v_dim: int = 64,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Random arguments for `attention`: token tensors rise in steps, flags are rare, given lists hold near units."""
    sizes = rt.Sizes(heads, kv_heads, qk_dim, v_dim)
    return rt.example_arguments(ARGUMENTS, batch, tokens, sizes, dtype, device)


def local_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of local."""
    q = inputs.q
    return rt.dense_attention(
        local_form, q, local_keys(q, inputs.k, inputs.v), layout, None, local_reads(q.shape[1], inputs.mark)
    )


def local_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """local of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["kv"], own.v["kv"])]
    if rt.uses_kernels(q):
        run = local_kernel_decode if rt.is_step(q, layout) else local_kernel_forward
        return run(q, keys, layout, local_reads(q.shape[1], inputs.mark), paged=rt.paged_of(own))
    return rt.cached_attention(local_form, q, keys, own, layout, None, local_reads(q.shape[1], inputs.mark))


def wide_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of wide."""
    q = inputs.q_all
    return rt.dense_attention(
        wide_form, q, wide_keys(q, inputs.k_other, inputs.v_other), layout, None, wide_reads(q.shape[1], inputs.mark)
    )


def wide_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """wide of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q_all
    keys = [(own.k["other"], own.v["other"])]
    if rt.uses_kernels(q):
        run = wide_kernel_decode if rt.is_step(q, layout) else wide_kernel_forward
        return run(q, keys, layout, wide_reads(q.shape[1], inputs.mark), paged=rt.paged_of(own))
    return rt.cached_attention(wide_form, q, keys, own, layout, None, wide_reads(q.shape[1], inputs.mark))
