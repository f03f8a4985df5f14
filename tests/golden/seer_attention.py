# Made by spdsl 0.1.0 from seer_attention.spat, pattern seer_attention, source sha256 60e5442126b8fe95.
"""SeerAttention (arXiv 2410.13276): a learned gate chooses tiles of 64 x 64 for each head at prefill; here the caller
runs the gate and passes its tiles. Training returns what the gate is distilled from: the attention map, max-pooled
to tiles. The published target is that map with each row divided by its sum: pooled / pooled.sum(-1, keepdim=True).

    pattern seer_attention {
        param  block = 64
        causal
        chosen = given(unit = block, rows = block, share = head)
        own    = last(1, unit = block, rows = block)
        full   = attend(all)
        return full, pool(mass(full), rows = max(block), unit = max(block)) if train
        return attend(chosen | own) if prefill
        return full
    }

    import seer_attention
    out = seer_attention.attention(q, k, v)
    cache = seer_attention.Cache(batch, capacity, ...)
    out = seer_attention.prefill(q, k, v, chosen, cache)
    out = seer_attention.decode(q, k, v, cache)

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

PATTERN = "seer_attention"
PARAMS = {"block": 64}
PHASES = ("train", "prefill", "decode")
MODULE = rt.Module(
    __name__, PATTERN, PARAMS, "e1a4ac00ec4c32902bb5c76ddec8feb56dcbe3d745181aab818dd5dbb7efe0e6", runtime=4
)
tune, tuning, use_tables = MODULE.tune, MODULE.tuning, rt.use_tables


# ---- 1. What the pattern says ---------------------------------------------------------------------------------------


def full_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return k <= q


def full_visits(q_first: int, q_last: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that rows q_first..q_last may see for any head: (first, end, full_first, full_end)."""
    return [(0, q_last + 1, 0, q_first + 1)]


def full_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(0, q + 1, 0, 0)]


full_form = rt.Form(sweeps=(rt.Sweep(full_mask, visits=full_visits, decode=full_decode_visits),))


class AttendReads(NamedTuple):
    """What the sets of attend look up, batch first."""

    chosen: Tensor
    chosen_first: Tensor  # [S, 1, 1, 1]: the row tile that a sequence's map starts with
    chosen_group: int  # query heads per set


def attend_mask(q: Tensor, k: Tensor, h: Tensor, length: int, t: AttendReads) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return (k <= q) & (
        ((k >= 64 * (q // 64)) & (k - 64 * (q // 64) < 64))
        | (rt.read(t.chosen, h // t.chosen_group, q // 64 - t.chosen_first, k // 64) != 0)
    )


def attend_tiles(tiles: rt.Tiles, h: Tensor, t: AttendReads) -> tuple[Tensor, Tensor]:
    """Tiles in which some pair may be visible, and tiles in which every pair must be: [S, H, tiles, blocks]."""
    q_first, q_last, k_first, k_last, length = tiles[:5]
    chosen_qk_low, chosen_qk_high = rt.pooled(
        t.chosen,
        h // t.chosen_group,
        (tiles.q_first // 64 - t.chosen_first, tiles.q_last // 64 - t.chosen_first),
        (tiles.k_first // 64, tiles.k_last // 64),
    )
    k = tiles.k_first  # a shape for tests that hold always or never
    may = (k_first <= q_last) & (
        ((64 * (q_first // 64) <= k_last) & (k_first - 64 * (q_last // 64) < 64))
        | (chosen_qk_high > 0)
        | (chosen_qk_low < 0)
    )
    must = (k_last <= q_first) & (
        ((64 * (q_last // 64) <= k_first) & (k_last - 64 * (q_first // 64) < 64))
        | (chosen_qk_low > 0)
        | (chosen_qk_high < 0)
    )
    shape = torch.broadcast_shapes(may.shape, must.shape, tiles.inside.shape)
    return may.expand(shape), must.expand(shape)


def attend_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(0, q + 1, 0, 0), (max(0, 64 * (q // 64)), q + 1, 0, 0)]


def attend_reads(heads: int, chosen, chosen_first) -> AttendReads:
    return AttendReads(
        chosen, chosen_first.view(-1, 1, 1, 1), heads // chosen.shape[1],
    )  # fmt: skip


def attend_reads_of(t: AttendReads, s: slice, keys: slice | None) -> AttendReads:
    """The part of sequences s; token axes are cut to `keys`."""

    def rows(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[s]

    return t._replace(
        chosen=rows(t.chosen), chosen_first=rows(t.chosen_first),
    )  # fmt: skip


def attend_tensors(t: AttendReads, sequences: int) -> AttendTensors:
    """The same for kernels."""

    def sequence(x: Tensor) -> int:
        return 0 if x.shape[0] == 1 else x.stride(0)

    return AttendTensors(
        t.chosen, sequence(t.chosen), t.chosen_first.int().expand(sequences, 1, 1, 1).reshape(-1).contiguous(),
        t.chosen_group, t.chosen.shape[2], t.chosen.shape[3],
    )  # fmt: skip


attend_form = rt.Form(
    sweeps=(rt.Sweep(attend_mask, tiles=attend_tiles, decode=attend_decode_visits),), reads_of=attend_reads_of
)


# ---- 2. Kernels -----------------------------------------------------------------------------------------------------


@rt.jit
def full_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (seer_attention.spat:9)"""
    return k <= q


@rt.jit
def full_keys_0(q_first, q_last, h, length):
    """Keys that rows q_first..q_last may see: [first, end), all of them visible in [full_first, full_end)."""
    first = 0
    end = q_last + 1
    full_first = 0
    full_end = q_first + 1
    return first, end, full_first, full_end


@rt.jit
def full_rows_0(k_first, k_last, h, length, q_begin, q_end):
    """Rows of [q_begin, q_end) that may see keys k_first..k_last."""
    first = tl.maximum(k_first, q_begin)
    end = q_end
    full_first = tl.maximum(k_last, q_begin)
    full_end = q_end
    return first, end, full_first, full_end


@rt.jit
def full_visit_keys(h, q_first, q_last, keys, C):
    """The key blocks that rows q_first..q_last may see."""
    o = keys.origin  # positions -> elements of the sequence
    cursor = 0
    first, end, full_first, full_end = full_keys_0(q_first, q_last, h, keys.length)
    range0, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, keys.count, C.BLOCK_N)
    full = range0.full_end - range0.full_first
    total = range0.end - range0.first
    return rt.RangeVisit(full, total - full, (range0,))


@rt.jit
def full_visit_rows(rows, k_first, k_last, length, C):
    """The row tiles that may see keys k_first..k_last."""
    o = rows.origin
    stop = rows.origin + rows.count
    cursor = 0
    first, end, full_first, full_end = full_rows_0(k_first, k_last, rows.head, length, o, stop)
    range0, cursor = rt.to_blocks(first - o, end - o, full_first - o, full_end - o, cursor, rows.count, C.BLOCK_M)
    full = range0.full_end - range0.full_first
    total = range0.end - range0.first
    return rt.RangeVisit(full, total - full, (range0,))


@rt.jit
def full_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = visit.ranges[0].first + i
        block = rt.jump(block, visit.ranges[0].full_first, visit.ranges[0].full_end)
    else:
        block = visit.ranges[0].full_first + i
    return block


@rt.jit
def full_span_0(q, length):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = 0
    end = q + 1
    return first, end


@rt.jit
def full_scores(product, q, k, h, length, C):
    """-> scores, whose product with full_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def full_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def full_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED: tl.constexpr, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = full_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = full_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, full_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def full_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, full_block(visit, i, MASKED), C)
        acc0, acc1, m, total = full_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED, C)
    return acc0, acc1, m, total


@rt.jit
def full_forward(q, kv, out, lse, call, sink, C):
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
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, h, C)
    visit = full_visit_keys(h, q_first, q_last, kv_keys, C)
    acc0, acc1, m, total = full_forward_blocks(acc0, acc1, m, total, rows, kv_keys, visit, visit.full_count, False, C)
    acc0, acc1, m, total = full_forward_blocks(acc0, acc1, m, total, rows, kv_keys, visit, visit.partial_count, True, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = rt.at(out, s, h, q_start)
    rt.store_v(rt.token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    rt.store_row_values(rt.at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * rt.LN2, C)


# Backward:  p = exp(s - lse),  dp = dout . v,  delta = sum(dout * out) - dlse,  ds = p * (dp - delta)
#            dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout
# lse and delta are arguments: with those of a joint softmax this is the gradient of one branch of it.


@rt.jit
def full_dq_step(dq0, dq1, rows, grads, keys, block, MASKED: tl.constexpr, C):
    """Adds ds k of one block."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, slope = full_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = full_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * full_unit(C) - grads.lse)

    v0, v1 = rt.load_values(keys, block, MASKED, C)
    dp = rt.dot_rows(grads.dout0, grads.dout1, v0, v1, C.V1, C)
    ds = (p * (dp - grads.delta) * slope).to(k0.dtype)
    dq0, dq1 = rt.dot_columns(ds, k0, k1, dq0, dq1, C.QK1, C)
    return dq0, dq1


@rt.jit
def full_dq_blocks(dq0, dq1, rows, grads, keys, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, full_block(visit, i, MASKED), C)
        dq0, dq1 = full_dq_step(dq0, dq1, rows, grads, keys, block, MASKED, C)
    return dq0, dq1


@rt.jit
def full_dq(q, kv, dout, lse, delta, dq, call, C):
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
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    dout = rt.at(dout, s, h, q_start)
    dout0, dout1 = rt.load_v(rt.token_pointer(dout, row), dout.token, left, C.BLOCK_M, True, C)
    row_lse = rt.load_lse(rt.at(lse, s, h, q_start), row, left, C)
    row_delta = rt.load_row_values(rt.at(delta, s, h, q_start), row, left, 0.0, C)
    grads = rt.RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])

    dq0 = rt.zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = rt.zeros(C.BLOCK_M, C.QK1, C.ACC)
    visit = full_visit_keys(h, q_first, q_last, kv_keys, C)
    dq0, dq1 = full_dq_blocks(dq0, dq1, rows, grads, kv_keys, visit, visit.full_count, False, C)
    dq0, dq1 = full_dq_blocks(dq0, dq1, rows, grads, kv_keys, visit, visit.partial_count, True, C)

    dq = rt.at(dq, s, h, q_start)
    rt.store_qk(rt.token_pointer(dq, row), dq.token, left, dq0 * C.SCALE, dq1 * C.SCALE, C.BLOCK_M, C)


@rt.jit
def full_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED: tl.constexpr, C):
    """Adds ds q and p dout of one tile of rows.  All is [keys, rows], so that no dot transposes p or ds."""
    product = rt.dot_rows(keys.k0, keys.k1, tile.q0, tile.q1, C.QK1, C)
    s, slope = full_scores(product, tile.position, keys.position, tile.head, keys.length, C)
    if MASKED:
        seen = full_visible(tile.position, keys.position, tile.head, keys.length)
        seen = seen & (keys.position < keys.end)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * full_unit(C) - rt.load_tile_lse(tile)[None, :])

    dout0, dout1 = rt.load_dout(tile, MASKED, C)
    dv0, dv1 = rt.dot_columns(p.to(dout0.dtype), dout0, dout1, dv0, dv1, C.V1, C)

    dp = rt.dot_rows(keys.v0, keys.v1, dout0, dout1, C.V1, C)
    ds = p * (dp - rt.load_tile_delta(tile)[None, :]) * slope
    ds = ds.to(tile.q0.dtype)
    dk0, dk1 = rt.dot_columns(ds, tile.q0, tile.q1, dk0, dk1, C.QK1, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def full_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, count, MASKED: tl.constexpr, C):
    for i in tl.range(0, count, disable_licm=True):
        tile = rt.tile_of_rows(rows, full_block(visit, i, MASKED) * C.BLOCK_M, MASKED, C)
        dk0, dk1, dv0, dv1 = full_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, MASKED, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def full_dkdv(q, source, dout, lse, delta, dk, dv, call, C):
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
        visit = full_visit_rows(rows, k_first, k_last, keys.length, C)
        dk0, dk1, dv0, dv1 = full_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.full_count, False, C)
        dk0, dk1, dv0, dv1 = full_dkdv_tiles(dk0, dk1, dv0, dv1, keys, rows, visit, visit.partial_count, True, C)

    dk = rt.at(dk, s, kv_head, k_start)
    dv = rt.at(dv, s, kv_head, k_start)
    rt.store_qk(rt.token_pointer(dk, key), dk.token, left, dk0 * C.SCALE, dk1 * C.SCALE, C.BLOCK_N, C)
    rt.store_v(rt.token_pointer(dv, key), dv.token, left, dv0, dv1, C.BLOCK_N, C)


@rt.jit
def full_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    return block


@rt.jit
def full_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, C):
    """Visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = rt.block_of(keys, full_decode_number(ranges, i), C)
        acc0, acc1, m, total = full_forward_step(acc0, acc1, m, total, rows, keys, block, True, C)
    return acc0, acc1, m, total


@rt.jit
def full_decode(q, kv, partial, partial_lse, call, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    kv_keys = rt.sequence_keys(kv, s, h, call, C)
    length = kv_keys.length
    position = length - 1  # of the one query
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = rt.load_qk(rt.at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = rt.Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    cursor = 0
    first, end = full_span_0(position, length)
    range0, cursor = rt.to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = full_decode_blocks(acc0, acc1, m, total, rows, kv_keys, (range0,), first, end, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = rt.at(partial, s, h, split)
    rt.store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = rt.at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


class AttendTensors(NamedTuple):
    """What attend reads: pointers, strides in elements, sizes."""

    chosen: Tensor
    chosen_sequence: int
    chosen_first: Tensor  # int32 [S]: the row tile of a sequence's first list
    chosen_group: int
    chosen_tiles: int
    chosen_units: int


@rt.jit
def attend_of_sequence(t, s, spans):
    """The tensors of sequence s; packed sequences share a batch row and start at their first key."""
    start, _ = rt.span(spans, s, 0)
    s = tl.cast(s, tl.int64)
    return AttendTensors(
        t.chosen + s * t.chosen_sequence, t.chosen_sequence,
        tl.load(t.chosen_first + s), t.chosen_group, t.chosen_tiles, t.chosen_units,
    )  # fmt: skip


@rt.jit
def attend_visible(q, k, h, length, t):
    """May the row at position q see the key at position k?  (seer_attention.spat:11)"""
    return (k <= q) & (
        ((k >= 64 * rt.floor_div(q, 64)) & (k - 64 * rt.floor_div(q, 64) < 64))
        | (
            rt.member(
                t.chosen,
                h // t.chosen_group,
                rt.floor_div(q, 64) - t.chosen_first,
                k,
                64,
                t.chosen_tiles,
                t.chosen_units,
            )
            != 0
        )
    )


@rt.jit
def attend_block(visit, i, MASKED: tl.constexpr):
    """Number of the i-th partial (MASKED) or full block."""
    if MASKED:
        block = tl.load(visit.partial + i)
    else:
        block = tl.load(visit.full + i)
    return block


@rt.jit
def attend_span_0(q, length, t):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = 0
    end = q + 1
    return first, end


@rt.jit
def attend_span_1(q, length, t):
    """Keys that a query at position q may see, whatever its head: [first, end)."""
    first = tl.maximum(0, 64 * rt.floor_div(q, 64))
    end = q + 1
    return first, end


@rt.jit
def attend_scores(product, q, k, h, length, t, C):
    """-> scores, whose product with attend_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def attend_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def attend_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED: tl.constexpr, t, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = attend_scores(product, rows.position, block.position, rows.head, keys.length, t, C)
    if MASKED:
        seen = attend_visible(rows.position, block.position, rows.head, keys.length, t)
        seen = seen & rt.keys_there(keys, block)
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, attend_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def attend_forward_blocks(acc0, acc1, m, total, rows, keys, visit, count, MASKED: tl.constexpr, t, C):
    for i in tl.range(0, count, disable_licm=True):
        block = rt.block_of(keys, attend_block(visit, i, MASKED), C)
        acc0, acc1, m, total = attend_forward_step(acc0, acc1, m, total, rows, keys, block, MASKED, t, C)
    return acc0, acc1, m, total


@rt.jit
def attend_forward(q, kv, out, lse, call, sink, kv_lists, t, C):
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
    t = attend_of_sequence(t, s, kv.spans)
    rows = rt.load_rows(rt.at(q, s, h, q_start), row, left, q_first, h, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(sink, h, C)
    visit = rt.visit_lists(kv_lists, s, h, tile)
    acc0, acc1, m, total = attend_forward_blocks(
        acc0, acc1, m, total, rows, kv_keys, visit, visit.full_count, False, t, C
    )
    acc0, acc1, m, total = attend_forward_blocks(
        acc0, acc1, m, total, rows, kv_keys, visit, visit.partial_count, True, t, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    out = rt.at(out, s, h, q_start)
    rt.store_v(rt.token_pointer(out, row), out.token, left, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    rt.store_row_values(rt.at(lse, s, h, q_start), row, left, (m + tl.log2(total)) * rt.LN2, C)


@rt.jit
def attend_decode_number(ranges, i):
    """Number of the i-th visited block."""
    block = ranges[0].first + i
    block = rt.jump(block, ranges[0].end, ranges[1].first)
    return block


@rt.jit
def attend_decode_blocks(acc0, acc1, m, total, rows, keys, ranges, first, end, t, C):
    """Visited blocks first..end - 1; the rows are the heads of a group, all at one position."""
    for i in tl.range(first, end, disable_licm=True):
        block = rt.block_of(keys, attend_decode_number(ranges, i), C)
        seen = attend_visible(rows.position, block.position, rows.head, keys.length, t) & rt.keys_there(keys, block)
        if tl.max(seen.to(tl.int32)) > 0:  # blocks that the tensors leave out are not loaded
            acc0, acc1, m, total = attend_forward_step(acc0, acc1, m, total, rows, keys, block, True, t, C)
    return acc0, acc1, m, total


@rt.jit
def attend_decode(q, kv, partial, partial_lse, call, t, C):
    """One program: the heads of one group of one sequence against an equal share of the visited blocks."""
    s, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = group * C.GROUP
    kv_keys = rt.sequence_keys(kv, s, h, call, C)
    length = kv_keys.length
    position = length - 1  # of the one query
    t = attend_of_sequence(t, s, None)
    row = tl.arange(0, C.BLOCK_M)
    q0, q1 = rt.load_qk(rt.at(q, s, h, 0).data, q.head, C.GROUP, C.BLOCK_M, True, C)
    # Padding rows borrow the last head, so that what the pattern reads for a head stays in bounds.
    rows = rt.Rows(q0, q1, position, h + tl.minimum(row, C.GROUP - 1)[:, None])

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    cursor = 0
    first, end = attend_span_0(position, length, t)
    range0, cursor = rt.to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    first, end = attend_span_1(position, length, t)
    range1, cursor = rt.to_blocks(first, end, first, first, cursor, kv_keys.count, C.BLOCK_N)
    visited = range0.end - range0.first + range1.end - range1.first
    first = visited * split // C.SPLITS  # an equal share of the blocks of all ranges in a row
    end = visited * (split + 1) // C.SPLITS
    acc0, acc1, m, total = attend_decode_blocks(acc0, acc1, m, total, rows, kv_keys, (range0, range1), first, end, t, C)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    partial = rt.at(partial, s, h, split)
    rt.store_v(partial.data, partial.head, C.GROUP, acc0 / divisor, acc1 / divisor, C.BLOCK_M, C)
    partial_lse = rt.at(partial_lse, s, h, split)
    tl.store(partial_lse.data + row.to(tl.int64) * partial_lse.head, m + tl.log2(total), mask=row < C.GROUP)


# ---- 3. Launches ----------------------------------------------------------------------------------------------------


@MODULE.tuned
def full_kernel_forward(
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
        full_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def full_kernel_backward(
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
        full_dq, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), *sources, *rows, rt.strided(dq, sequences), call,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    config = rt.config_for("dkdv", q, v_dim)
    k, (dk, dv) = keys[0][0], grads[0]
    group = q.shape[1] // k.shape[1]
    longest = k.shape[2] if layout.k_spans is None else min(layout.longest, k.shape[2])
    rt.launch(
        full_dkdv, (triton.cdiv(longest, config.block_n), k.shape[1], sequences),
        rt.strided(q, sequences), sources[0], *rows, rt.strided(dk, sequences), rt.strided(dv, sequences), call,
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, grads


@MODULE.tuned
def full_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the visited blocks."""
    batch, heads = q.shape[:2]
    v_dim = keys[0][1].shape[3]
    group = min(heads // k.shape[1] for k, _ in keys)
    config = rt.decode_config(q, v_dim, group, paged)
    visited = rt.most_visited(full_decode_visits, layout.keys, paged.capacity)
    splits = rt.split_count(batch * (heads // group), visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        full_decode, (batch, heads // group, splits),
        rt.strided(q), rt.source(q, *keys[0], batch, layout, paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout),
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group, splits, rt.page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


def attend_lists(
    q: Tensor,
    keys: Sequence[tuple[Tensor, Tensor]],
    layout: rt.Layout,
    most_keys: int,
    config: rt.Config,
    t: AttendReads,
    longest: int,
) -> dict[str, tuple[rt.BlockLists, rt.BlockLists]]:
    """For each stream with a tile map: key blocks of every row tile, and row tiles of every key block."""
    heads = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    lists = {}
    k = keys[0][0]
    sizes = (-(-layout.longest // config.block_m), config.block_m, -(-most_keys // config.block_n), config.block_n)
    tiles = rt.tiles_of(*rt.sequence_counts(q, k, layout), sizes)
    may, must = attend_tiles(tiles, heads, attend_reads_per_sequence(t, layout, longest))
    lists["kv"] = rt.block_lists(may, must, tiles, q.shape[1])
    return lists


def attend_reads_per_sequence(t: AttendReads, layout: rt.Layout, longest: int) -> AttendReads:
    """Token axes start at each sequence's first key, of which there are `longest` or less."""
    return t


@MODULE.tuned
def attend_kernel_forward(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, t: AttendReads, paged: rt.Paged | None = None
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Rows in no sequence keep out = 0, lse = -inf."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    v_dim = keys[0][1].shape[3]
    out, lse = rt.empty_rows(q, v_dim)
    config = rt.config_for("forward", q, v_dim, paged, listed=True)
    q = rt.rows_contiguous(q)
    C = rt.constants(q, v_dim, rt.scale_of(q, layout), config, page=rt.page_of(paged))
    lists = attend_lists(
        q,
        keys,
        layout,
        paged.capacity if paged else keys[0][0].shape[2],
        config,
        t,
        paged.capacity if paged else layout.longest,
    )
    rt.launch(
        attend_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences),
        rt.strided(q, sequences), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(out, sequences), rt.strided(lse, sequences), rt.call_of(q, layout), None,
        lists["kv"][0],
        attend_tensors(t, sequences),
        C, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@MODULE.tuned
def attend_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, t: AttendReads, paged: rt.Paged
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
        attend_tensors(t, batch),
        rt.constants(q, v_dim, rt.scale_of(q, layout), config, group, splits, rt.page_of(paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


# ---- 4. Operators ---------------------------------------------------------------------------------------------------


def full_keys(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k, v)]


def full_forward_of(q: Tensor, k: Tensor, v: Tensor, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """-> out, lse"""
    keys = full_keys(q, k, v)
    if rt.uses_kernels(q):
        return full_kernel_forward(q, keys, layout)
    return rt.cpu_forward(full_form, q, keys, layout, None)


def full_backward_of(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: rt.Layout
) -> list[Tensor]:
    """-> gradients of q, k, v; out and lse may be those of a joint softmax"""
    given = dout, dlse, q, full_keys(q, k, v), out, lse, layout
    if rt.uses_kernels(q):
        dq, grads = full_kernel_backward(*given)
    else:
        dq, grads = rt.cpu_backward(full_form, *given)
    return [dq, *grads[0]]


def attend_keys(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k, v)]


full_forward_op, full_backward_op = rt.attention_operators(
    MODULE, "full", ("q", "k", "v"), (),
    full_keys, full_forward_of, full_backward_of
)  # fmt: skip


# ---- 5. Public functions --------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a call computes with; choices as membership maps with their first row tile."""

    q: Tensor
    k: Tensor
    v: Tensor
    chosen: Tensor | None = None
    chosen_first: Tensor | None = None


ARGUMENTS = rt.Arguments(
    queries=(rt.QueryArgument("q"),),
    streams=(rt.StreamArgument("kv", "k", "v", "q"),),
    maps=(rt.GivenArgument("chosen", "head", 64, 64, optional=True),),
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, chosen: Tensor | None = None, return_lse: bool = False,
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None, lengths: Tensor | None = None, side: str = "left", q_offset: int | None = None,
    k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of whole sequences, differentiable.

    q [B, Hq, N, Dqk]; k [B, Hkv, M, Dqk]; v [B, Hkv, M, Dv]; chosen: not read here, may be left out. -> out [B,
    Hq, N, Dv] in the dtype of q.
    return_lse: also the natural-log lse, float32 [B, Hq, N].
    cu_seqlens, max_seqlen: packed sequences, batch 1, tokens cu_seqlens[i] to cu_seqlens[i + 1]; positions restart.
    cu_seqlens_k, max_seqlen_k: their keys, where those are not as many.
    lengths, side: int [B], the real tokens of rows that are padded at the side "left" or "right".
    q_offset, k_offset: positions of the first query and key of a part of a longer sequence; by default the last
        query stands at the last key.
    scale: in place of 1 / sqrt(dim).
    """
    inputs = rt.checked(ARGUMENTS, Inputs(q, k, v, chosen=chosen), "train", return_lse)
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k, options)
    inputs = rt.prepared(ARGUMENTS, inputs, layout)

    full_part = full_forward_op(inputs.q, inputs.k, inputs.v, *layout)
    return rt.finish(full_part, return_lse), _result_1(inputs, layout, full_part[1])


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, chosen: Tensor | None = None, return_lse: bool = False, phase: str = "train",
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None, lengths: Tensor | None = None, side: str = "left", q_offset: int | None = None,
    k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """What the pattern means: dense, in float64, every pair of query and key tested.

    Arguments as of `attention`. phase: "decode" makes every row the last token of its
    sequence, "prefill" takes the results of that phase.
    """
    rt.expect_phase(phase, PHASES)
    inputs = rt.checked(ARGUMENTS, Inputs(q, k, v, chosen=chosen), phase, return_lse, cast=False)
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k, options)
    answer = {"train": _reference_train, "prefill": _reference_prefill, "decode": _reference_decode}.get(phase)
    return rt.reference_in(phase, answer, ARGUMENTS, inputs, None, layout, return_lse)


def _reference_train(inputs: Inputs, gates: Tensor | None, layout: rt.Layout, return_lse: bool) -> Any:
    """The float64 meaning in the phase train."""
    inputs = rt.prepared(ARGUMENTS, inputs, layout)
    inputs = rt.in_float64(ARGUMENTS, inputs)

    full_part = full_dense(inputs, layout)
    return rt.finish(full_part, return_lse), _result_1(inputs, layout, full_part[1])


def _reference_prefill(inputs: Inputs, gates: Tensor | None, layout: rt.Layout, return_lse: bool) -> Any:
    """The float64 meaning in the phase prefill."""
    rt.expect_tensor("chosen", inputs.chosen)
    inputs = rt.prepared(ARGUMENTS, inputs, layout)
    inputs = rt.in_float64(ARGUMENTS, inputs)

    attend_part = attend_dense(inputs, layout)
    return rt.finish(attend_part, return_lse)


def _reference_decode(inputs: Inputs, gates: Tensor | None, layout: rt.Layout, return_lse: bool) -> Any:
    """The float64 meaning in the phase decode."""
    inputs = rt.prepared(ARGUMENTS, inputs, layout)
    inputs = rt.in_float64(ARGUMENTS, inputs)

    full_part = full_dense(inputs, layout)
    return rt.finish(full_part, return_lse)


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
def prefill(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, cache: Cache, *, return_lse: bool = False,
    lengths: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    rows: Sequence[int] | Tensor | None = None, side: str = "left", scale: float | None = None,
) -> Any:  # fmt: skip
    """Appends keys and values of N new tokens per sequence to the cache, and attends from them. Inference only.

    Shapes as in `attention`, of the new tokens alone; call it again for the next chunk. lengths, cu_seqlens,
    max_seqlen, side, scale: as there; rows: the sequences of the cache that the call is for, each once, by default all
    in order. A token without room is dropped: out 0, lse -inf.
    """
    inputs = Inputs(q, k, v, chosen=chosen)
    brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
    inputs, own, layout, done = rt.step(ARGUMENTS, inputs, "prefill", cache, Cache, return_lse, brought, scale)
    attend_part = attend_cached(inputs, own, layout)
    return rt.answer(rt.merged_part(attend_part), done, return_lse)


@rt.cached_call(MODULE, ARGUMENTS, Cache, rt.Result("v.kv"))
@torch.no_grad()
def decode(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, *, chosen: Tensor | None = None, return_lse: bool = False,
    lengths: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    rows: Sequence[int] | Tensor | None = None, side: str = "left", scale: float | None = None,
) -> Any:  # fmt: skip
    """One step of generation: like `prefill` with one new token for each sequence, or for those of `rows`."""
    inputs = Inputs(q, k, v, chosen=chosen)
    brought = rt.Brought(lengths, cu_seqlens, max_seqlen, rows, side)
    inputs, own, layout, done = rt.step(ARGUMENTS, inputs, "decode", cache, Cache, return_lse, brought, scale)
    full_part = full_cached(inputs, own, layout)
    return rt.answer(rt.merged_part(full_part), done, return_lse)


@MODULE.step
@torch.no_grad()
def attend_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *,
    chosen: Tensor | None = None, phase: str, max_seqlen_q: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of packed queries [T, heads, dim] over pages [pages, page, heads, dim] that hold the keys already.

    Request r has queries cu_seqlens_q[r] to cu_seqlens_q[r + 1], the last one at seq_lens[r] - 1, and its pages in
    block_table[r]. max_seqlen_q: the most queries of a request. -> out [T, heads, dim], lse [T, heads].
    scale: as in `attention`.
    phase: how all requests of the call are answered, "prefill" or "decode"; in "decode" none has more than one query.
    """
    rt.expect_phase(phase, ("prefill", "decode"))
    if phase == "decode":
        rt.expect(max_seqlen_q in (None, 1), "max_seqlen_q", '1 in the phase "decode"', max_seqlen_q)
        max_seqlen_q = 1
    inputs, own, layout, requests = rt.from_pages(
        ARGUMENTS,
        Inputs(q, k_pages, v_pages, chosen=chosen),
        phase,
        block_table,
        seq_lens,
        cu_seqlens_q,
        max_seqlen_q,
        scale,
    )
    answer = _answer_prefill if phase == "prefill" else _answer_decode
    return answer(inputs, own, layout, requests)


def _answer_prefill(inputs: Inputs, own: rt.Storage, layout: rt.Layout, requests: Any) -> Any:
    """The results for prefill over pages."""
    rt.expect_tensor("chosen", inputs.chosen)
    attend_part = attend_cached(inputs, own, layout)
    return rt.unpacked(rt.merged_part(attend_part), requests)


def _answer_decode(inputs: Inputs, own: rt.Storage, layout: rt.Layout, requests: Any) -> Any:
    """The results for decode over pages."""
    full_part = full_cached(inputs, own, layout)
    return rt.unpacked(rt.merged_part(full_part), requests)


def example_inputs(
    batch: int, tokens: int, *, heads: int = 8, kv_heads: int = 2, qk_dim: int = 64, v_dim: int = 64,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Random arguments for `attention`: token tensors rise in steps, flags are rare, given lists hold near units."""
    sizes = rt.Sizes(heads, kv_heads, qk_dim, v_dim)
    return rt.example_arguments(ARGUMENTS, batch, tokens, sizes, dtype, device)


def _result_1(inputs: Inputs, layout: rt.Layout, score_lse: Tensor) -> Tensor:
    """full's probabilities: [B, heads, row tiles, units]. Whole sequences of one length only."""
    rt.expect(layout.k_spans is None, "cu_seqlens, lengths", "none where a score is a result", "some")
    rows, lists = (slice(None), slice(None), slice(None)), inputs.q.shape[1]
    corner = score_corner = next(iter(rt.corners(inputs.q, layout)))
    q = inputs.q
    entries = corner.keys.stop - corner.keys.start
    shape = (q.shape[0], q.shape[1], q.shape[2], entries, -(-corner.length // 64), corner.q_origin, corner.length)
    return rt.pooled_scores(
        rt.logits_of(full_form, inputs.q[rows], inputs.k[score_corner.batch, :, score_corner.keys], score_corner),
        score_lse,
        shape,
        rt.Selection(64, 64, rt.Cells(1, 1), lists, None, "max", "max", None, None, 0),
    )


def full_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of full."""
    q = inputs.q
    return rt.dense_attention(full_form, q, full_keys(q, inputs.k, inputs.v), layout, None)


def full_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """full of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["kv"], own.v["kv"])]
    if rt.uses_kernels(q):
        run = full_kernel_decode if rt.is_step(q, layout) else full_kernel_forward
        return run(q, keys, layout, paged=rt.paged_of(own))
    return rt.cached_attention(full_form, q, keys, own, layout, None)


def attend_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of attend."""
    q = inputs.q
    return rt.dense_attention(
        attend_form,
        q,
        attend_keys(q, inputs.k, inputs.v),
        layout,
        None,
        attend_reads(q.shape[1], inputs.chosen, inputs.chosen_first),
    )


def attend_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """attend of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["kv"], own.v["kv"])]
    if rt.uses_kernels(q):
        run = attend_kernel_decode if rt.is_step(q, layout) else attend_kernel_forward
        return run(
            q, keys, layout, attend_reads(q.shape[1], inputs.chosen, inputs.chosen_first), paged=rt.paged_of(own)
        )
    return rt.cached_attention(
        attend_form, q, keys, own, layout, None, attend_reads(q.shape[1], inputs.chosen, inputs.chosen_first)
    )
