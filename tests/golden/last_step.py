# Made by spdsl 0.1.0 from last_step.spat, pattern last_step, source sha256 e89d3fa8cb5dd592.
"""Served only: one token at a time sees the first tokens and a window, and all keys while the sequence is short.

    pattern last_step {
        causal
        return attend(all) if decode & length < 1024
        return attend(sink(4) | sliding(512)) if decode
    }

    import last_step
    cache = last_step.Cache(batch, capacity, ...)
    out = last_step.decode(q, k, v, cache)

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

PATTERN = "last_step"
PARAMS = {}
PHASES = ("decode",)
MODULE = rt.Module(
    __name__, PATTERN, PARAMS, "11d0fa3f179688a2af1e65b7fc22c6957e461c120b00fde05702e7a78a10c278", runtime=4
)
tune, tuning, use_tables = MODULE.tune, MODULE.tuning, rt.use_tables


# ---- 1. What the pattern says ---------------------------------------------------------------------------------------


def attend_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return k <= q


def attend_visits(q_first: int, q_last: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that rows q_first..q_last may see for any head: (first, end, full_first, full_end)."""
    return [(0, q_last + 1, 0, q_first + 1)]


def attend_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(0, q + 1, 0, 0)]


attend_form = rt.Form(sweeps=(rt.Sweep(attend_mask, visits=attend_visits, decode=attend_decode_visits),))


def attend_2_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return (k <= q) & ((k < 4) | (q - k < 512))


def attend_2_visits(q_first: int, q_last: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that rows q_first..q_last may see for any head: (first, end, full_first, full_end)."""
    return [
        (0, min(4, q_last + 1), 0, min(4, q_first + 1)),
        (max(0, q_first - 511), q_last + 1, max(0, q_last - 511), q_first + 1),
    ]


def attend_2_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(0, min(4, q + 1), 0, 0), (max(0, q - 511), q + 1, 0, 0)]


attend_2_form = rt.Form(sweeps=(rt.Sweep(attend_2_mask, visits=attend_2_visits, decode=attend_2_decode_visits),))


# ---- 2. Kernels -----------------------------------------------------------------------------------------------------


@rt.jit
def attend_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (last_step.spat:4)"""
    return k <= q


@rt.jit
def attend_keys_0(q_first, q_last, h, length):
    """Keys that rows q_first..q_last may see: [first, end), all of them visible in [full_first, full_end)."""
    first = 0
    end = q_last + 1
    full_first = 0
    full_end = q_first + 1
    return first, end, full_first, full_end


@rt.jit
def attend_visit_keys(h, q_first, q_last, keys, C):
    """The key blocks that rows q_first..q_last may see."""
    o = keys.origin  # positions -> elements of the sequence
    cursor = 0
    first, end, full_first, full_end = attend_keys_0(q_first, q_last, h, keys.length)
    range0, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, keys.count, C.BLOCK_N)
    full = range0.full_end - range0.full_first
    total = range0.end - range0.first
    return rt.RangeVisit(full, total - full, (range0,))


@rt.jit
def attend_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = visit.ranges[0].first + i
        block = rt.jump(block, visit.ranges[0].full_first, visit.ranges[0].full_end)
    else:
        block = visit.ranges[0].full_first + i
    return block


@rt.jit
def attend_span_0(q, length):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = 0
    end = q + 1
    return first, end


@rt.jit
def attend_scores(product, q, k, h, length, C):
    """-> scores, whose product with attend_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def attend_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def attend_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED: tl.constexpr, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = attend_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = attend_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, attend_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def attend_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, attend_block(visit, i, MASKED), C)
        acc0, acc1, m, total = attend_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED, C)
    return acc0, acc1, m, total


@rt.jit
def attend_forward(q, kv, out, lse, call, sink, C):
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
    length = kv_keys.length
    if call.LEAVES:
        if length >= 1024:  # another result answers at this length
            return
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, h, C)
    visit = attend_visit_keys(h, q_first, q_last, kv_keys, C)
    acc0, acc1, m, total = attend_forward_blocks(acc0, acc1, m, total, rows, kv_keys, visit, visit.full_count, False, C)
    acc0, acc1, m, total = attend_forward_blocks(
        acc0, acc1, m, total, rows, kv_keys, visit, visit.partial_count, True, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = rt.at(out, s, h, q_start)
    rt.store_v(rt.token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    rt.store_row_values(rt.at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * rt.LN2, C)


@rt.jit
def attend_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    return block


@rt.jit
def attend_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, C):
    """Visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = rt.block_of(keys, attend_decode_number(ranges, i), C)
        acc0, acc1, m, total = attend_forward_step(acc0, acc1, m, total, rows, keys, block, True, C)
    return acc0, acc1, m, total


@rt.jit
def attend_decode(q, kv, partial, partial_lse, call, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    kv_keys = rt.sequence_keys(kv, s, h, call, C)
    length = kv_keys.length
    if call.LEAVES:
        if length >= 1024:  # another result answers at this length
            row = tl.arange(0, C.BLOCK_M)
            empty = tl.full((C.BLOCK_M,), float("-inf"), C.ACC)
            own_lse = rt.at(partial_lse, s, h, split)
            tl.store(own_lse.data + row.to(tl.int64) * own_lse.head, empty, mask=row < C.GROUP)
            return
    position = length - 1  # of the one query
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = rt.load_qk(rt.at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = rt.Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    cursor = 0
    first, end = attend_span_0(position, length)
    range0, cursor = rt.to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = attend_decode_blocks(acc0, acc1, m, total, rows, kv_keys, (range0,), first, end, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = rt.at(partial, s, h, split)
    rt.store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = rt.at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


@rt.jit
def attend_2_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (last_step.spat:5)"""
    return (k <= q) & ((k < 4) | (q - k < 512))


@rt.jit
def attend_2_keys_0(q_first, q_last, h, length):
    """Keys that rows q_first..q_last may see: [first, end), all of them visible in [full_first, full_end)."""
    first = 0
    end = tl.minimum(4, q_last + 1)
    full_first = 0
    full_end = tl.minimum(4, q_first + 1)
    return first, end, full_first, full_end


@rt.jit
def attend_2_keys_1(q_first, q_last, h, length):
    """Keys that rows q_first..q_last may see: [first, end), all of them visible in [full_first, full_end)."""
    first = tl.maximum(0, q_first - 511)
    end = q_last + 1
    full_first = tl.maximum(0, q_last - 511)
    full_end = q_first + 1
    return first, end, full_first, full_end


@rt.jit
def attend_2_visit_keys(h, q_first, q_last, keys, C):
    """The key blocks that rows q_first..q_last may see."""
    o = keys.origin  # positions -> elements of the sequence
    cursor = 0
    first, end, full_first, full_end = attend_2_keys_0(q_first, q_last, h, keys.length)
    range0, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, keys.count, C.BLOCK_N)
    first, end, full_first, full_end = attend_2_keys_1(q_first, q_last, h, keys.length)
    range1, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, keys.count, C.BLOCK_N)
    full = range0.full_end - range0.full_first + range1.full_end - range1.full_first
    total = range0.end - range0.first + range1.end - range1.first
    return rt.RangeVisit(full, total - full, (range0, range1))


@rt.jit
def attend_2_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = visit.ranges[0].first + i
        block = rt.jump(block, visit.ranges[0].full_first, visit.ranges[0].full_end)
        block = rt.jump(block, visit.ranges[0].end, visit.ranges[1].first)
        block = rt.jump(block, visit.ranges[1].full_first, visit.ranges[1].full_end)
    else:
        block = visit.ranges[0].full_first + i
        block = rt.jump(block, visit.ranges[0].full_end, visit.ranges[1].full_first)
    return block


@rt.jit
def attend_2_span_0(q, length):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = 0
    end = tl.minimum(4, q + 1)
    return first, end


@rt.jit
def attend_2_span_1(q, length):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = tl.maximum(0, q - 511)
    end = q + 1
    return first, end


@rt.jit
def attend_2_scores(product, q, k, h, length, C):
    """-> scores, whose product with attend_2_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def attend_2_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def attend_2_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED: tl.constexpr, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = attend_2_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = attend_2_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, attend_2_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def attend_2_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, attend_2_block(visit, i, MASKED), C)
        acc0, acc1, m, total = attend_2_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED, C)
    return acc0, acc1, m, total


@rt.jit
def attend_2_forward(q, kv, out, lse, call, sink, C):
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
    length = kv_keys.length
    if call.LEAVES:
        if length < 1024:  # another result answers at this length
            return
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, h, C)
    visit = attend_2_visit_keys(h, q_first, q_last, kv_keys, C)
    acc0, acc1, m, total = attend_2_forward_blocks(
        acc0, acc1, m, total, rows, kv_keys, visit, visit.full_count, False, C
    )
    acc0, acc1, m, total = attend_2_forward_blocks(
        acc0, acc1, m, total, rows, kv_keys, visit, visit.partial_count, True, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = rt.at(out, s, h, q_start)
    rt.store_v(rt.token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    rt.store_row_values(rt.at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * rt.LN2, C)


@rt.jit
def attend_2_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    block = rt.jump(block, ranges[0].end, ranges[1].first)
    return block


@rt.jit
def attend_2_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, C):
    """Visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = rt.block_of(keys, attend_2_decode_number(ranges, i), C)
        acc0, acc1, m, total = attend_2_forward_step(acc0, acc1, m, total, rows, keys, block, True, C)
    return acc0, acc1, m, total


@rt.jit
def attend_2_decode(q, kv, partial, partial_lse, call, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    kv_keys = rt.sequence_keys(kv, s, h, call, C)
    length = kv_keys.length
    if call.LEAVES:
        if length < 1024:  # another result answers at this length
            row = tl.arange(0, C.BLOCK_M)
            empty = tl.full((C.BLOCK_M,), float("-inf"), C.ACC)
            own_lse = rt.at(partial_lse, s, h, split)
            tl.store(own_lse.data + row.to(tl.int64) * own_lse.head, empty, mask=row < C.GROUP)
            return
    position = length - 1  # of the one query
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = rt.load_qk(rt.at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = rt.Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    cursor = 0
    first, end = attend_2_span_0(position, length)
    range0, cursor = rt.to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    first, end = attend_2_span_1(position, length)
    range1, cursor = rt.to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first + range1.end - range1.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = attend_2_decode_blocks(acc0, acc1, m, total, rows, kv_keys, (range0, range1), first, end, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = rt.at(partial, s, h, split)
    rt.store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = rt.at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


# ---- 3. Launches ----------------------------------------------------------------------------------------------------


@MODULE.tuned
def attend_kernel_forward(
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
        attend_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def attend_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the visited blocks."""
    batch, heads = q.shape[:2]
    v_dim = keys[0][1].shape[3]
    group = min(heads // k.shape[1] for k, _ in keys)
    config = rt.decode_config(q, v_dim, group, paged)
    visited = rt.most_visited(attend_decode_visits, layout.keys, paged.capacity)
    splits = rt.split_count(batch * (heads // group), visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        attend_decode, (batch, heads // group, splits),
        rt.strided(q), rt.source(q, *keys[0], batch, layout, paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout),
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group, splits, rt.page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


@MODULE.tuned
def attend_2_kernel_forward(
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
        attend_2_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def attend_2_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the visited blocks."""
    batch, heads = q.shape[:2]
    v_dim = keys[0][1].shape[3]
    group = min(heads // k.shape[1] for k, _ in keys)
    config = rt.decode_config(q, v_dim, group, paged)
    visited = rt.most_visited(attend_2_decode_visits, layout.keys, paged.capacity)
    splits = rt.split_count(batch * (heads // group), visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        attend_2_decode, (batch, heads // group, splits),
        rt.strided(q), rt.source(q, *keys[0], batch, layout, paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout),
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group, splits, rt.page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


# ---- 4. Operators ---------------------------------------------------------------------------------------------------


def attend_keys(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k, v)]


def attend_2_keys(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k, v)]


# ---- 5. Public functions --------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a call computes with; choices as membership maps with their first row tile."""

    q: Tensor
    k: Tensor
    v: Tensor


ARGUMENTS = rt.Arguments(queries=(rt.QueryArgument("q"),), streams=(rt.StreamArgument("kv", "k", "v", "q"),))


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, phase: str = "decode",
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None, lengths: Tensor | None = None, side: str = "left", q_offset: int | None = None,
    k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """What the pattern means: dense, in float64, every pair of query and key tested.

    Arguments as of `decode`, for whole sequences. phase: "decode" makes every row the last token of its
    sequence, "prefill" takes the results of that phase.
    """
    rt.expect_phase(phase, PHASES)
    inputs = rt.checked(ARGUMENTS, Inputs(q, k, v), phase, return_lse, cast=False)
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k, options)
    return rt.reference_in(phase, _reference, ARGUMENTS, inputs, None, layout, return_lse)


def _reference(inputs: Inputs, gates: Tensor | None, layout: rt.Layout, return_lse: bool) -> Any:
    """The float64 meaning in every phase."""
    inputs = rt.prepared(ARGUMENTS, inputs, layout)

    rows = inputs.q.shape[2]
    length = rt.length_of(inputs.q, inputs.k, layout)
    pending: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    condition = length < 1024
    known = rt.known(condition)
    if known is not False:
        attend_part = attend_dense(inputs, layout)
        if known:
            return rt.finish(attend_part, return_lse)
        pending.append((condition, attend_part))
    attend_2_part = attend_2_dense(inputs, layout)
    return rt.finish(rt.settle(pending, attend_2_part, layout, rows), return_lse)


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
        streams = {"kv": rt.StreamShape(kv_heads, qk_dim, v_dim)}
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
def decode(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, *, return_lse: bool = False, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, rows: Sequence[int] | Tensor | None = None,
    side: str = "left", scale: float | None = None,
) -> Any:  # fmt: skip
    """One step of generation: like `prefill` with one new token for each sequence, or for those of `rows`."""
    inputs = Inputs(q, k, v)
    brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
    inputs, own, layout, done = rt.step(ARGUMENTS, inputs, "decode", cache, Cache, return_lse, brought, scale)
    rows = inputs.q.shape[2]
    length = rt.length_of(inputs.q, inputs.k, layout)
    pending: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    condition = length < 1024
    known = rt.known(condition)
    if known is not False:
        attend_part = attend_cached(inputs, own, layout)
        if known:
            return rt.answer(rt.merged_part(attend_part), done, return_lse)
        pending.append((condition, rt.merged_part(attend_part)))
    attend_2_part = attend_2_cached(inputs, own, layout)
    return rt.answer(rt.settle(pending, rt.merged_part(attend_2_part), layout, rows), done, return_lse)


@MODULE.step
@torch.no_grad()
def attend_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
    max_seqlen_q: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of packed queries [T, heads, dim] over pages [pages, page, heads, dim] that hold the keys already.

    Request r has queries cu_seqlens_q[r] to cu_seqlens_q[r + 1], the last one at seq_lens[r] - 1, and its pages in
    block_table[r]. max_seqlen_q: the most queries of a request. -> out [T, heads, dim], lse [T, heads].
    scale: as in `attention`.
    """
    inputs, own, layout, requests = rt.from_pages(
        ARGUMENTS, Inputs(q, k_pages, v_pages), "decode", block_table, seq_lens, cu_seqlens_q, max_seqlen_q, scale
    )
    rows = inputs.q.shape[2]
    length = rt.length_of(inputs.q, inputs.k, layout)
    pending: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    condition = length < 1024
    known = rt.known(condition)
    if known is not False:
        attend_part = attend_cached(inputs, own, layout)
        if known:
            return rt.unpacked(rt.merged_part(attend_part), requests)
        pending.append((condition, rt.merged_part(attend_part)))
    attend_2_part = attend_2_cached(inputs, own, layout)
    return rt.unpacked(rt.settle(pending, rt.merged_part(attend_2_part), layout, rows), requests)


def example_inputs(
    batch: int, tokens: int, *, heads: int = 8, kv_heads: int = 2, qk_dim: int = 64, v_dim: int = 64,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Random arguments for `attention`: token tensors rise in steps, flags are rare, given lists hold near units."""
    sizes = rt.Sizes(heads, kv_heads, qk_dim, v_dim)
    return rt.example_arguments(ARGUMENTS, batch, tokens, sizes, dtype, device)


def __getattr__(name: str) -> object:
    """A phase that no result of the pattern covers says so."""
    if name in {"attention", "prefill"}:
        raise AttributeError(f"last_step has no `{name}`: no `return` of the pattern covers that phase")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attend_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of attend."""
    q = inputs.q
    return rt.dense_attention(attend_form, q, attend_keys(q, inputs.k, inputs.v), layout, None)


def attend_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """attend of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["kv"], own.v["kv"])]
    if rt.uses_kernels(q):
        run = attend_kernel_decode if rt.is_step(q, layout) else attend_kernel_forward
        return run(q, keys, layout, paged=rt.paged_of(own))
    return rt.cached_attention(attend_form, q, keys, own, layout, None)


def attend_2_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of attend_2."""
    q = inputs.q
    return rt.dense_attention(attend_2_form, q, attend_2_keys(q, inputs.k, inputs.v), layout, None)


def attend_2_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """attend_2 of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["kv"], own.v["kv"])]
    if rt.uses_kernels(q):
        run = attend_2_kernel_decode if rt.is_step(q, layout) else attend_2_kernel_forward
        return run(q, keys, layout, paged=rt.paged_of(own))
    return rt.cached_attention(attend_2_form, q, keys, own, layout, None)
