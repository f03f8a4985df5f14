# Made by spdsl 0.1.0 from nsa.spat, pattern nsa, source sha256 47f23fc6aea8d4d5.
"""Native Sparse Attention (arXiv 2502.11089): compressed, selected and recent keys, one projection for each. The 16
blocks hold the first one and the two last ones.

    pattern nsa {
        heads  query = 64, kv = 4
        dim    qk = 192, v = 128
        param  width = 32, stride = 16, block = 64, count = 16, window = 512
        causal

        rough   = stream()
        picked  = stream()
        recent  = stream()

        entries = compress(width, stride, of = rough, by = mlp)
        coarse  = attend(entries)
        chosen  = top_k(count, score = mass(coarse), unit = block, share = group, force = first(1) | last(2))
        fine    = attend(picked[chosen])
        near    = attend(recent[sliding(window)])

        return gate(coarse, fine, near)
    }

    import nsa
    out = nsa.attention(q, k_rough, v_rough, k_picked, v_picked, k_recent, v_recent, entries_k_position, entries_k_up, entries_k_down, entries_v_position, entries_v_up, entries_v_down, gates)
    cache = nsa.Cache(batch, capacity, ...)
    out = nsa.prefill(q, k_rough, v_rough, k_picked, v_picked, k_recent, v_recent, entries_k_position, entries_k_up, entries_k_down, entries_v_position, entries_v_up, entries_v_down, gates, cache)
    out = nsa.decode(q, k_rough, v_rough, k_picked, v_picked, k_recent, v_recent, entries_k_position, entries_k_up, entries_k_down, entries_v_position, entries_v_up, entries_v_down, gates, cache)

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

PATTERN = "nsa"
PARAMS = {"width": 32, "stride": 16, "block": 64, "count": 16, "window": 512}
PHASES = ("train", "prefill", "decode")
MODULE = rt.Module(
    __name__, PATTERN, PARAMS, "1be76f4ea8e520ddcec76bcfabd9b0537bd09c5fe08afa6de16536d6e5b73849", runtime=4
)
tune, tuning, use_tables = MODULE.tune, MODULE.tuning, rt.use_tables


# ---- 1. What the pattern says ---------------------------------------------------------------------------------------


def coarse_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return q - 16 * k >= 31


def coarse_visits(q_first: int, q_last: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that rows q_first..q_last may see for any head: (first, end, full_first, full_end)."""
    return [(0, min((q_last - 31) // 16 + 1, length), 0, min((q_first - 31) // 16 + 1, length))]


def coarse_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(0, min((q - 31) // 16 + 1, length), 0, 0)]


coarse_form = rt.Form(
    sweeps=(rt.Sweep(coarse_mask, visits=coarse_visits, decode=coarse_decode_visits),), cells=rt.Cells(32, 16)
)


def fine_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return k <= q


fine_form = rt.Form(sweeps=(rt.Sweep(fine_mask),), unit=64)


def near_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return (k <= q) & (q - k < 512)


def near_visits(q_first: int, q_last: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that rows q_first..q_last may see for any head: (first, end, full_first, full_end)."""
    return [(max(0, q_first - 511), q_last + 1, max(0, q_last - 511), q_first + 1)]


def near_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(max(0, q - 511), q + 1, 0, 0)]


near_form = rt.Form(sweeps=(rt.Sweep(near_mask, visits=near_visits, decode=near_decode_visits),))


# ---- 2. Kernels -----------------------------------------------------------------------------------------------------


@rt.jit
def coarse_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (nsa.spat:14)"""
    return q - 16 * k >= 31


@rt.jit
def coarse_keys_0(q_first, q_last, h, length):
    """Keys that rows q_first..q_last may see: [first, end), all of them visible in [full_first, full_end)."""
    first = 0
    end = tl.minimum(rt.floor_div(q_last - 31, 16) + 1, length)
    full_first = 0
    full_end = tl.minimum(rt.floor_div(q_first - 31, 16) + 1, length)
    return first, end, full_first, full_end


@rt.jit
def coarse_rows_0(k_first, k_last, h, length, q_begin, q_end):
    """Rows of [q_begin, q_end) that may see keys k_first..k_last."""
    first = tl.maximum(16 * k_first + 31, q_begin)
    end = q_end
    full_first = tl.maximum(16 * k_last + 31, q_begin)
    full_end = q_end
    return first, end, full_first, full_end


@rt.jit
def coarse_visit_keys(h, q_first, q_last, keys, C):
    """The key blocks that rows q_first..q_last may see."""
    o = keys.origin  # positions -> elements of the sequence
    cursor = 0
    first, end, full_first, full_end = coarse_keys_0(q_first, q_last, h, keys.length)
    range0, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, keys.count, C.BLOCK_N)
    full = range0.full_end - range0.full_first
    total = range0.end - range0.first
    return rt.RangeVisit(full, total - full, (range0,))


@rt.jit
def coarse_visit_rows(rows, k_first, k_last, length, C):
    """The row tiles that may see keys k_first..k_last."""
    o = rows.origin
    stop = rows.origin + rows.count
    cursor = 0
    first, end, full_first, full_end = coarse_rows_0(k_first, k_last, rows.head, length, o, stop)
    range0, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, rows.count, C.BLOCK_M)
    full = range0.full_end - range0.full_first
    total = range0.end - range0.first
    return rt.RangeVisit(full, total - full, (range0,))


@rt.jit
def coarse_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = visit.ranges[0].first + i
        block = rt.jump(block, visit.ranges[0].full_first, visit.ranges[0].full_end)
    else:
        block = visit.ranges[0].full_first + i
    return block


@rt.jit
def coarse_span_0(q, length):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = 0
    end = tl.minimum(rt.floor_div(q - 31, 16) + 1, length)
    return first, end


@rt.jit
def coarse_scores(product, q, k, h, length, C):
    """-> scores, whose product with coarse_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def coarse_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def coarse_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED: tl.constexpr, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = coarse_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = coarse_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, coarse_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def coarse_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, coarse_block(visit, i, MASKED), C)
        acc0, acc1, m, total = coarse_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED, C)
    return acc0, acc1, m, total


@rt.jit
def coarse_forward(q, entries, out, lse, call, sink, C):
    """One program: one tile of rows of one query head of one sequence."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:  # the grid is made for the longest sequence
        return
    entries_keys = rt.sequence_keys(entries, s, h, call, C)
    q_first = rt.row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, h, C)
    visit = coarse_visit_keys(h, q_first, q_last, entries_keys, C)
    acc0, acc1, m, total = coarse_forward_blocks(
        acc0, acc1, m, total, rows, entries_keys, visit, visit.full_count, False, C
    )
    acc0, acc1, m, total = coarse_forward_blocks(
        acc0, acc1, m, total, rows, entries_keys, visit, visit.partial_count, True, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = rt.at(out, s, h, q_start)
    rt.store_v(rt.token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    rt.store_row_values(rt.at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * rt.LN2, C)


# Backward:  p = exp(s - lse),  dp = dout . v,  delta = sum(dout * out) - dlse,  ds = p * (dp - delta)
#            dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout
# lse and delta are arguments: with those of a joint softmax this is the gradient of one branch of it.


@rt.jit
def coarse_dq_step(dq0, dq1, rows, grads, keys, block, MASKED: tl.constexpr, C):
    """Adds ds k of one block."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, slope = coarse_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = coarse_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * coarse_unit(C) - grads.lse)

    v0, v1 = rt.load_values(keys, block, MASKED, C)
    dp = rt.dot_rows(grads.dout0, grads.dout1, v0, v1, C.V1, C)
    ds = (p * (dp - grads.delta) * slope).to(k0.dtype)
    dq0, dq1 = rt.dot_columns(ds, k0, k1, dq0, dq1, C.QK1, C)
    return dq0, dq1


@rt.jit
def coarse_dq_blocks(dq0, dq1, rows, grads, keys, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, coarse_block(visit, i, MASKED), C)
        dq0, dq1 = coarse_dq_step(dq0, dq1, rows, grads, keys, block, MASKED, C)
    return dq0, dq1


@rt.jit
def coarse_dq(q, entries, dout, lse, delta, dq, call, C):
    """One program: one tile of rows of one query head of one sequence (the sweeps of the forward)."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:
        return
    entries_keys = rt.sequence_keys(entries, s, h, call, C)
    q_first = rt.row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    dout = rt.at(dout, s, h, q_start)
    dout0, dout1 = rt.load_v(rt.token_pointer(dout, row), dout.token, left, C.BLOCK_M, True, C)
    row_lse = rt.load_lse(rt.at(lse, s, h, q_start), row, left, C)
    row_delta = rt.load_row_values(rt.at(delta, s, h, q_start), row, left, 0.0, C)
    grads = rt.RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])

    dq0 = rt.zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = rt.zeros(C.BLOCK_M, C.QK1, C.ACC)
    visit = coarse_visit_keys(h, q_first, q_last, entries_keys, C)
    dq0, dq1 = coarse_dq_blocks(dq0, dq1, rows, grads, entries_keys, visit, visit.full_count, False, C)
    dq0, dq1 = coarse_dq_blocks(dq0, dq1, rows, grads, entries_keys, visit, visit.partial_count, True, C)

    dq = rt.at(dq, s, h, q_start)
    rt.store_qk(rt.token_pointer(dq, row), dq.token, left, dq0 * C.SCALE, dq1 * C.SCALE, C.BLOCK_M, C)


@rt.jit
def coarse_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED: tl.constexpr, C):
    """Adds ds q and p dout of one tile of rows.  All is [keys, rows], so that no dot transposes p or ds."""
    product = rt.dot_rows(keys.k0, keys.k1, tile.q0, tile.q1, C.QK1, C)
    s, slope = coarse_scores(product, tile.position, keys.position, tile.head, keys.length, C)
    if MASKED:
        seen = coarse_visible(tile.position, keys.position, tile.head, keys.length)
        seen = seen & (keys.position < keys.end)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * coarse_unit(C) - rt.load_tile_lse(tile)[None, :])

    dout0, dout1 = rt.load_dout(tile, MASKED, C)
    dv0, dv1 = rt.dot_columns(p.to(dout0.dtype), dout0, dout1, dv0, dv1, C.V1, C)

    dp = rt.dot_rows(keys.v0, keys.v1, dout0, dout1, C.V1, C)
    ds = p * (dp - rt.load_tile_delta(tile)[None, :]) * slope
    ds = ds.to(tile.q0.dtype)
    dk0, dk1 = rt.dot_columns(ds, tile.q0, tile.q1, dk0, dk1, C.QK1, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def coarse_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        tile = rt.tile_of_rows(rows, coarse_block(visit, i, MASKED) * C.BLOCK_M, MASKED, C)
        dk0, dk1, dv0, dv1 = coarse_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def coarse_dkdv(q, source, dout, lse, delta, dk, dv, call, C):
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

    dk0 = rt.zeros(C.BLOCK_N, C.QK0, C.ACC)
    dk1 = rt.zeros(C.BLOCK_N, C.QK1, C.ACC)
    dv0 = rt.zeros(C.BLOCK_N, C.V0, C.ACC)
    dv1 = rt.zeros(C.BLOCK_N, C.V1, C.ACC)
    for h in range(kv_head * C.GROUP, kv_head * C.GROUP + C.GROUP):
        rows = rt.HeadRows(
            rt.at(q, s, h, q_start), rt.at(dout, s, h, q_start), rt.at(lse, s, h, q_start), rt.at(delta, s, h, q_start),
            h, q_origin, q_count,
        )  # fmt: skip
        visit = coarse_visit_rows(rows, k_first, k_last, keys.length, C)
        dk0, dk1, dv0, dv1 = coarse_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.full_count, False, C)
        dk0, dk1, dv0, dv1 = coarse_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.partial_count, True, C)

    dk = rt.at(dk, s, kv_head, k_start)
    dv = rt.at(dv, s, kv_head, k_start)
    rt.store_qk(rt.token_pointer(dk, key), dk.token, left, dk0 * C.SCALE, dk1 * C.SCALE, C.BLOCK_N, C)
    rt.store_v(rt.token_pointer(dv, key), dv.token, left, dv0, dv1, C.BLOCK_N, C)


@rt.jit
def coarse_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    return block


@rt.jit
def coarse_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, C):
    """Visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = rt.block_of(keys, coarse_decode_number(ranges, i), C)
        acc0, acc1, m, total = coarse_forward_step(acc0, acc1, m, total, rows, keys, block, True, C)
    return acc0, acc1, m, total


@rt.jit
def coarse_decode(q, entries, partial, partial_lse, call, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    entries_keys = rt.sequence_keys(entries, s, h, call, C)
    length = entries_keys.length
    position = length - 1  # of the one query
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = rt.load_qk(rt.at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = rt.Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    cursor = 0
    first, end = coarse_span_0(position, length)
    range0, cursor = rt.to_blocks(first, end, first, first, cursor, entries_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = coarse_decode_blocks(acc0, acc1, m, total, rows, entries_keys, (range0,), first, end, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = rt.at(partial, s, h, split)
    rt.store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = rt.at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


@rt.jit
def fine_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (nsa.spat:16)"""
    return k <= q


@rt.jit
def fine_scores(product, q, k, h, length, C):
    """-> scores, whose product with fine_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def fine_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def fine_forward_step(acc0, acc1, m, total, rows, keys, block, chosen, MASKED: tl.constexpr, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = fine_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = fine_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block) & chosen
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, fine_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def fine_forward_units(acc0, acc1, m, total, rows, keys, visit, first, end, U, C):
    """Blocks first..end - 1 of the units of a tile."""
    for i in tl.range(first, end, disable_licm=True):
        block, chosen = rt.unit_block(keys, visit, i, U, C), rt.chose(visit, i, rows.lane[:, None], U, C)
        acc0, acc1, m, total = fine_forward_step(acc0, acc1, m, total, rows, keys, block, chosen, True, C)
    return acc0, acc1, m, total


@rt.jit
def fine_forward(q, picked, out, lse, call, sink, lists, U, C):
    """One program: neighbouring queries of one sequence, with all query heads that share their lists of units."""
    tile, list_head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    if tile * U.LANES >= q_count:  # the grid is made for the longest sequence
        return
    h = list_head * C.GROUP
    keys = rt.sequence_keys(picked, s, h, call, C)
    rows = rt.load_packed_rows(rt.at(q, s, 0, q_start), tile, h, rt.row_origin(call, s, q_count), q_count, U, C)
    visit = rt.visit_units(lists, s, list_head, tile)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, rows.heads, C)
    visited = rt.visited_blocks(visit.count, U, C)
    acc0, acc1, m, total = fine_forward_units(acc0, acc1, m, total, rows, keys, visit, 0, visited, U, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    rt.store_packed_v(rt.at(out, s, 0, q_start), rows, acc0 / divisor, acc1 / divisor, C)
    rt.store_packed_values(rt.at(lse, s, 0, q_start), rows, (m + tl.log2(total)) * rt.LN2, C)


# Backward:  p = exp(s - lse),  dp = dout . v,  delta = sum(dout * out) - dlse,  ds = p * (dp - delta)
#            dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout
# lse and delta are arguments: with those of a joint softmax this is the gradient of one branch of it.


@rt.jit
def fine_dq_step(dq0, dq1, rows, grads, keys, block, chosen, MASKED: tl.constexpr, C):
    """Adds ds k of one block."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, slope = fine_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = fine_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block) & chosen
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * fine_unit(C) - grads.lse)

    v0, v1 = rt.load_values(keys, block, MASKED, C)
    dp = rt.dot_rows(grads.dout0, grads.dout1, v0, v1, C.V1, C)
    ds = (p * (dp - grads.delta) * slope).to(k0.dtype)
    dq0, dq1 = rt.dot_columns(ds, k0, k1, dq0, dq1, C.QK1, C)
    return dq0, dq1


@rt.jit
def fine_dq_units(dq0, dq1, rows, grads, keys, visit, end, U, C):
    """Blocks 0..end - 1 of the units of a tile."""
    for i in tl.range(0, end, disable_licm=True):
        block, chosen = rt.unit_block(keys, visit, i, U, C), rt.chose(visit, i, rows.lane[:, None], U, C)
        dq0, dq1 = fine_dq_step(dq0, dq1, rows, grads, keys, block, chosen, True, C)
    return dq0, dq1


@rt.jit
def fine_dq(q, picked, dout, lse, delta, dq, call, lists, U, C):
    """One program: the rows of the forward."""
    tile, list_head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    if tile * U.LANES >= q_count:
        return
    h = list_head * C.GROUP
    keys = rt.sequence_keys(picked, s, h, call, C)
    rows = rt.load_packed_rows(rt.at(q, s, 0, q_start), tile, h, rt.row_origin(call, s, q_count), q_count, U, C)
    dout0, dout1 = rt.load_packed_v(rt.at(dout, s, 0, q_start), rows, C)
    row_lse = rt.load_packed_lse(rt.at(lse, s, 0, q_start), rows)
    row_delta = rt.load_packed_values(rt.at(delta, s, 0, q_start), rows, 0.0)
    grads = rt.RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])
    visit = rt.visit_units(lists, s, list_head, tile)
    visited = rt.visited_blocks(visit.count, U, C)

    dq0 = rt.zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = rt.zeros(C.BLOCK_M, C.QK1, C.ACC)
    dq0, dq1 = fine_dq_units(dq0, dq1, rows, grads, keys, visit, visited, U, C)
    rt.store_packed_qk(rt.at(dq, s, 0, q_start), rows, dq0 * C.SCALE, dq1 * C.SCALE, C)


@rt.jit
def fine_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, chosen, MASKED: tl.constexpr, C):
    """Adds ds q and p dout of one tile of rows.  All is [keys, rows], so that no dot transposes p or ds."""
    product = rt.dot_rows(keys.k0, keys.k1, tile.q0, tile.q1, C.QK1, C)
    s, slope = fine_scores(product, tile.position, keys.position, tile.head, keys.length, C)
    if MASKED:
        seen = fine_visible(tile.position, keys.position, tile.head, keys.length)
        seen = seen & (keys.position < keys.end) & chosen
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * fine_unit(C) - rt.load_tile_lse(tile)[None, :])

    dout0, dout1 = rt.load_dout(tile, MASKED, C)
    dv0, dv1 = rt.dot_columns(p.to(dout0.dtype), dout0, dout1, dv0, dv1, C.V1, C)

    dp = rt.dot_rows(keys.v0, keys.v1, dout0, dout1, C.V1, C)
    ds = p * (dp - rt.load_tile_delta(tile)[None, :]) * slope
    ds = ds.to(tile.q0.dtype)
    dk0, dk1 = rt.dot_columns(ds, tile.q0, tile.q1, dk0, dk1, C.QK1, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def fine_dkdv_tiles(
    dk0, dk1, dv0, dv1, keys, q, dout, lse, delta, inverse, begin, end, s, kv_head, part, q_count, q_origin, U, C
):
    """The tiles that chose the unit."""
    first_tile = tl.load(inverse.first_tile + s)
    for i in tl.range(begin, end, disable_licm=True):
        entry = tl.cast(kv_head, tl.int64) * inverse.entries + i
        number = tl.load(inverse.tiles + entry)
        list_head = kv_head * U.LISTS + number // inverse.all_tiles
        tile = number % inverse.all_tiles - first_tile
        rows = rt.load_packed_rows(q, tile, list_head * C.GROUP, q_origin, q_count, U, C)
        chosen = rt.chose_unit(inverse, entry, part, rows.lane[None, :], U, C)
        tile = rt.packed_tile(rows, dout, lse, delta)
        dk0, dk1, dv0, dv1 = fine_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, chosen, True, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def fine_dkdv(q, source, dout, lse, delta, dk, dv, buffer, call, inverse, U, C):
    """One program: one block of keys of a unit of one kv head, over (its share of) the tiles that chose the unit.

    No atomics: every sum has one owner and one order, so two runs agree to the bit.
    """
    job, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = tl.cast(kv_head, tl.int64) * inverse.jobs + job
    s = tl.load(inverse.sequence + entry)
    if s < 0:
        return
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    k_start, _ = rt.span(source.spans, s, source.keys)
    keys = rt.sequence_keys(source, s, kv_head * U.LISTS * C.GROUP, call, C)
    key = tl.load(inverse.unit + entry) * U.UNIT + part * C.BLOCK_N
    left = keys.count - key
    k0, k1 = rt.load_qk(rt.token_pointer(keys.k, key), keys.k.token, left, C.BLOCK_N, True, C)
    v0, v1 = rt.load_v(rt.token_pointer(keys.v, key), keys.v.token, left, C.BLOCK_N, True, C)
    position = (keys.origin + key + tl.arange(0, C.BLOCK_N))[:, None]
    own = rt.KeyBlock(k0, k1, v0, v1, position, keys.origin + keys.count, keys.length)

    dk0 = rt.zeros(C.BLOCK_N, C.QK0, C.ACC)
    dk1 = rt.zeros(C.BLOCK_N, C.QK1, C.ACC)
    dv0 = rt.zeros(C.BLOCK_N, C.V0, C.ACC)
    dv1 = rt.zeros(C.BLOCK_N, C.V1, C.ACC)
    dk0, dk1, dv0, dv1 = fine_dkdv_tiles(
        dk0, dk1, dv0, dv1, own, rt.at(q, s, 0, q_start), rt.at(dout, s, 0, q_start), rt.at(lse, s, 0, q_start),
        rt.at(delta, s, 0, q_start), inverse, tl.load(inverse.begin + entry), tl.load(inverse.end + entry), s, kv_head,
        part, q_count, rt.row_origin(call, s, q_count), U, C
    )  # fmt: skip

    slot = tl.load(inverse.slot + entry)
    if slot < 0:
        dk = rt.at(dk, s, kv_head, k_start)
        dv = rt.at(dv, s, kv_head, k_start)
        rt.store_qk(rt.token_pointer(dk, key), dk.token, left, dk0 * C.SCALE, dk1 * C.SCALE, C.BLOCK_N, C)
        rt.store_v(rt.token_pointer(dv, key), dv.token, left, dv0, dv1, C.BLOCK_N, C)
    else:
        rt.store_slot(buffer, kv_head, slot, part, dk0 * C.SCALE, dk1 * C.SCALE, dv0, dv1, U, C)


@rt.jit
def fine_decode(q, picked, partial, partial_lse, call, lists, U, C):
    """One program: the heads that share a list, of one sequence, against an equal share of the listed units."""
    s, list_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = list_head * C.GROUP
    keys = rt.sequence_keys(picked, s, h, call, C)
    rows = rt.load_packed_rows(rt.at(q, s, 0, 0), 0, h, keys.length - 1, 1, U, C)
    visit = rt.visit_step(lists, s, list_head)
    visited = rt.visited_blocks(visit.count, U, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    acc0, acc1, m, total = fine_forward_units(
        acc0, acc1, m, total, rows, keys, visit, visited * split // C.SPLITS, visited * (split + 1) // C.SPLITS, U, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    rt.store_packed_v(rt.at(partial, s, 0, split), rows, acc0 / divisor, acc1 / divisor, C)
    rt.store_packed_values(rt.at(partial_lse, s, 0, split), rows, m + tl.log2(total), C)


@rt.jit
def near_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (nsa.spat:17)"""
    return (k <= q) & (q - k < 512)


@rt.jit
def near_keys_0(q_first, q_last, h, length):
    """Keys that rows q_first..q_last may see: [first, end), all of them visible in [full_first, full_end)."""
    first = tl.maximum(0, q_first - 511)
    end = q_last + 1
    full_first = tl.maximum(0, q_last - 511)
    full_end = q_first + 1
    return first, end, full_first, full_end


@rt.jit
def near_rows_0(k_first, k_last, h, length, q_begin, q_end):
    """Rows of [q_begin, q_end) that may see keys k_first..k_last."""
    first = tl.maximum(k_first, q_begin)
    end = tl.minimum(k_last + 512, q_end)
    full_first = tl.maximum(k_last, q_begin)
    full_end = tl.minimum(k_first + 512, q_end)
    return first, end, full_first, full_end


@rt.jit
def near_visit_keys(h, q_first, q_last, keys, C):
    """The key blocks that rows q_first..q_last may see."""
    o = keys.origin  # positions -> elements of the sequence
    cursor = 0
    first, end, full_first, full_end = near_keys_0(q_first, q_last, h, keys.length)
    range0, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, keys.count, C.BLOCK_N)
    full = range0.full_end - range0.full_first
    total = range0.end - range0.first
    return rt.RangeVisit(full, total - full, (range0,))


@rt.jit
def near_visit_rows(rows, k_first, k_last, length, C):
    """The row tiles that may see keys k_first..k_last."""
    o = rows.origin
    stop = rows.origin + rows.count
    cursor = 0
    first, end, full_first, full_end = near_rows_0(k_first, k_last, rows.head, length, o, stop)
    range0, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, rows.count, C.BLOCK_M)
    full = range0.full_end - range0.full_first
    total = range0.end - range0.first
    return rt.RangeVisit(full, total - full, (range0,))


@rt.jit
def near_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = visit.ranges[0].first + i
        block = rt.jump(block, visit.ranges[0].full_first, visit.ranges[0].full_end)
    else:
        block = visit.ranges[0].full_first + i
    return block


@rt.jit
def near_span_0(q, length):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = tl.maximum(0, q - 511)
    end = q + 1
    return first, end


@rt.jit
def near_scores(product, q, k, h, length, C):
    """-> scores, whose product with near_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def near_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def near_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED: tl.constexpr, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = near_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = near_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, near_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def near_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, near_block(visit, i, MASKED), C)
        acc0, acc1, m, total = near_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED, C)
    return acc0, acc1, m, total


@rt.jit
def near_forward(q, recent, out, lse, call, sink, C):
    """One program: one tile of rows of one query head of one sequence."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:  # the grid is made for the longest sequence
        return
    recent_keys = rt.sequence_keys(recent, s, h, call, C)
    q_first = rt.row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, h, C)
    visit = near_visit_keys(h, q_first, q_last, recent_keys, C)
    acc0, acc1, m, total = near_forward_blocks(
        acc0, acc1, m, total, rows, recent_keys, visit, visit.full_count, False, C
    )
    acc0, acc1, m, total = near_forward_blocks(
        acc0, acc1, m, total, rows, recent_keys, visit, visit.partial_count, True, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = rt.at(out, s, h, q_start)
    rt.store_v(rt.token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    rt.store_row_values(rt.at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * rt.LN2, C)


# Backward:  p = exp(s - lse),  dp = dout . v,  delta = sum(dout * out) - dlse,  ds = p * (dp - delta)
#            dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout
# lse and delta are arguments: with those of a joint softmax this is the gradient of one branch of it.


@rt.jit
def near_dq_step(dq0, dq1, rows, grads, keys, block, MASKED: tl.constexpr, C):
    """Adds ds k of one block."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, slope = near_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = near_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * near_unit(C) - grads.lse)

    v0, v1 = rt.load_values(keys, block, MASKED, C)
    dp = rt.dot_rows(grads.dout0, grads.dout1, v0, v1, C.V1, C)
    ds = (p * (dp - grads.delta) * slope).to(k0.dtype)
    dq0, dq1 = rt.dot_columns(ds, k0, k1, dq0, dq1, C.QK1, C)
    return dq0, dq1


@rt.jit
def near_dq_blocks(dq0, dq1, rows, grads, keys, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, near_block(visit, i, MASKED), C)
        dq0, dq1 = near_dq_step(dq0, dq1, rows, grads, keys, block, MASKED, C)
    return dq0, dq1


@rt.jit
def near_dq(q, recent, dout, lse, delta, dq, call, C):
    """One program: one tile of rows of one query head of one sequence (the sweeps of the forward)."""
    # The last rows see most keys: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    row = tile * C.BLOCK_M
    left = q_count - row
    if left <= 0:
        return
    recent_keys = rt.sequence_keys(recent, s, h, call, C)
    q_first = rt.row_origin(call, s, q_count) + row
    q_last = q_first + tl.minimum(left, C.BLOCK_M) - 1
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    dout = rt.at(dout, s, h, q_start)
    dout0, dout1 = rt.load_v(rt.token_pointer(dout, row), dout.token, left, C.BLOCK_M, True, C)
    row_lse = rt.load_lse(rt.at(lse, s, h, q_start), row, left, C)
    row_delta = rt.load_row_values(rt.at(delta, s, h, q_start), row, left, 0.0, C)
    grads = rt.RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])

    dq0 = rt.zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = rt.zeros(C.BLOCK_M, C.QK1, C.ACC)
    visit = near_visit_keys(h, q_first, q_last, recent_keys, C)
    dq0, dq1 = near_dq_blocks(dq0, dq1, rows, grads, recent_keys, visit, visit.full_count, False, C)
    dq0, dq1 = near_dq_blocks(dq0, dq1, rows, grads, recent_keys, visit, visit.partial_count, True, C)

    dq = rt.at(dq, s, h, q_start)
    rt.store_qk(rt.token_pointer(dq, row), dq.token, left, dq0 * C.SCALE, dq1 * C.SCALE, C.BLOCK_M, C)


@rt.jit
def near_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED: tl.constexpr, C):
    """Adds ds q and p dout of one tile of rows.  All is [keys, rows], so that no dot transposes p or ds."""
    product = rt.dot_rows(keys.k0, keys.k1, tile.q0, tile.q1, C.QK1, C)
    s, slope = near_scores(product, tile.position, keys.position, tile.head, keys.length, C)
    if MASKED:
        seen = near_visible(tile.position, keys.position, tile.head, keys.length)
        seen = seen & (keys.position < keys.end)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * near_unit(C) - rt.load_tile_lse(tile)[None, :])

    dout0, dout1 = rt.load_dout(tile, MASKED, C)
    dv0, dv1 = rt.dot_columns(p.to(dout0.dtype), dout0, dout1, dv0, dv1, C.V1, C)

    dp = rt.dot_rows(keys.v0, keys.v1, dout0, dout1, C.V1, C)
    ds = p * (dp - rt.load_tile_delta(tile)[None, :]) * slope
    ds = ds.to(tile.q0.dtype)
    dk0, dk1 = rt.dot_columns(ds, tile.q0, tile.q1, dk0, dk1, C.QK1, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def near_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        tile = rt.tile_of_rows(rows, near_block(visit, i, MASKED) * C.BLOCK_M, MASKED, C)
        dk0, dk1, dv0, dv1 = near_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def near_dkdv(q, source, dout, lse, delta, dk, dv, call, C):
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

    dk0 = rt.zeros(C.BLOCK_N, C.QK0, C.ACC)
    dk1 = rt.zeros(C.BLOCK_N, C.QK1, C.ACC)
    dv0 = rt.zeros(C.BLOCK_N, C.V0, C.ACC)
    dv1 = rt.zeros(C.BLOCK_N, C.V1, C.ACC)
    for h in range(kv_head * C.GROUP, kv_head * C.GROUP + C.GROUP):
        rows = rt.HeadRows(
            rt.at(q, s, h, q_start), rt.at(dout, s, h, q_start), rt.at(lse, s, h, q_start), rt.at(delta, s, h, q_start),
            h, q_origin, q_count,
        )  # fmt: skip
        visit = near_visit_rows(rows, k_first, k_last, keys.length, C)
        dk0, dk1, dv0, dv1 = near_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.full_count, False, C)
        dk0, dk1, dv0, dv1 = near_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.partial_count, True, C)

    dk = rt.at(dk, s, kv_head, k_start)
    dv = rt.at(dv, s, kv_head, k_start)
    rt.store_qk(rt.token_pointer(dk, key), dk.token, left, dk0 * C.SCALE, dk1 * C.SCALE, C.BLOCK_N, C)
    rt.store_v(rt.token_pointer(dv, key), dv.token, left, dv0, dv1, C.BLOCK_N, C)


@rt.jit
def near_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    return block


@rt.jit
def near_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, C):
    """Visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = rt.block_of(keys, near_decode_number(ranges, i), C)
        acc0, acc1, m, total = near_forward_step(acc0, acc1, m, total, rows, keys, block, True, C)
    return acc0, acc1, m, total


@rt.jit
def near_decode(q, recent, partial, partial_lse, call, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    recent_keys = rt.sequence_keys(recent, s, h, call, C)
    length = recent_keys.length
    position = length - 1  # of the one query
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = rt.load_qk(rt.at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = rt.Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    cursor = 0
    first, end = near_span_0(position, length)
    range0, cursor = rt.to_blocks(first, end, first, first, cursor, recent_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = near_decode_blocks(acc0, acc1, m, total, rows, recent_keys, (range0,), first, end, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = rt.at(partial, s, h, split)
    rt.store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = rt.at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


chosen_product = rt.PRODUCTS["dot"].rows


@rt.jit
def chosen_forced(q, k_first, k_last, length):
    """Is the unit of keys k_first..k_last chosen for the query at q, whatever its score?"""
    k = k_first
    return (k_first <= q) & (
        ((k_first - 64 * rt.floor_div(q, 64) < 64) & (64 * rt.floor_div(q, 64) - k_last < 65)) | (k_first < 64)
    )


@rt.jit
def chosen_allowed(q, k_first, k_last, length):
    """May the unit be chosen at all?"""
    k = k_first
    return k_first <= q


@rt.jit
def chosen_scores_of(rows, row_lse, position, keys, unit, begin, score, scored, S, C):
    """-> scores [LANES, RANKS] of units, and which of them have one; the same of the units behind them, so far.

    An entry counts for each unit that it overlaps, by overlap / stride.
    It is multiplied for the first of these: what the units before had in common with these is in their scores already.
    """
    score_1 = tl.full((S.LANES, S.RANKS), 0.0, C.ACC)
    scored_1 = tl.zeros((S.LANES, S.RANKS), dtype=tl.int1)
    for i in tl.range(begin, S.ENTRIES, disable_licm=True):  # else the parts of q for a product stay in registers
        entry = unit * S.RATIO + (S.FIRST + i)
        inside = (entry >= 0) & (entry < keys.count)
        k_position = (keys.origin + entry)[None, :]
        k0, k1 = rt.load_tokens(keys.k, keys.pages, entry, inside, C.QK0, C.QK1, C.QK_DIM, C)
        product = chosen_product(rows.q0, rows.q1, k0, k1, C.QK1, C)
        s, _ = coarse_scores(product, rows.position, k_position, rows.head, keys.length, C)
        value = tl.exp2(s * coarse_unit(C) - row_lse[:, None])
        value = rt.of_list_head(value, rt.there(rows, S, C), "sum", S, C)
        seen = coarse_visible(position, k_position, 0, keys.length) & inside[None, :]  # all heads see the same

        weight = 1.0
        weight = tl.where(i == 1, 2.0, weight)
        weight = tl.where(i == 2, 2.0, weight)
        weight = tl.where(i == 3, 2.0, weight)
        score += weight * tl.where(seen, value, 0.0)
        scored |= seen
        seen_1 = seen & (i >= S.RATIO)
        score_1 += tl.where(seen_1, value, 0.0)
        scored_1 |= seen_1
    return score, scored, score_1, scored_1


@rt.jit
def chosen_select(q, entries, lse, parts, chosen, ranks, call, S, C):
    """One program: the lists of neighbouring queries of one list head.

    Scores are ranked as they come, none is stored.
    """
    # The last queries have most units to rank: they start first, so that no long tile is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    list_head, s, split = tl.program_id(1), tl.program_id(2) // S.SPLITS, tl.program_id(2) % S.SPLITS
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    if tile * S.LANES >= q_count:
        return
    h = list_head * C.GROUP
    keys = rt.sequence_keys(entries, s, h, call, C)
    q_origin = rt.row_origin(call, s, q_count)
    rows = rt.load_packed_rows(rt.at(q, s, 0, q_start), tile, h, q_origin, q_count, S, C)
    row_lse = rows.position
    if parts.many is None:
        row_lse = rt.load_packed_lse(rt.at(lse, s, 0, q_start), rows)
    else:
        row_lse = rt.load_step_lse(parts, rows, s, C)
    query = tile * S.LANES + tl.arange(0, S.LANES)
    position = (q_origin + query)[:, None]
    end = tl.cdiv(keys.length, S.UNIT)
    last = q_origin + tl.minimum((tile + 1) * S.LANES, q_count) - 1
    end = tl.minimum(end, tl.maximum(last, -1) // S.UNIT + 1)

    best = tl.full((S.LANES, S.KEPT), rt.NOT_RANKED, tl.int64)
    steps = tl.cdiv(end, S.RANKS)
    score_1 = tl.full((S.LANES, S.RANKS), 0.0, C.ACC)
    scored_1 = tl.zeros((S.LANES, S.RANKS), dtype=tl.int1)
    # The next step has the next units, each in the column of the unit before it. Steps before the first are ahead of
    # it: they rank nothing, and multiply only what later units have in common with theirs.
    first = steps * split // S.SPLITS
    for step in tl.range(first - 1, steps * (split + 1) // S.SPLITS, disable_licm=True):
        unit = tl.arange(0, S.RANKS) * steps + step
        begin = tl.where(step < first, 4, 1)
        score, scored, score_1, scored_1 = chosen_scores_of(
            rows, row_lse, position, keys, unit, begin, score_1, scored_1, S, C
        )
        k_first = (unit * S.UNIT)[None, :]
        k_last = tl.minimum(k_first + S.UNIT, keys.length) - 1
        exists = (step >= first) & (k_first < keys.length)
        allowed = chosen_allowed(position, k_first, k_last, keys.length) & exists
        forced = chosen_forced(position, k_first, k_last, keys.length) & allowed
        best = rt.ranked(best, score, scored & allowed, allowed, forced, unit, S)
    if S.SPLITS == 1:
        rt.store_units(rt.at(chosen, s, list_head, q_start), best, query, q_count, S)
    else:
        rt.store_ranks(ranks, best, tl.cast(s, tl.int64) * tl.num_programs(1) + list_head, split, S)


# ---- 3. Launches ----------------------------------------------------------------------------------------------------


@MODULE.tuned
def coarse_kernel_forward(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, paged: rt.Paged | None = None
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Rows in no sequence keep out = 0, lse = -inf."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    v_dim = keys[0][1].shape[3]
    out, lse = rt.empty_rows(q, v_dim)
    config = rt.config_for("forward", q, v_dim, paged)
    q = rt.rows_contiguous(q)
    C = rt.constants(q, v_dim, rt.scale_of(q, layout), config, page=rt.page_of(paged))
    rt.launch(
        coarse_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), rt.entry_source(q, *keys[0], sequences, layout, rt.Cells(32, 16), paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def coarse_kernel_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
    layout: rt.Layout,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-> dq, (dk, dv) of each stream, from the lse and out given, which may be those of a joint softmax."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    q, dout = rt.rows_contiguous(q), rt.rows_contiguous(dout)
    v_dim = keys[0][1].shape[3]
    delta = rt.delta_of(out, dout, dlse)
    dq, grads = rt.gradient_room(q, keys)
    call = rt.call_of(q, layout)
    rows = [rt.strided(x, sequences) for x in (dout, lse, delta)]
    sources = [rt.entry_source(q, k, v, sequences, layout, rt.Cells(32, 16), None) for k, v in keys]

    config = rt.config_for("dq", q, v_dim)
    rt.launch(
        coarse_dq, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), *sources, *rows, rt.strided(dq, sequences), call,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    config = rt.config_for("dkdv", q, v_dim)
    k, (dk, dv) = keys[0][0], grads[0]
    group = q.shape[1] // k.shape[1]
    longest = k.shape[2] if layout.k_spans is None else min(layout.longest, k.shape[2])
    rt.launch(
        coarse_dkdv, (triton.cdiv(longest, config.block_n), k.shape[1], sequences),
        rt.strided(q, sequences), sources[0], *rows, rt.strided(dk, sequences), rt.strided(dv, sequences), call,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, grads


@MODULE.tuned
def coarse_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the visited blocks."""
    batch, heads = q.shape[:2]
    v_dim = keys[0][1].shape[3]
    group = min(heads // k.shape[1] for k, _ in keys)
    config = rt.decode_config(q, v_dim, group, paged)
    visited = rt.most_visited(coarse_decode_visits, layout.keys, paged.capacity)
    splits = rt.split_count(batch * (heads // group), visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        coarse_decode, (batch, heads // group, splits),
        rt.strided(q), rt.entry_source(q, *keys[0], batch, layout, rt.Cells(32, 16), paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout),
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group, splits, rt.page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


@MODULE.tuned
def fine_kernel_forward(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, chosen: Tensor, paged: rt.Paged | None = None
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Rows in no sequence keep out = 0, lse = -inf."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    v_dim, lists = keys[0][1].shape[3], chosen.shape[1]
    out, lse = rt.empty_rows(q, v_dim)
    shape = rt.unit_shape("units", q, v_dim, lists, 64, paged)
    unit_list = rt.unit_lists(chosen, shape, 64, layout)
    q = rt.rows_contiguous(q)
    rt.launch(
        fine_forward, (triton.cdiv(layout.longest, shape.lanes), lists, sequences),
        rt.strided(q, sequences), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        rt.lists_of(unit_list),
        rt.unit_constants(shape, 64),
        rt.packed_constants(q, v_dim, rt.scale_of(q, layout), shape, page=rt.page_of(paged)),
        num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def fine_kernel_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
    layout: rt.Layout,
    chosen: Tensor,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-> dq, (dk, dv) of the stream."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    q, dout = rt.rows_contiguous(q), rt.rows_contiguous(dout)
    (k, v), lists = keys[0], chosen.shape[1]
    v_dim = v.shape[3]
    delta = rt.delta_of(out, dout, dlse)
    dq, dk, dv = (rt.room_like(x).zero_() for x in (q, k, v))
    call = rt.call_of(q, layout)
    rows = [rt.strided(x, sequences) for x in (dout, lse, delta)]
    own = rt.source(q, k, v, sequences, layout, None)

    shape = rt.unit_shape("units_dq", q, v_dim, lists, 64)
    unit_list = rt.unit_lists(chosen, shape, 64, layout)
    rt.launch(
        fine_dq, (triton.cdiv(layout.longest, shape.lanes), lists, sequences),
        rt.strided(q, sequences), own, *rows, rt.strided(dq, sequences), call, rt.lists_of(unit_list),
        rt.unit_constants(shape, 64), rt.packed_constants(q, v_dim, rt.scale_of(q, layout), shape),
        num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
    )  # fmt: skip

    lanes, shape = shape.lanes, rt.unit_shape("units_dkdv", q, v_dim, lists, 64)
    if shape.lanes != lanes:  # else the tiles of dQ serve here, too
        unit_list = rt.unit_lists(chosen, shape, 64, layout)
    jobs = rt.unit_inverse(unit_list, 64, k, layout)
    inverse, buffer = rt.inverse_of(unit_list, jobs), rt.slot_buffer(jobs, k, v, 64)
    U = rt.unit_constants(shape, 64, lists // k.shape[1])
    C = rt.packed_constants(q, v_dim, rt.scale_of(q, layout), shape)
    per_unit = 64 // shape.config.block_n
    rt.launch(
        fine_dkdv, (jobs.sequence.shape[1], k.shape[1], per_unit),
        rt.strided(q, sequences), own, *rows, rt.strided(dk, sequences), rt.strided(dv, sequences),
        rt.strided(buffer), call, inverse,
        U, C, num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
    )  # fmt: skip
    rt.add_parts(buffer, dk, dv, own, call, jobs, inverse, U, C, sequences, per_unit, shape.config)
    return dq, [(dk, dv)]


@MODULE.tuned
def fine_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, chosen: Tensor, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the units of its list."""
    sequences, heads = q.shape[:2]
    v_dim, lists = keys[0][1].shape[3], chosen.shape[1]
    shape = rt.one_query(rt.unit_shape("units_decode", q, v_dim, lists, 64, paged))
    visited = min(paged.capacity, max(1, chosen.shape[3]) * 64)
    splits = rt.split_count(sequences * lists, visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        fine_decode, (sequences, lists, splits),
        rt.strided(q), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout), rt.step_lists(chosen),
        rt.unit_constants(shape, 64),
        rt.packed_constants(q, v_dim, rt.scale_of(q, layout), shape, splits, rt.page_of(paged)),
        num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


@MODULE.tuned
def near_kernel_forward(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, paged: rt.Paged | None = None
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Rows in no sequence keep out = 0, lse = -inf."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    v_dim = keys[0][1].shape[3]
    out, lse = rt.empty_rows(q, v_dim)
    config = rt.config_for("forward", q, v_dim, paged)
    q = rt.rows_contiguous(q)
    C = rt.constants(q, v_dim, rt.scale_of(q, layout), config, page=rt.page_of(paged))
    rt.launch(
        near_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def near_kernel_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
    layout: rt.Layout,
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

    config = rt.config_for("dq", q, v_dim)
    rt.launch(
        near_dq, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), *sources, *rows, rt.strided(dq, sequences), call,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    config = rt.config_for("dkdv", q, v_dim)
    k, (dk, dv) = keys[0][0], grads[0]
    group = q.shape[1] // k.shape[1]
    longest = k.shape[2] if layout.k_spans is None else min(layout.longest, k.shape[2])
    rt.launch(
        near_dkdv, (triton.cdiv(longest, config.block_n), k.shape[1], sequences),
        rt.strided(q, sequences), sources[0], *rows, rt.strided(dk, sequences), rt.strided(dv, sequences), call,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, grads


@MODULE.tuned
def near_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the visited blocks."""
    batch, heads = q.shape[:2]
    v_dim = keys[0][1].shape[3]
    group = min(heads // k.shape[1] for k, _ in keys)
    config = rt.decode_config(q, v_dim, group, paged)
    visited = rt.most_visited(near_decode_visits, layout.keys, paged.capacity)
    splits = rt.split_count(batch * (heads // group), visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        near_decode, (batch, heads // group, splits),
        rt.strided(q), rt.source(q, *keys[0], batch, layout, paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout),
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group, splits, rt.page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


# ---- 4. Operators ---------------------------------------------------------------------------------------------------


def coarse_keys(q: Tensor, k_entries: Tensor, v_entries: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k_entries, v_entries)]


def coarse_forward_of(q: Tensor, k_entries: Tensor, v_entries: Tensor, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """-> out, lse"""
    keys = coarse_keys(q, k_entries, v_entries)
    if rt.uses_kernels(q):
        return coarse_kernel_forward(q, keys, layout)
    return rt.cpu_forward(coarse_form, q, keys, layout, None)


def coarse_backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_entries: Tensor,
    v_entries: Tensor,
    layout: rt.Layout,
) -> list[Tensor]:
    """-> gradients of q, k_entries, v_entries; out and lse may be those of a joint softmax"""
    given = dout, dlse, q, coarse_keys(q, k_entries, v_entries), out, lse, layout
    if rt.uses_kernels(q):
        dq, grads = coarse_kernel_backward(*given)
    else:
        dq, grads = rt.cpu_backward(coarse_form, *given)
    return [dq, *grads[0]]


def fine_keys(q: Tensor, k_picked: Tensor, v_picked: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k_picked, v_picked)]


def fine_forward_of(
    q: Tensor, k_picked: Tensor, v_picked: Tensor, chosen: Tensor, layout: rt.Layout
) -> tuple[Tensor, Tensor]:
    """-> out, lse"""
    keys = fine_keys(q, k_picked, v_picked)
    if rt.uses_kernels(q):
        return fine_kernel_forward(q, keys, layout, chosen)
    return rt.cpu_forward(fine_form, q, keys, layout, None, chosen=chosen)


def fine_backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_picked: Tensor,
    v_picked: Tensor,
    chosen: Tensor,
    layout: rt.Layout,
) -> list[Tensor]:
    """-> gradients of q, k_picked, v_picked; out and lse may be those of a joint softmax"""
    given = dout, dlse, q, fine_keys(q, k_picked, v_picked), out, lse, layout
    if rt.uses_kernels(q):
        dq, grads = fine_kernel_backward(*given, chosen)
    else:
        dq, grads = rt.cpu_backward(fine_form, *given, chosen=chosen)
    return [dq, *grads[0]]


def near_keys(q: Tensor, k_recent: Tensor, v_recent: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k_recent, v_recent)]


def near_forward_of(q: Tensor, k_recent: Tensor, v_recent: Tensor, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """-> out, lse"""
    keys = near_keys(q, k_recent, v_recent)
    if rt.uses_kernels(q):
        return near_kernel_forward(q, keys, layout)
    return rt.cpu_forward(near_form, q, keys, layout, None)


def near_backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    layout: rt.Layout,
) -> list[Tensor]:
    """-> gradients of q, k_recent, v_recent; out and lse may be those of a joint softmax"""
    given = dout, dlse, q, near_keys(q, k_recent, v_recent), out, lse, layout
    if rt.uses_kernels(q):
        dq, grads = near_kernel_backward(*given)
    else:
        dq, grads = rt.cpu_backward(near_form, *given)
    return [dq, *grads[0]]


coarse_forward_op, coarse_backward_op = rt.attention_operators(
    MODULE, "coarse", ("q", "k_entries", "v_entries"), (),
    coarse_keys, coarse_forward_of, coarse_backward_of
)  # fmt: skip


fine_forward_op, fine_backward_op = rt.attention_operators(
    MODULE, "fine", ("q", "k_picked", "v_picked"), ("chosen",),
    fine_keys, fine_forward_of, fine_backward_of
)  # fmt: skip


near_forward_op, near_backward_op = rt.attention_operators(
    MODULE, "near", ("q", "k_recent", "v_recent"), (),
    near_keys, near_forward_of, near_backward_of
)  # fmt: skip


def chosen_torch(q: Tensor, k: Tensor, lse: Tensor | None, lists: int, layout: rt.Layout) -> Tensor:
    """The units of every query, by torch."""
    found = torch.full((q.shape[0], lists, q.shape[2], 16), -1, dtype=torch.int32, device=q.device)
    for corner in rt.entry_corners(q, layout, rt.Cells(32, 16)):
        rows = (corner.batch, slice(None), corner.rows)
        found[rows] = chosen_of(
            q[rows], k[corner.batch, :, corner.keys], None if lse is None else lse[rows], lists, 16, corner
        )
    return found


def chosen_of(q: Tensor, k: Tensor, lse: Tensor | None, lists: int, most: int, corner: rt.Corner) -> Tensor:
    """The units that the queries of one sequence choose, from the logits of coarse."""
    units = -(-corner.length // 64)
    k_first = torch.arange(units, device=q.device).view(1, 1, 1, -1) * 64
    k_last = (k_first + 64).clamp(max=corner.length) - 1

    def position(first: int, end: int) -> Tensor:
        return (corner.q_origin + torch.arange(first, end, device=q.device)).view(1, 1, -1, 1)

    def forced(first: int, end: int) -> Tensor:
        return chosen_units(position(first, end), k_first, k_last, corner.length, True)

    def allowed(first: int, end: int) -> Tensor:
        return chosen_units(position(first, end), k_first, k_last, corner.length, False)

    selection = rt.Selection(64, 1, rt.Cells(32, 16), lists, "sum", None, "sum", 16, None, most)
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2], units, corner.q_origin, corner.length)
    logits = rt.logits_of(coarse_form, q, k, corner)
    return rt.choose(logits, lse, forced, allowed, sizes, selection)


def chosen_units(q: Tensor, k_first: Tensor, k_last: Tensor, length: int, forced: bool) -> Tensor:
    """Which units are chosen whatever their score (forced), or may be chosen at all."""
    k = k_first
    found = (
        ((k_first <= q) & (((k_first - 64 * (q // 64) < 64) & (64 * (q // 64) - k_last < 65)) | (k_first < 64)))
        if forced
        else (k_first <= q)
    )
    return found.expand(torch.broadcast_shapes(q.shape, k.shape))


@MODULE.tuned
def chosen_kernel(
    q: Tensor, k: Tensor, lse: rt.Splits | Tensor | None, lists: int, layout: rt.Layout, paged: rt.Paged | None = None
) -> Tensor:
    """The units of every query, by a kernel that scores and ranks in one pass."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    found = torch.empty(q.shape[0], lists, q.shape[2], 16, dtype=torch.int32, device=q.device)
    shape, splits, ranks = rt.select_ranks(rt.unit_shape("select", q, 16, lists, rt.MOST_UNIT), 16, q), 1, None
    if layout.q_spans is not None:
        found.fill_(-1)  # of rows in no sequence
    elif q.shape[2] == 1:
        shape, splits = rt.select_step(shape, q), rt.select_splits(sequences, lists, -(-layout.keys // 64), q.device)
        ranks = torch.empty(sequences * lists, splits, rt.ranks_kept(16), dtype=torch.int64, device=q.device)
    q, k = rt.rows_contiguous(q), rt.rows_contiguous(k)
    own = rt.entry_source(q, k, k, sequences, layout, rt.Cells(32, 16), paged)
    S = rt.select_constants(shape, 64, 16, 0, 16, -1, 5, splits)
    rt.launch(
        chosen_select, (triton.cdiv(layout.longest, shape.lanes), lists, sequences * splits),
        rt.strided(q, sequences), own,
        rt.strided(lse, sequences) if isinstance(lse, Tensor) else None, rt.step_lse(lse),
        rt.strided(found, sequences), ranks, rt.call_of(q, layout),
        S, rt.packed_constants(q, 16, rt.scale_of(q, layout), shape, page=rt.page_of(paged)),
        num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
    )  # fmt: skip
    if ranks is not None and splits > 1:
        rt.merge_splits(ranks, found, S)
    return found


def chosen_choose(q: Tensor, k: Tensor, lse: Tensor | None, lists: int, layout: rt.Layout) -> Tensor:
    run = chosen_kernel if rt.uses_kernels(q) else chosen_torch
    return run(q, k, lse, lists, layout)


chosen_op = rt.choice_operator(
    MODULE, "chosen", (), lambda layout: 16, chosen_choose
)  # fmt: skip


# ---- 5. Public functions --------------------------------------------------------------------------------------------


gate = rt.gate_operator(MODULE)


class Inputs(NamedTuple):
    """What a call computes with; choices as membership maps with their first row tile."""

    q: Tensor
    k_rough: Tensor
    v_rough: Tensor
    k_picked: Tensor
    v_picked: Tensor
    k_recent: Tensor
    v_recent: Tensor
    entries_k_position: Tensor
    entries_k_up: Tensor
    entries_k_down: Tensor
    entries_v_position: Tensor
    entries_v_up: Tensor
    entries_v_down: Tensor
    k_entries: Tensor | None = None
    v_entries: Tensor | None = None
    chosen: Tensor | None = None


ARGUMENTS = rt.Arguments(
    queries=(rt.QueryArgument("q", heads=64, dim=192),),
    streams=(
        rt.StreamArgument("rough", "k_rough", "v_rough", "q", heads=4, v_dim=128),
        rt.StreamArgument("picked", "k_picked", "v_picked", "q", heads=4, v_dim=128),
        rt.StreamArgument("recent", "k_recent", "v_recent", "q", heads=4, v_dim=128),
    ),
    weights=(
        rt.WeightArgument("entries_k_position", ("heads", 32, "dim"), "k_rough"),
        rt.WeightArgument("entries_k_up", ("heads", 32, "dim", "hidden"), "k_rough"),
        rt.WeightArgument("entries_k_down", ("heads", "hidden", "dim"), "k_rough", like="entries_k_up"),
        rt.WeightArgument("entries_v_position", ("heads", 32, "dim"), "v_rough"),
        rt.WeightArgument("entries_v_up", ("heads", 32, "dim", "hidden"), "v_rough"),
        rt.WeightArgument("entries_v_down", ("heads", "hidden", "dim"), "v_rough", like="entries_v_up"),
    ),
    chosen=(rt.ChosenArgument("chosen", "kv_head", 64),),
    gates=3,
    sums={
        "train": (("v_rough", "v_picked", "v_recent"),),
        "prefill": (("v_rough", "v_picked", "v_recent"),),
        "decode": (("v_rough", "v_picked", "v_recent"),),
    },
)


def _entries(inputs: Inputs, layout: rt.Layout) -> Inputs:
    """inputs with the entries of compressed streams."""
    cells = rt.Cells(32, 16)
    inputs = inputs._replace(
        k_entries=rt.entries_by_torch(
            "mlp", inputs.k_rough, cells, layout, inputs.entries_k_position, inputs.entries_k_up, inputs.entries_k_down
        )
    )
    inputs = inputs._replace(
        v_entries=rt.entries_by_torch(
            "mlp", inputs.v_rough, cells, layout, inputs.entries_v_position, inputs.entries_v_up, inputs.entries_v_down
        )
    )
    return inputs


def attention(
    q: Tensor, k_rough: Tensor, v_rough: Tensor, k_picked: Tensor, v_picked: Tensor, k_recent: Tensor, v_recent: Tensor,
    entries_k_position: Tensor, entries_k_up: Tensor, entries_k_down: Tensor, entries_v_position: Tensor,
    entries_v_up: Tensor, entries_v_down: Tensor, gates: Tensor, *, chosen: Tensor | None = None,
    return_lse: bool = False, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None, lengths: Tensor | None = None,
    side: str = "left", q_offset: int | None = None, k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of whole sequences, differentiable.

    q [B, 64, N, 192]; k_rough [B, 4, M, 192]; v_rough [B, 4, M, 128]; k_picked [B, 4, M, 192]; v_picked [B, 4, M,
    128]; k_recent [B, 4, M, 192]; v_recent [B, 4, M, 128]; entries_k_position [heads, 32, qk]; entries_k_up
    [heads, 32, qk, hidden]; entries_k_down [heads, hidden, qk]; entries_v_position [heads, 32, v]; entries_v_up
    [heads, 32, v, hidden]; entries_v_down [heads, hidden, v]; gates [B, Hq, N, 3]; chosen int [B, 4, N, any]:
    units of 64 keys to use instead of the computed ones, -1 padded. -> out [B, Hq, N, Dv] in the dtype of q.
    return_lse: also the natural-log lse, float32 [B, Hq, N] per branch.
    cu_seqlens, max_seqlen: packed sequences, batch 1, tokens cu_seqlens[i] to cu_seqlens[i + 1]; positions restart.
    cu_seqlens_k, max_seqlen_k: their keys, where those are not as many.
    lengths, side: int [B], the real tokens of rows that are padded at the side "left" or "right".
    q_offset, k_offset: positions of the first query and key of a part of a longer sequence; by default the last
        query stands at the last key.
    scale: in place of 1 / sqrt(dim).
    """
    inputs = rt.checked(
        ARGUMENTS,
        Inputs(
            q,
            k_rough,
            v_rough,
            k_picked,
            v_picked,
            k_recent,
            v_recent,
            entries_k_position,
            entries_k_up,
            entries_k_down,
            entries_v_position,
            entries_v_up,
            entries_v_down,
            chosen=chosen,
        ),
        "train",
        return_lse,
    )
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k_rough, options)
    inputs = rt.prepared(ARGUMENTS, inputs, layout)
    inputs = _entries(inputs, layout)
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)

    rt.expect_gates(gates, inputs.q, 3)
    coarse_part = coarse_forward_op(inputs.q, inputs.k_entries, inputs.v_entries, *layout)
    inputs = _choose_chosen(inputs, layout, coarse_part[1])
    fine_part = fine_forward_op(inputs.q, inputs.k_picked, inputs.v_picked, inputs.chosen, *layout)
    near_part = near_forward_op(inputs.q, inputs.k_recent, inputs.v_recent, *layout)
    return rt.finish(gate([coarse_part, fine_part, near_part], gates), return_lse)


@MODULE.entry
@torch.no_grad()
def choices(
    q: Tensor, k_rough: Tensor, v_rough: Tensor, k_picked: Tensor, v_picked: Tensor, k_recent: Tensor, v_recent: Tensor,
    entries_k_position: Tensor, entries_k_up: Tensor, entries_k_down: Tensor, entries_v_position: Tensor,
    entries_v_up: Tensor, entries_v_down: Tensor, gates: Tensor | None = None, *, return_counts: bool = False,
    phase: str = "train", cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None, lengths: Tensor | None = None,
    side: str = "left", q_offset: int | None = None, k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """The units that a phase chooses, by name: int32 [B, heads, N, most], ascending, -1 at the end.

    Passed back to `attention` or `reference`, they hold the choice fixed. In `phase` "decode" every row chooses as if
    it were the last token. return_counts: (the lists, how many units each has, int32 [B, heads, N]).
    """
    rt.expect_phase(phase, PHASES)
    inputs = rt.checked(
        ARGUMENTS,
        Inputs(
            q,
            k_rough,
            v_rough,
            k_picked,
            v_picked,
            k_recent,
            v_recent,
            entries_k_position,
            entries_k_up,
            entries_k_down,
            entries_v_position,
            entries_v_up,
            entries_v_down,
        ),
        phase,
    )
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k_rough, options)
    return rt.choices_in(phase, _choices, ARGUMENTS, inputs, layout, return_counts)


def _choices(inputs: Inputs, layout: rt.Layout) -> dict[str, Tensor]:
    """What is chosen in every phase."""
    inputs = rt.prepared(ARGUMENTS, inputs, layout)
    inputs = _entries(inputs, layout)
    coarse_part = coarse_forward_op(inputs.q, inputs.k_entries, inputs.v_entries, *layout)
    inputs = _choose_chosen(inputs, layout, coarse_part[1])
    return {"chosen": inputs.chosen}


def reference(
    q: Tensor, k_rough: Tensor, v_rough: Tensor, k_picked: Tensor, v_picked: Tensor, k_recent: Tensor, v_recent: Tensor,
    entries_k_position: Tensor, entries_k_up: Tensor, entries_k_down: Tensor, entries_v_position: Tensor,
    entries_v_up: Tensor, entries_v_down: Tensor, gates: Tensor, *, chosen: Tensor | None = None,
    return_lse: bool = False, phase: str = "train", cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None, lengths: Tensor | None = None,
    side: str = "left", q_offset: int | None = None, k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """What the pattern means: dense, in float64, every pair of query and key tested.

    Arguments as of `attention`. phase: "decode" makes every row the last token of its
    sequence, "prefill" takes the results of that phase.
    """
    rt.expect_phase(phase, PHASES)
    inputs = rt.checked(
        ARGUMENTS,
        Inputs(
            q,
            k_rough,
            v_rough,
            k_picked,
            v_picked,
            k_recent,
            v_recent,
            entries_k_position,
            entries_k_up,
            entries_k_down,
            entries_v_position,
            entries_v_up,
            entries_v_down,
            chosen=chosen,
        ),
        phase,
        return_lse,
        cast=False,
    )
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k_rough, options)
    rt.expect_gates(gates, inputs.q, 3)
    return rt.reference_in(phase, _reference, ARGUMENTS, inputs, gates, layout, return_lse)


def _reference(inputs: Inputs, gates: Tensor | None, layout: rt.Layout, return_lse: bool) -> Any:
    """The float64 meaning in every phase."""
    inputs = rt.prepared(ARGUMENTS, inputs, layout)
    inputs = _entries(rt.in_float64(ARGUMENTS, inputs), layout)
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)

    coarse_part = coarse_dense(inputs, layout)
    inputs = _dense_chosen(inputs, layout, coarse_part[1])
    fine_part = fine_dense(inputs, layout)
    near_part = near_dense(inputs, layout)
    return rt.finish(gate([coarse_part, fine_part, near_part], gates), return_lse)


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
        kv_heads: int = 4,
        qk_dim: int = 192,
        v_dim: int = 128,
        page: int | None = 64,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        page_table: Tensor | None = None,
    ) -> None:
        rt.expect_sizes(kv_heads, qk_dim, v_dim)
        streams = {
            "rough": rt.StreamShape(kv_heads, qk_dim, v_dim),
            "picked": rt.StreamShape(kv_heads, qk_dim, v_dim),
            "recent": rt.StreamShape(kv_heads, qk_dim, v_dim),
        }
        tokens = rt.token_states(ARGUMENTS, dtype, kv_heads)
        entries = {"entries": rt.EntryShape(kv_heads, qk_dim, v_dim, rt.Cells(32, 16))}
        super().__init__(
            batch, capacity, streams, tokens, entries, page=page, device=device, dtype=dtype, page_table=page_table
        )

    @MODULE.step
    @torch.no_grad()
    def append(
        self, *given: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None, rows: Sequence[int] | Tensor | None = None, side: str = "left", **named: Tensor
    ) -> None:  # fmt: skip
        """What `prefill` does, but for attending: its arguments without queries, gates and choices."""
        brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
        rt.append_alone(ARGUMENTS, Inputs, self, given, named, brought, _closes)


def _closes(inputs: Inputs) -> list[rt.Closes]:
    """The compressed streams, and how entries are made of new tokens."""
    return [
        rt.Closes("entries", "rough", rt.POOLS["mlp"],
            (inputs.entries_k_position, inputs.entries_k_up, inputs.entries_k_down),
            (inputs.entries_v_position, inputs.entries_v_up, inputs.entries_v_down)),
    ]  # fmt: skip


@rt.cached_call(MODULE, ARGUMENTS, Cache, rt.Result("v.entries", branches=3))
@torch.no_grad()
def prefill(
    q: Tensor, k_rough: Tensor, v_rough: Tensor, k_picked: Tensor, v_picked: Tensor, k_recent: Tensor, v_recent: Tensor,
    entries_k_position: Tensor, entries_k_up: Tensor, entries_k_down: Tensor, entries_v_position: Tensor,
    entries_v_up: Tensor, entries_v_down: Tensor, gates: Tensor, cache: Cache, *, chosen: Tensor | None = None,
    return_lse: bool = False, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, rows: Sequence[int] | Tensor | None = None, side: str = "left",
    scale: float | None = None,
) -> Any:  # fmt: skip
    """Appends keys and values of N new tokens per sequence to the cache, and attends from them. Inference only.

    Shapes as in `attention`, of the new tokens alone; call it again for the next chunk. lengths, cu_seqlens,
    max_seqlen, side, scale: as there; rows: the sequences of the cache that the call is for, each once, by default all
    in order. A token without room is dropped: out 0, lse -inf.
    """
    inputs = Inputs(
        q,
        k_rough,
        v_rough,
        k_picked,
        v_picked,
        k_recent,
        v_recent,
        entries_k_position,
        entries_k_up,
        entries_k_down,
        entries_v_position,
        entries_v_up,
        entries_v_down,
        chosen=chosen,
    )
    brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
    inputs, own, layout, done = rt.step(
        ARGUMENTS, inputs, "prefill", cache, Cache, return_lse, brought, scale, closes=_closes, gates=(gates, 3)
    )
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)
    coarse_part = coarse_cached(inputs, own, layout)
    inputs = _cached_chosen(inputs, own, layout, rt.lse_of(coarse_part))
    fine_part = fine_cached(inputs, own, layout)
    near_part = near_cached(inputs, own, layout)
    return rt.answer(rt.gated([[coarse_part], [fine_part], [near_part]], gates), done, return_lse)


@rt.cached_call(MODULE, ARGUMENTS, Cache, rt.Result("v.entries", branches=3))
@torch.no_grad()
def decode(
    q: Tensor, k_rough: Tensor, v_rough: Tensor, k_picked: Tensor, v_picked: Tensor, k_recent: Tensor, v_recent: Tensor,
    entries_k_position: Tensor, entries_k_up: Tensor, entries_k_down: Tensor, entries_v_position: Tensor,
    entries_v_up: Tensor, entries_v_down: Tensor, gates: Tensor, cache: Cache, *, chosen: Tensor | None = None,
    return_lse: bool = False, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, rows: Sequence[int] | Tensor | None = None, side: str = "left",
    scale: float | None = None,
) -> Any:  # fmt: skip
    """One step of generation: like `prefill` with one new token for each sequence, or for those of `rows`."""
    inputs = Inputs(
        q,
        k_rough,
        v_rough,
        k_picked,
        v_picked,
        k_recent,
        v_recent,
        entries_k_position,
        entries_k_up,
        entries_k_down,
        entries_v_position,
        entries_v_up,
        entries_v_down,
        chosen=chosen,
    )
    brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
    inputs, own, layout, done = rt.step(
        ARGUMENTS, inputs, "decode", cache, Cache, return_lse, brought, scale, closes=_closes, gates=(gates, 3)
    )
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)
    coarse_part = coarse_cached(inputs, own, layout)
    inputs = _cached_chosen(inputs, own, layout, rt.lse_of(coarse_part))
    fine_part = fine_cached(inputs, own, layout)
    near_part = near_cached(inputs, own, layout)
    return rt.answer(rt.gated([[coarse_part], [fine_part], [near_part]], gates), done, return_lse)


CELLS = {"entries": rt.Cells(32, 16)}


def paged_states(slots: int, tokens: int, **sizes: Any) -> dict[str, Tensor]:
    """Entries of requests of up to `tokens` tokens, a row for each; sizes: those that Cache takes."""
    cache = Cache(0, tokens, **sizes)
    return rt.state_buffers(cache.entries, slots, tokens, cache.spans.device, cache.dtype)


@MODULE.step
@torch.no_grad()
def update_states(
    k_rough_pages: Tensor,
    v_rough_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    states: dict[str, Tensor],
    state_rows: Tensor,
    new_tokens: int,
    **weights: Tensor,
) -> None:
    """Entries that close with the last new_tokens tokens of each request (or fewer), which lie in the pages."""
    inputs = Inputs(None, k_rough_pages, v_rough_pages, None, None, None, None, **weights)
    rt.close_in_pages(ARGUMENTS, inputs, _closes(inputs), block_table, seq_lens, CELLS, states, state_rows, new_tokens)


@MODULE.step
@torch.no_grad()
def attend_paged(
    q: Tensor, k_rough_pages: Tensor, v_rough_pages: Tensor, k_picked_pages: Tensor, v_picked_pages: Tensor,
    k_recent_pages: Tensor, v_recent_pages: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    states: dict[str, Tensor], state_rows: Tensor, gates: Tensor, *, chosen: Tensor | None = None,
    max_seqlen_q: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of packed queries [T, heads, dim] over pages [pages, page, heads, dim] that hold the keys already.

    Request r has queries cu_seqlens_q[r] to cu_seqlens_q[r + 1], the last one at seq_lens[r] - 1, and its pages in
    block_table[r]. max_seqlen_q: the most queries of a request. -> out [T, heads, dim], lse [T, heads, branches].
    scale: as in `attention`.
    states: what `update_states` keeps up to date, request r in row state_rows[r].
    """
    inputs, own, layout, requests = rt.from_pages(
        ARGUMENTS,
        Inputs(
            q,
            k_rough_pages,
            v_rough_pages,
            k_picked_pages,
            v_picked_pages,
            k_recent_pages,
            v_recent_pages,
            None,
            None,
            None,
            None,
            None,
            None,
            chosen=chosen,
        ),
        "prefill",
        block_table,
        seq_lens,
        cu_seqlens_q,
        max_seqlen_q,
        scale,
        CELLS,
        states,
        state_rows,
    )
    gates = rt.packed_queries(gates, requests)
    rt.expect_gates(gates, inputs.q, 3)
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)
    coarse_part = coarse_cached(inputs, own, layout)
    inputs = _cached_chosen(inputs, own, layout, rt.lse_of(coarse_part))
    fine_part = fine_cached(inputs, own, layout)
    near_part = near_cached(inputs, own, layout)
    return rt.unpacked(rt.gated([[coarse_part], [fine_part], [near_part]], gates), requests)


def example_inputs(
    batch: int, tokens: int, *, heads: int = 64, kv_heads: int = 4, qk_dim: int = 192, v_dim: int = 128,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Random arguments for `attention`: token tensors rise in steps, flags are rare, given lists hold near units."""
    sizes = rt.Sizes(heads, kv_heads, qk_dim, v_dim)
    return rt.example_arguments(ARGUMENTS, batch, tokens, sizes, dtype, device)


def _choose_chosen(inputs: Inputs, layout: rt.Layout, lse: Tensor | None) -> Inputs:
    """inputs with chosen: the caller's, or what coarse scores best; no gradient."""
    if inputs.chosen is not None:
        return inputs
    q, k = inputs.q.detach(), inputs.k_entries.detach()
    return inputs._replace(chosen=chosen_op(q, k, lse.detach(), inputs.k_rough.shape[1], *layout))


def _cached_chosen(inputs: Inputs, own: rt.Storage, layout: rt.Layout, lse: rt.Splits | Tensor | None) -> Inputs:
    """The same from the keys in the cache."""
    if inputs.chosen is not None:
        return inputs
    q, k = inputs.q, own.k["entries"]
    lists = inputs.k_rough.shape[1]
    if rt.uses_kernels(q):
        paged = rt.paged_entries(own, "entries")
        return inputs._replace(chosen=chosen_kernel(q, k, lse, lists, layout, paged))
    lse = rt.merged_lse(lse)
    most = 16
    found = torch.full((q.shape[0], lists, q.shape[2], most), -1, dtype=torch.int32, device=q.device)
    for corner in rt.entry_corners(q, layout, rt.Cells(32, 16), in_cache=True):
        s, rows = corner.sequences.start, (corner.batch, slice(None), corner.rows)
        keys = own.entry_rows(k, s, corner.keys)
        found[rows] = chosen_of(q[rows], keys, lse[rows], lists, most, corner)
    return inputs._replace(chosen=found)


def _dense_chosen(inputs: Inputs, layout: rt.Layout, lse: Tensor | None) -> Inputs:
    """The same in float64."""
    if inputs.chosen is not None:
        return inputs
    q, k = inputs.q.double(), inputs.k_entries.double()
    return inputs._replace(chosen=chosen_torch(q, k, lse, inputs.k_rough.shape[1], layout))


def coarse_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of coarse."""
    q = inputs.q
    return rt.dense_attention(coarse_form, q, coarse_keys(q, inputs.k_entries, inputs.v_entries), layout, None)


def coarse_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """coarse of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["entries"], own.v["entries"])]
    if rt.uses_kernels(q):
        run = coarse_kernel_decode if rt.is_step(q, layout) else coarse_kernel_forward
        return run(q, keys, layout, paged=rt.paged_entries(own, "entries"))
    return rt.cached_attention(coarse_form, q, keys, own, layout, None)


def fine_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of fine."""
    q = inputs.q
    return rt.dense_attention(
        fine_form, q, fine_keys(q, inputs.k_picked, inputs.v_picked), layout, None, chosen=inputs.chosen
    )


def fine_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """fine of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["picked"], own.v["picked"])]
    if rt.uses_kernels(q):
        run = fine_kernel_decode if rt.is_step(q, layout) else fine_kernel_forward
        return run(q, keys, layout, inputs.chosen, paged=rt.paged_of(own))
    return rt.cached_attention(fine_form, q, keys, own, layout, None, chosen=inputs.chosen)


def near_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of near."""
    q = inputs.q
    return rt.dense_attention(near_form, q, near_keys(q, inputs.k_recent, inputs.v_recent), layout, None)


def near_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """near of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["recent"], own.v["recent"])]
    if rt.uses_kernels(q):
        run = near_kernel_decode if rt.is_step(q, layout) else near_kernel_forward
        return run(q, keys, layout, paged=rt.paged_of(own))
    return rt.cached_attention(near_form, q, keys, own, layout, None)
