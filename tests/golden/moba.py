# Made by spdsl 0.1.0 from moba.spat, pattern moba, source sha256 d57db9ace9036197.
"""Mixture of Block Attention (arXiv 2502.13189): each query head chooses blocks by the mean of their keys. The query's
own block is one of the 12. The numbers are those for a million tokens; at 64k dense attention is faster than 12 of
the 16 blocks, and the paper's numbers for short contexts, `-D block=512 -D count=3`, are faster than both.

    pattern moba {
        param  block = 4096, count = 12
        causal
        allow(W510)                              # slower than dense below some 280k tokens, as it is made for a million
        means  = compress(block, by = mean)
        chosen = top_k(count, score = dot(means), share = head, force = last(1))
        return attend(chosen)
    }

    import moba
    out = moba.attention(q, k, v)
    cache = moba.Cache(batch, capacity, ...)
    out = moba.prefill(q, k, v, cache)
    out = moba.decode(q, k, v, cache)

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

PATTERN = "moba"
PARAMS = {"block": 4096, "count": 12}
PHASES = ("train", "prefill", "decode")
MODULE = rt.Module(
    __name__, PATTERN, PARAMS, "cf9b2b8107eb936a9ad6f754bdb2f48264115e9086ea47659bba54d4656411c8", runtime=4
)
tune, tuning, use_tables = MODULE.tune, MODULE.tuning, rt.use_tables


# ---- 1. What the pattern says ---------------------------------------------------------------------------------------


def ranking_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return q - 4096 * k >= 4095


def ranking_visits(q_first: int, q_last: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that rows q_first..q_last may see for any head: (first, end, full_first, full_end)."""
    return [(0, min((q_last - 4095) // 4096 + 1, length), 0, min((q_first - 4095) // 4096 + 1, length))]


def ranking_decode_visits(q: int, length: int) -> list[tuple[int, int, int, int]]:
    """Keys that a query at position q may see for any head, as ranges (nothing is full)."""
    return [(0, min((q - 4095) // 4096 + 1, length), 0, 0)]


ranking_form = rt.Form(
    sweeps=(rt.Sweep(ranking_mask, visits=ranking_visits, decode=ranking_decode_visits),), cells=rt.Cells(4096, 4096)
)


def attend_mask(q: Tensor, k: Tensor, h: Tensor, length: int) -> Tensor:
    """The element test on tensors: positions q [.., rows, 1], k [.., 1, keys], heads h [H, 1, 1]."""
    return k <= q


attend_form = rt.Form(sweeps=(rt.Sweep(attend_mask),), unit=4096)


# ---- 2. Kernels -----------------------------------------------------------------------------------------------------


@rt.jit
def ranking_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (moba.spat:9)"""
    return q - 4096 * k >= 4095


@rt.jit
def ranking_scores(product, q, k, h, length, C):
    """-> scores, whose product with ranking_unit(C) is in powers of 2; their slope against the scaled product."""
    slope = 1.0
    s = product  # the scale waits in the unit: `s * unit - m` is then one fused multiply-add
    return s, slope


@rt.jit
def ranking_unit(C):
    return C.SCALE * rt.LOG2E


@rt.jit
def attend_visible(q, k, h, length):
    """May the row at position q see the key at position k?  (moba.spat:10)"""
    return k <= q


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
def attend_forward_step(acc0, acc1, m, total, rows, keys, block, chosen, MASKED: tl.constexpr, C):
    """Online softmax over one block: m is the running maximum (base 2), total the sum of exp2(s - m)."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, _ = attend_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = attend_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block) & chosen
        s = tl.where(seen, s, float("-inf"))

    p, decay, m, total = rt.softmax_step(s, attend_unit(C), m, total)
    v0, v1 = rt.load_values(keys, block, MASKED, C)
    acc0, acc1 = rt.add_values(acc0, acc1, p, decay, v0, v1, C)
    return acc0, acc1, m, total


@rt.jit
def attend_forward_units(acc0, acc1, m, total, rows, keys, visit, first, end, U, C):
    """Blocks first..end - 1 of the units of a tile."""
    for i in tl.range(first, end, disable_licm=True):
        block, chosen = rt.unit_block(keys, visit, i, U, C), rt.chose(visit, i, rows.lane[:, None], U, C)
        acc0, acc1, m, total = attend_forward_step(acc0, acc1, m, total, rows, keys, block, chosen, True, C)
    return acc0, acc1, m, total


@rt.jit
def attend_forward(q, kv, partial, partial_lse, call, lists, U, C):
    """One program: queries that chose one unit, one in each row, against its keys."""
    job, list_head = tl.program_id(0), tl.program_id(1)
    entry = tl.cast(list_head, tl.int64) * lists.jobs + job
    s = tl.load(lists.sequence + entry)
    if s < 0:  # there are as many programs as jobs at most
        return
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    h = tl.load(lists.heads + list_head)
    keys = rt.sequence_keys(kv, s, h, call, C)
    pair, inside = rt.load_pairs(lists, list_head, tl.load(lists.begin + entry), tl.load(lists.end + entry), C)
    rows = rt.load_pair_rows(rt.at(q, s, 0, q_start), lists, pair, inside, s, h, rt.row_origin(call, s, q_count), C)
    visit = rt.visit_unit(lists, entry)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    acc0, acc1, m, total = attend_forward_units(
        acc0, acc1, m, total, rows, keys, visit, 0, rt.blocks_until(rows, visit, U, C), U, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    parts = rt.rows_of_parts(rows, pair, list_head)
    rt.store_packed_v(partial, parts, acc0 / divisor, acc1 / divisor, C)
    rt.store_packed_values(partial_lse, parts, m + tl.log2(total), C)


# Backward:  p = exp(s - lse),  dp = dout . v,  delta = sum(dout * out) - dlse,  ds = p * (dp - delta)
#            dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p dout
# lse and delta are arguments: with those of a joint softmax this is the gradient of one branch of it.


@rt.jit
def attend_dq_step(dq0, dq1, rows, grads, keys, block, chosen, MASKED: tl.constexpr, C):
    """Adds ds k of one block."""
    k0, k1 = rt.load_k(keys, block, MASKED, C)
    product = rt.dot_rows(rows.q0, rows.q1, k0, k1, C.QK1, C)
    s, slope = attend_scores(product, rows.position, block.position, rows.head, keys.length, C)
    if MASKED:
        seen = attend_visible(rows.position, block.position, rows.head, keys.length)
        seen = seen & rt.keys_there(keys, block) & chosen
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * attend_unit(C) - grads.lse)

    v0, v1 = rt.load_values(keys, block, MASKED, C)
    dp = rt.dot_rows(grads.dout0, grads.dout1, v0, v1, C.V1, C)
    ds = (p * (dp - grads.delta) * slope).to(k0.dtype)
    dq0, dq1 = rt.dot_columns(ds, k0, k1, dq0, dq1, C.QK1, C)
    return dq0, dq1


@rt.jit
def attend_dq_units(dq0, dq1, rows, grads, keys, visit, end, U, C):
    """Blocks 0..end - 1 of the units of a tile."""
    for i in tl.range(0, end, disable_licm=True):
        block, chosen = rt.unit_block(keys, visit, i, U, C), rt.chose(visit, i, rows.lane[:, None], U, C)
        dq0, dq1 = attend_dq_step(dq0, dq1, rows, grads, keys, block, chosen, True, C)
    return dq0, dq1


@rt.jit
def attend_dq(q, kv, dout, lse, delta, partial, call, lists, U, C):
    """One program: the rows of the forward; their part of dQ."""
    job, list_head = tl.program_id(0), tl.program_id(1)
    entry = tl.cast(list_head, tl.int64) * lists.jobs + job
    s = tl.load(lists.sequence + entry)
    if s < 0:
        return
    q_start, q_count = rt.span(call.q_spans, s, call.q_count)
    h = tl.load(lists.heads + list_head)
    keys = rt.sequence_keys(kv, s, h, call, C)
    pair, inside = rt.load_pairs(lists, list_head, tl.load(lists.begin + entry), tl.load(lists.end + entry), C)
    rows = rt.load_pair_rows(rt.at(q, s, 0, q_start), lists, pair, inside, s, h, rt.row_origin(call, s, q_count), C)
    dout0, dout1 = rt.load_packed_v(rt.at(dout, s, 0, q_start), rows, C)
    row_lse = rt.load_packed_lse(rt.at(lse, s, 0, q_start), rows)
    row_delta = rt.load_packed_values(rt.at(delta, s, 0, q_start), rows, 0.0)
    grads = rt.RowGrads(dout0, dout1, row_lse[:, None], row_delta[:, None])
    visit = rt.visit_unit(lists, entry)

    dq0 = rt.zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = rt.zeros(C.BLOCK_M, C.QK1, C.ACC)
    dq0, dq1 = attend_dq_units(dq0, dq1, rows, grads, keys, visit, rt.blocks_until(rows, visit, U, C), U, C)
    rt.store_packed_qk(partial, rt.rows_of_parts(rows, pair, list_head), dq0 * C.SCALE, dq1 * C.SCALE, C)


@rt.jit
def attend_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, chosen, MASKED: tl.constexpr, C):
    """Adds ds q and p dout of one tile of rows.  All is [keys, rows], so that no dot transposes p or ds."""
    product = rt.dot_rows(keys.k0, keys.k1, tile.q0, tile.q1, C.QK1, C)
    s, slope = attend_scores(product, tile.position, keys.position, tile.head, keys.length, C)
    if MASKED:
        seen = attend_visible(tile.position, keys.position, tile.head, keys.length)
        seen = seen & (keys.position < keys.end) & chosen
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s * attend_unit(C) - rt.load_tile_lse(tile)[None, :])

    dout0, dout1 = rt.load_dout(tile, MASKED, C)
    dv0, dv1 = rt.dot_columns(p.to(dout0.dtype), dout0, dout1, dv0, dv1, C.V1, C)

    dp = rt.dot_rows(keys.v0, keys.v1, dout0, dout1, C.V1, C)
    ds = p * (dp - rt.load_tile_delta(tile)[None, :]) * slope
    ds = ds.to(tile.q0.dtype)
    dk0, dk1 = rt.dot_columns(ds, tile.q0, tile.q1, dk0, dk1, C.QK1, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def attend_dkdv_tiles(
    dk0, dk1, dv0, dv1, keys, q, dout, lse, delta, inverse, begin, end, s, kv_head, part, q_count, q_origin, U, C
):
    """The queries that chose the unit."""
    head = tl.load(inverse.heads + kv_head)
    for i in tl.range(begin, end, C.BLOCK_M, disable_licm=True):
        pair, inside = rt.load_pairs(inverse, kv_head, i, end, C)
        rows = rt.load_pair_rows(q, inverse, pair, inside, s, head, q_origin, C)
        chosen = inside[None, :]
        tile = rt.packed_tile(rows, dout, lse, delta)
        dk0, dk1, dv0, dv1 = attend_dkdv_step(dk0, dk1, dv0, dv1, keys, tile, chosen, True, C)
    return dk0, dk1, dv0, dv1


@rt.jit
def attend_dkdv(q, source, dout, lse, delta, dk, dv, buffer, call, inverse, U, C):
    """One program: one block of keys of a unit of one kv head, over (its share of) the queries that chose the unit.

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
    dk0, dk1, dv0, dv1 = attend_dkdv_tiles(
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
def attend_decode(q, kv, partial, partial_lse, call, lists, U, C):
    """One program: the heads that share a list, of one sequence, against an equal share of the listed units."""
    s, list_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = list_head * C.GROUP
    keys = rt.sequence_keys(kv, s, h, call, C)
    rows = rt.load_packed_rows(rt.at(q, s, 0, 0), 0, h, keys.length - 1, 1, U, C)
    visit = rt.visit_step(lists, s, list_head)
    visited = rt.visited_blocks(visit.count, U, C)

    acc0 = rt.zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = rt.zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = rt.start_softmax(None, h, C)
    acc0, acc1, m, total = attend_forward_units(
        acc0, acc1, m, total, rows, keys, visit, visited * split // C.SPLITS, visited * (split + 1) // C.SPLITS, U, C
    )

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    rt.store_packed_v(rt.at(partial, s, 0, split), rows, acc0 / divisor, acc1 / divisor, C)
    rt.store_packed_values(rt.at(partial_lse, s, 0, split), rows, m + tl.log2(total), C)


chosen_product = rt.PRODUCTS["dot"].rows


@rt.jit
def chosen_forced(q, k_first, k_last, length):
    """Is the unit of keys k_first..k_last chosen for the query at q, whatever its score?"""
    k = k_first
    return (k_last >= 4096 * rt.floor_div(q, 4096)) & (k_first - 4096 * rt.floor_div(q, 4096) < 4096) & (k_first <= q)


@rt.jit
def chosen_allowed(q, k_first, k_last, length):
    """May the unit be chosen at all?"""
    k = k_first
    return k_first <= q


@rt.jit
def chosen_scores_of(rows, row_lse, position, keys, unit, S, C):
    """-> scores [LANES, RANKS] of units; -inf without any.

    An entry counts for each unit that it overlaps.
    """
    score = tl.full((S.LANES, S.RANKS), float("-inf"), C.ACC)
    for i in tl.range(0, S.ENTRIES, disable_licm=True):  # else the parts of q for a product stay in registers
        entry = unit * S.RATIO + (S.FIRST + i)
        inside = (entry >= 0) & (entry < keys.count)
        k_position = (keys.origin + entry)[None, :]
        k0, k1 = rt.load_tokens(keys.k, keys.pages, entry, inside, C.QK0, C.QK1, C.QK_DIM, C)
        product = chosen_product(rows.q0, rows.q1, k0, k1, C.QK1, C)
        s, _ = ranking_scores(product, rows.position, k_position, rows.head, keys.length, C)
        value = s * (ranking_unit(C) * rt.LN2)  # natural units
        value = rt.of_list_head(value, rt.there(rows, S, C), "sum", S, C)
        seen = ranking_visible(position, k_position, 0, keys.length) & inside[None, :]  # all heads see the same

        score = tl.maximum(score, tl.where(seen, value, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    return score


@rt.jit
def chosen_select(q, means, lse, parts, chosen, ranks, call, S, C):
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
    keys = rt.sequence_keys(means, s, h, call, C)
    q_origin = rt.row_origin(call, s, q_count)
    rows = rt.load_packed_rows(rt.at(q, s, 0, q_start), tile, h, q_origin, q_count, S, C)
    row_lse = rows.position
    query = tile * S.LANES + tl.arange(0, S.LANES)
    position = (q_origin + query)[:, None]
    end = tl.cdiv(keys.length, S.UNIT)
    last = q_origin + tl.minimum((tile + 1) * S.LANES, q_count) - 1
    end = tl.minimum(end, tl.maximum(last, -1) // S.UNIT + 1)

    best = tl.full((S.LANES, S.KEPT), rt.NOT_RANKED, tl.int64)
    steps = tl.cdiv(end, S.RANKS)
    for step in tl.range(steps * split // S.SPLITS, steps * (split + 1) // S.SPLITS, disable_licm=True):
        unit = step * S.RANKS + tl.arange(0, S.RANKS)
        score = chosen_scores_of(rows, row_lse, position, keys, unit, S, C)
        k_first = (unit * S.UNIT)[None, :]
        k_last = tl.minimum(k_first + S.UNIT, keys.length) - 1
        exists = k_first < keys.length
        allowed = chosen_allowed(position, k_first, k_last, keys.length) & exists
        forced = chosen_forced(position, k_first, k_last, keys.length) & allowed
        best = rt.ranked(best, score, allowed, allowed, forced, unit, S)
    if S.SPLITS == 1:
        rt.store_units(rt.at(chosen, s, list_head, q_start), best, query, q_count, S)
    else:
        rt.store_ranks(ranks, best, tl.cast(s, tl.int64) * tl.num_programs(1) + list_head, split, S)


# ---- 3. Launches ----------------------------------------------------------------------------------------------------


@MODULE.tuned
def attend_kernel_forward(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, chosen: Tensor, paged: rt.Paged | None = None
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Rows in no sequence keep out = 0, lse = -inf."""
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    v_dim = keys[0][1].shape[3]
    out, lse = rt.empty_rows(q, v_dim)
    shape = rt.pair_shape("units", q, v_dim, 4096, paged)
    U, C = (
        rt.pair_constants(4096, 1),
        rt.packed_constants(q, v_dim, rt.scale_of(q, layout), shape, page=rt.page_of(paged)),
    )
    q = rt.rows_contiguous(q)
    own, call = rt.source(q, *keys[0], sequences, layout, paged), rt.call_of(q, layout)
    for heads in rt.turns(chosen, v_dim, q):
        some = chosen[:, heads]
        lists, _ = rt.pair_lists(some, heads.start, some.shape[1], 4096, layout, shape.config.block_m)
        partial, partial_lse = rt.parts_of(lists, v_dim, q), rt.parts_of(lists, 1, q)
        rt.launch(
            attend_forward, (lists.jobs, some.shape[1]),
            rt.strided(q, sequences), own, rt.strided(partial), rt.strided(partial_lse), call, lists,
            U, C, num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
        )  # fmt: skip
        rt.merge_parts(partial, partial_lse, out, lse, None, call, lists, layout.longest, sequences, C, shape)
    return out, lse


@MODULE.tuned
def attend_kernel_backward(
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
    k, v = keys[0]
    v_dim, kv_heads = v.shape[3], k.shape[1]
    delta = rt.delta_of(out, dout, dlse)
    dq, dk, dv = (rt.room_like(x).zero_() for x in (q, k, v))
    call, U = rt.call_of(q, layout), rt.pair_constants(4096, q.shape[1] // kv_heads)
    rows = [rt.strided(x, sequences) for x in (dout, lse, delta)]
    own = rt.source(q, k, v, sequences, layout, None)

    shape = rt.pair_shape("units_dq", q, v_dim, 4096)
    C = rt.packed_constants(q, v_dim, rt.scale_of(q, layout), shape)
    for heads in rt.turns(chosen, q.shape[3], q):
        some = chosen[:, heads]
        lists, _ = rt.pair_lists(some, heads.start, some.shape[1], 4096, layout, shape.config.block_m)
        partial = rt.parts_of(lists, q.shape[3], q)
        rt.launch(
            attend_dq, (lists.jobs, some.shape[1]),
            rt.strided(q, sequences), own, *rows, rt.strided(partial), call, lists,
            U, C, num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
        )  # fmt: skip
        rt.add_rows(partial, dq, call, lists, layout.longest, sequences, C, shape)

    shape = rt.pair_shape("units_dkdv", q, v_dim, 4096)
    C = rt.packed_constants(q, v_dim, rt.scale_of(q, layout), shape)
    longest = rt.job_tiles(4096, rt.INTERPRETED) * shape.config.block_m
    lists, jobs = rt.pair_lists(chosen, 0, kv_heads, 4096, layout, longest)
    buffer, per_unit = rt.slot_buffer(jobs, k, v, 4096), 4096 // shape.config.block_n
    rt.launch(
        attend_dkdv, (lists.jobs, kv_heads, per_unit),
        rt.strided(q, sequences), own, *rows, rt.strided(dk, sequences), rt.strided(dv, sequences),
        rt.strided(buffer), call, lists,
        U, C, num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
    )  # fmt: skip
    rt.add_parts(buffer, dk, dv, own, call, jobs, lists, U, C, sequences, per_unit, shape.config)
    return dq, [(dk, dv)]


@MODULE.tuned
def attend_kernel_decode(
    q: Tensor, keys: Sequence[tuple[Tensor, Tensor]], layout: rt.Layout, chosen: Tensor, paged: rt.Paged
) -> rt.Splits:
    """One query per sequence, in splits over the units of its list."""
    sequences, heads = q.shape[:2]
    v_dim, lists = keys[0][1].shape[3], chosen.shape[1]
    shape = rt.one_query(rt.unit_shape("units_decode", q, v_dim, lists, 4096, paged))
    visited = min(paged.capacity, max(1, chosen.shape[3]) * 4096)
    splits = rt.split_count(sequences * lists, visited, rt.gpu_of(q.device).processors)
    q = rt.rows_contiguous(q)
    partial, partial_lse = rt.split_room(q, splits, v_dim)
    rt.launch(
        attend_decode, (sequences, lists, splits),
        rt.strided(q), rt.source(q, *keys[0], sequences, layout, paged),
        rt.strided(partial), rt.strided(partial_lse), rt.call_of(q, layout), rt.step_lists(chosen),
        rt.unit_constants(shape, 4096),
        rt.packed_constants(q, v_dim, rt.scale_of(q, layout), shape, splits, rt.page_of(paged)),
        num_warps=shape.config.num_warps, num_stages=shape.config.num_stages,
    )  # fmt: skip
    return rt.Splits(partial, partial_lse, None, q.dtype)


# ---- 4. Operators ---------------------------------------------------------------------------------------------------


entries_of = rt.compress_operator(MODULE)


def attend_keys(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each stream."""
    return [(k, v)]


def attend_forward_of(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """-> out, lse"""
    keys = attend_keys(q, k, v)
    if rt.uses_kernels(q):
        return attend_kernel_forward(q, keys, layout, chosen)
    return rt.cpu_forward(attend_form, q, keys, layout, None, chosen=chosen)


def attend_backward_of(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    layout: rt.Layout,
) -> list[Tensor]:
    """-> gradients of q, k, v; out and lse may be those of a joint softmax"""
    given = dout, dlse, q, attend_keys(q, k, v), out, lse, layout
    if rt.uses_kernels(q):
        dq, grads = attend_kernel_backward(*given, chosen)
    else:
        dq, grads = rt.cpu_backward(attend_form, *given, chosen=chosen)
    return [dq, *grads[0]]


attend_forward_op, attend_backward_op = rt.attention_operators(
    MODULE, "attend", ("q", "k", "v"), ("chosen",),
    attend_keys, attend_forward_of, attend_backward_of
)  # fmt: skip


def chosen_torch(q: Tensor, k: Tensor, lse: Tensor | None, lists: int, layout: rt.Layout) -> Tensor:
    """The units of every query, by torch."""
    found = torch.full((q.shape[0], lists, q.shape[2], 12), -1, dtype=torch.int32, device=q.device)
    for corner in rt.entry_corners(q, layout, rt.Cells(4096, 4096)):
        rows = (corner.batch, slice(None), corner.rows)
        found[rows] = chosen_of(
            q[rows], k[corner.batch, :, corner.keys], None if lse is None else lse[rows], lists, 12, corner
        )
    return found


def chosen_of(q: Tensor, k: Tensor, lse: Tensor | None, lists: int, most: int, corner: rt.Corner) -> Tensor:
    """The units that the queries of one sequence choose, from the logits of ranking."""
    units = -(-corner.length // 4096)
    k_first = torch.arange(units, device=q.device).view(1, 1, 1, -1) * 4096
    k_last = (k_first + 4096).clamp(max=corner.length) - 1

    def position(first: int, end: int) -> Tensor:
        return (corner.q_origin + torch.arange(first, end, device=q.device)).view(1, 1, -1, 1)

    def forced(first: int, end: int) -> Tensor:
        return chosen_units(position(first, end), k_first, k_last, corner.length, True)

    def allowed(first: int, end: int) -> Tensor:
        return chosen_units(position(first, end), k_first, k_last, corner.length, False)

    selection = rt.Selection(4096, 1, rt.Cells(4096, 4096), lists, None, None, None, 12, None, most)
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2], units, corner.q_origin, corner.length)
    logits = rt.logits_of(ranking_form, q, k, corner)
    return rt.choose(logits, lse, forced, allowed, sizes, selection)


def chosen_units(q: Tensor, k_first: Tensor, k_last: Tensor, length: int, forced: bool) -> Tensor:
    """Which units are chosen whatever their score (forced), or may be chosen at all."""
    k = k_first
    found = (
        ((k_last >= 4096 * (q // 4096)) & (k_first - 4096 * (q // 4096) < 4096) & (k_first <= q))
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
    found = torch.empty(q.shape[0], lists, q.shape[2], 12, dtype=torch.int32, device=q.device)
    shape, splits, ranks = rt.select_ranks(rt.unit_shape("select", q, 16, lists, rt.MOST_UNIT), 12, q), 1, None
    if layout.q_spans is not None:
        found.fill_(-1)  # of rows in no sequence
    elif q.shape[2] == 1:
        shape, splits = rt.select_step(shape, q), rt.select_splits(sequences, lists, -(-layout.keys // 4096), q.device)
        ranks = torch.empty(sequences * lists, splits, rt.ranks_kept(12), dtype=torch.int64, device=q.device)
    q, k = rt.rows_contiguous(q), rt.rows_contiguous(k)
    own = rt.entry_source(q, k, k, sequences, layout, rt.Cells(4096, 4096), paged)
    S = rt.select_constants(shape, 4096, 12, 0, 4096, 0, 1, splits)
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
    MODULE, "chosen", (), lambda layout: 12, chosen_choose
)  # fmt: skip


# ---- 5. Public functions --------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a call computes with; choices as membership maps with their first row tile."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_means: Tensor | None = None
    chosen: Tensor | None = None


ARGUMENTS = rt.Arguments(
    queries=(rt.QueryArgument("q"),),
    streams=(rt.StreamArgument("kv", "k", "v", "q"),),
    chosen=(rt.ChosenArgument("chosen", "head", 4096),),
)


def _entries(inputs: Inputs, layout: rt.Layout) -> Inputs:
    """inputs with the entries of compressed streams."""
    cells = rt.Cells(4096, 4096)
    inputs = inputs._replace(k_means=entries_of(inputs.k, cells, layout, "mean"))
    return inputs


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, chosen: Tensor | None = None, return_lse: bool = False,
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None, lengths: Tensor | None = None, side: str = "left", q_offset: int | None = None,
    k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of whole sequences, differentiable.

    q [B, Hq, N, Dqk]; k [B, Hkv, M, Dqk]; v [B, Hkv, M, Dv]; chosen int [B, Hq, N, any]: units of 4096 keys to
    use instead of the computed ones, -1 padded. -> out [B, Hq, N, Dv] in the dtype of q.
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
    inputs = _entries(inputs, layout)
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)

    inputs = _choose_chosen(inputs, layout, None)
    attend_part = attend_forward_op(inputs.q, inputs.k, inputs.v, inputs.chosen, *layout)
    return rt.finish(attend_part, return_lse)


@MODULE.entry
@torch.no_grad()
def choices(
    q: Tensor, k: Tensor, v: Tensor, *, return_counts: bool = False, phase: str = "train",
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None, lengths: Tensor | None = None, side: str = "left", q_offset: int | None = None,
    k_offset: int | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """The units that a phase chooses, by name: int32 [B, heads, N, most], ascending, -1 at the end.

    Passed back to `attention` or `reference`, they hold the choice fixed. In `phase` "decode" every row chooses as if
    it were the last token. return_counts: (the lists, how many units each has, int32 [B, heads, N]).
    """
    rt.expect_phase(phase, PHASES)
    inputs = rt.checked(ARGUMENTS, Inputs(q, k, v), phase)
    options = rt.Options(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, lengths, side, q_offset, k_offset, scale)
    layout = rt.checked_layout(inputs.q, inputs.k, options)
    return rt.choices_in(phase, _choices, ARGUMENTS, inputs, layout, return_counts)


def _choices(inputs: Inputs, layout: rt.Layout) -> dict[str, Tensor]:
    """What is chosen in every phase."""
    inputs = rt.prepared(ARGUMENTS, inputs, layout)
    inputs = _entries(inputs, layout)
    inputs = _choose_chosen(inputs, layout, None)
    return {"chosen": inputs.chosen}


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
    return rt.reference_in(phase, _reference, ARGUMENTS, inputs, None, layout, return_lse)


def _reference(inputs: Inputs, gates: Tensor | None, layout: rt.Layout, return_lse: bool) -> Any:
    """The float64 meaning in every phase."""
    inputs = rt.prepared(ARGUMENTS, inputs, layout)
    inputs = _entries(rt.in_float64(ARGUMENTS, inputs), layout)
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)

    inputs = _dense_chosen(inputs, layout, None)
    attend_part = attend_dense(inputs, layout)
    return rt.finish(attend_part, return_lse)


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
        entries = {"means": rt.EntryShape(kv_heads, qk_dim, 0, rt.Cells(4096, 4096))}
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
        rt.Closes("means", "kv", rt.POOLS["mean"], ()),
    ]  # fmt: skip


@rt.cached_call(MODULE, ARGUMENTS, Cache, rt.Result("v.kv"))
@torch.no_grad()
def prefill(
    q: Tensor, k: Tensor, v: Tensor, cache: Cache, *, chosen: Tensor | None = None, return_lse: bool = False,
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
    inputs, own, layout, done = rt.step(
        ARGUMENTS, inputs, "prefill", cache, Cache, return_lse, brought, scale, closes=_closes
    )
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)
    inputs = _cached_chosen(inputs, own, layout, None)
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
    inputs, own, layout, done = rt.step(
        ARGUMENTS, inputs, "decode", cache, Cache, return_lse, brought, scale, closes=_closes
    )
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)
    inputs = _cached_chosen(inputs, own, layout, None)
    attend_part = attend_cached(inputs, own, layout)
    return rt.answer(rt.merged_part(attend_part), done, return_lse)


CELLS = {"means": rt.Cells(4096, 4096)}


def paged_states(slots: int, tokens: int, **sizes: Any) -> dict[str, Tensor]:
    """Entries of requests of up to `tokens` tokens, a row for each; sizes: those that Cache takes."""
    cache = Cache(0, tokens, **sizes)
    return rt.state_buffers(cache.entries, slots, tokens, cache.spans.device, cache.dtype)


@MODULE.step
@torch.no_grad()
def update_states(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    states: dict[str, Tensor],
    state_rows: Tensor,
    new_tokens: int,
    **weights: Tensor,
) -> None:
    """Entries that close with the last new_tokens tokens of each request (or fewer), which lie in the pages."""
    inputs = Inputs(None, k_pages, v_pages, **weights)
    rt.close_in_pages(ARGUMENTS, inputs, _closes(inputs), block_table, seq_lens, CELLS, states, state_rows, new_tokens)


@MODULE.step
@torch.no_grad()
def attend_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
    states: dict[str, Tensor], state_rows: Tensor, *, chosen: Tensor | None = None, max_seqlen_q: int | None = None,
    scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention of packed queries [T, heads, dim] over pages [pages, page, heads, dim] that hold the keys already.

    Request r has queries cu_seqlens_q[r] to cu_seqlens_q[r + 1], the last one at seq_lens[r] - 1, and its pages in
    block_table[r]. max_seqlen_q: the most queries of a request. -> out [T, heads, dim], lse [T, heads].
    scale: as in `attention`.
    states: what `update_states` keeps up to date, request r in row state_rows[r].
    """
    inputs, own, layout, requests = rt.from_pages(
        ARGUMENTS,
        Inputs(q, k_pages, v_pages, chosen=chosen),
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
    inputs = rt.with_choices(ARGUMENTS, inputs, layout)
    inputs = _cached_chosen(inputs, own, layout, None)
    attend_part = attend_cached(inputs, own, layout)
    return rt.unpacked(rt.merged_part(attend_part), requests)


def example_inputs(
    batch: int, tokens: int, *, heads: int = 8, kv_heads: int = 2, qk_dim: int = 64, v_dim: int = 64,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Random arguments for `attention`: token tensors rise in steps, flags are rare, given lists hold near units."""
    sizes = rt.Sizes(heads, kv_heads, qk_dim, v_dim)
    return rt.example_arguments(ARGUMENTS, batch, tokens, sizes, dtype, device)


def _choose_chosen(inputs: Inputs, layout: rt.Layout, lse: Tensor | None) -> Inputs:
    """inputs with chosen: the caller's, or what ranking scores best; no gradient."""
    if inputs.chosen is not None:
        return inputs
    q, k = inputs.q.detach(), inputs.k_means.detach()
    return inputs._replace(chosen=chosen_op(q, k, None, q.shape[1], *layout))


def _cached_chosen(inputs: Inputs, own: rt.Storage, layout: rt.Layout, lse: rt.Splits | Tensor | None) -> Inputs:
    """The same from the keys in the cache."""
    if inputs.chosen is not None:
        return inputs
    q, k = inputs.q, own.k["means"]
    lists = q.shape[1]
    if rt.uses_kernels(q):
        paged = rt.paged_entries(own, "means")
        return inputs._replace(chosen=chosen_kernel(q, k, None, lists, layout, paged))
    most = 12
    found = torch.full((q.shape[0], lists, q.shape[2], most), -1, dtype=torch.int32, device=q.device)
    for corner in rt.entry_corners(q, layout, rt.Cells(4096, 4096), in_cache=True):
        s, rows = corner.sequences.start, (corner.batch, slice(None), corner.rows)
        keys = own.entry_rows(k, s, corner.keys)
        found[rows] = chosen_of(q[rows], keys, None, lists, most, corner)
    return inputs._replace(chosen=found)


def _dense_chosen(inputs: Inputs, layout: rt.Layout, lse: Tensor | None) -> Inputs:
    """The same in float64."""
    if inputs.chosen is not None:
        return inputs
    q, k = inputs.q.double(), inputs.k_means.double()
    return inputs._replace(chosen=chosen_torch(q, k, None, q.shape[1], layout))


def attend_dense(inputs: Inputs, layout: rt.Layout) -> tuple[Tensor, Tensor]:
    """The float64 meaning of attend."""
    q = inputs.q
    return rt.dense_attention(attend_form, q, attend_keys(q, inputs.k, inputs.v), layout, None, chosen=inputs.chosen)


def attend_cached(inputs: Inputs, own: rt.Storage, layout: rt.Layout) -> rt.Splits | tuple[Tensor, Tensor]:
    """attend of new queries over the keys in the cache: out, lse; of one query by kernels in splits."""
    q = inputs.q
    keys = [(own.k["kv"], own.v["kv"])]
    if rt.uses_kernels(q):
        run = attend_kernel_decode if rt.is_step(q, layout) else attend_kernel_forward
        return run(q, keys, layout, inputs.chosen, paged=rt.paged_of(own))
    return rt.cached_attention(attend_form, q, keys, own, layout, None, chosen=inputs.chosen)
