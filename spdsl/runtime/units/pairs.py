"""Keys outermost: each unit meets the queries that chose it, and what they get from it is a part of their output.

A pair is a query of one head and a unit of its list, numbered head by head and query by query. Each row of a tile is
one pair; a program has rows of one unit alone, so nothing is computed that no query chose. Parts are merged exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import LN2, jit
from spdsl.runtime.tiles.positions import span
from spdsl.runtime.tiles.rows import load_qk_of, load_row_part
from spdsl.runtime.tiles.softmax import start_softmax
from spdsl.runtime.tiles.tiles import at, zeros
from spdsl.runtime.units.packed import (
    PackedRows,
    Visit,
    store_packed_qk,
    store_packed_v,
    store_packed_values,
)


class PairLists(NamedTuple):
    """The pairs of H heads grouped by unit, and the jobs over them, as in `UnitJobs` with tiles of one query.

    H are query heads, and for dK and dV kv heads, whose query heads are numbered in a row.
    """

    pairs: torch.Tensor  # [H, entries]
    sequence: torch.Tensor  # [H, jobs], as are the next five
    unit: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    slot: torch.Tensor
    parts: torch.Tensor
    counts: torch.Tensor  # [lists, queries]: units of each query
    first: torch.Tensor  # [S]: a sequence's first query
    heads: torch.Tensor  # [H]: the query head, the first one of a kv head
    entries: int
    jobs: int
    queries: int
    width: int  # pairs of a query, at most


@jit
def load_pairs(lists, h, first, end, C):
    """-> the pairs first .. end - 1, one for each row, as far as a tile has rows; and which rows have one."""
    place = first + tl.arange(0, C.BLOCK_M)
    inside = place < end
    return tl.load(lists.pairs + tl.cast(h, tl.int64) * lists.entries + place, mask=inside, other=0), inside


@jit
def load_pair_rows(q, lists, pair, inside, s, head, q_origin, C):
    """The queries of the pairs; `head` is that of pair 0. All rows chose the unit of the program, so all are lane 0."""
    number = pair // lists.width
    query = tl.where(inside, number % lists.queries - tl.load(lists.first + s), 0)
    heads = head + number // lists.queries
    q0, q1 = load_qk_of(q, query, heads, inside, True, C)
    return PackedRows(q0, q1, (q_origin + query)[:, None], heads[:, None], query, heads, query * 0, inside)


@jit
def rows_of_parts(rows, pair, h):
    """The same rows in a buffer of parts [1, H, pairs, D]."""
    return PackedRows(0.0, 0.0, rows.position, rows.head, pair, h + pair * 0, rows.lane, rows.inside)


@jit
def visit_unit(lists, entry):
    """The unit of one job; no other field is read."""
    unit = tl.load(lists.unit + entry)
    return Visit(1, unit, unit)


@jit
def blocks_until(rows, visit, U, C):
    """Blocks of the unit up to the last row's own position: what follows, no row may see. Key 0 has position 0."""
    last = tl.max(tl.where(rows.inside, tl.max(rows.position, 1), -1), 0)
    left = tl.maximum(last + C.BLOCK_N - visit.units * U.UNIT, 0)
    return tl.minimum(left // C.BLOCK_N, U.UNIT // C.BLOCK_N)


@jit
def query_parts(lists, s, h, q_count, C):
    """-> query of each row of a tile, whether it exists, its first pair and how many it has."""
    query = tl.program_id(0) * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    inside = query < q_count
    number = tl.cast(h, tl.int64) * lists.queries + tl.load(lists.first + s) + query
    count = tl.load(lists.counts + number, mask=inside, other=0)
    return query, inside, (tl.load(lists.first + s) + query).to(tl.int64) * lists.width, count


@jit
def merge_pairs(partial, partial_lse, out, lse, sink, call, lists, C):
    """One program: neighbouring queries of one head. Parts, each with its lse in base 2 -> out, natural-log lse."""
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = span(call.q_spans, s, call.q_count)
    if tl.program_id(0) * C.BLOCK_M >= q_count:
        return
    query, inside, first, count = query_parts(lists, s, h, q_count, C)
    head = tl.load(lists.heads + h) + query * 0
    values, weights = at(partial, 0, h, 0), at(partial_lse, 0, h, 0)
    acc0 = zeros(C.BLOCK_M, C.V0, C.ACC)
    acc1 = zeros(C.BLOCK_M, C.V1, C.ACC)
    m, total = start_softmax(sink, head, C)
    for i in tl.range(0, tl.max(count, 0)):
        there = i < count
        part_lse = tl.load(weights.data + (first + i) * weights.token, mask=there, other=float("-inf"))
        m_new = tl.maximum(m, part_lse)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: -inf - -inf would be NaN
        decay, weight = tl.exp2(m - shift)[:, None], tl.exp2(part_lse - shift)[:, None]
        acc0 = acc0 * decay + weight * load_row_part(values, first + i, query * 0, there, 0, C.V0, C.V_DIM, True)
        if C.V1:
            acc1 = acc1 * decay + weight * load_row_part(values, first + i, query * 0, there, C.V0, C.V1, C.V_DIM, True)
        total = total * tl.exp2(m - shift) + tl.exp2(part_lse - shift)
        m = m_new

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]  # no key: out = 0, and lse = log(0) = -inf
    rows = PackedRows(0.0, 0.0, query[:, None], head[:, None], query, head, query * 0, inside)
    store_packed_v(at(out, s, 0, q_start), rows, acc0 / divisor, acc1 / divisor, C)
    store_packed_values(at(lse, s, 0, q_start), rows, (m + tl.log2(total)) * LN2, C)


@jit
def add_pairs(partial, dq, call, lists, C):
    """One program: neighbouring queries of one head; adds the parts of dQ in the order of their units."""
    h, s = tl.program_id(1), tl.program_id(2)
    q_start, q_count = span(call.q_spans, s, call.q_count)
    if tl.program_id(0) * C.BLOCK_M >= q_count:
        return
    query, inside, first, count = query_parts(lists, s, h, q_count, C)
    values = at(partial, 0, h, 0)
    dq0 = zeros(C.BLOCK_M, C.QK0, C.ACC)
    dq1 = zeros(C.BLOCK_M, C.QK1, C.ACC)
    for i in tl.range(0, tl.max(count, 0)):
        dq0 += load_row_part(values, first + i, query * 0, i < count, 0, C.QK0, C.QK_DIM, True)
        if C.QK1:
            dq1 += load_row_part(values, first + i, query * 0, i < count, C.QK0, C.QK1, C.QK_DIM, True)
    head = tl.load(lists.heads + h) + query * 0
    rows = PackedRows(0.0, 0.0, query[:, None], head[:, None], query, head, query * 0, inside)
    store_packed_qk(at(dq, s, 0, q_start), rows, dq0, dq1, C)
