"""Tiles whose rows are a few neighbouring queries times the query heads that share one list of units.

Row r is query `lane = r // (BLOCK_M / LANES)` of the tile and head `r % (BLOCK_M / LANES)` of the list's heads; groups
that are no power of two leave rows empty. Rows of one head that were gathered (`pairs`) are kept in the same tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import LOG2E, Strided, jit
from spdsl.runtime.tiles.positions import span
from spdsl.runtime.tiles.softmax import softmax_step, start_softmax
from spdsl.runtime.tiles.tiles import at, load_qk, load_v, store_qk, store_v, token_pointer, zeros

_COUNTED = tl.constexpr(256)  # entries of a list that are looked at at once


class UnitConst(NamedTuple):
    """What kernels over units are compiled for (all tl.constexpr); BLOCK_N divides UNIT."""

    UNIT: tl.constexpr  # keys of a unit
    LANES: tl.constexpr  # queries of a tile
    LISTS: tl.constexpr  # lists per kv head
    LISTED: tl.constexpr  # whether a program visits a list of units, or one unit


class UnitLists(NamedTuple):
    """The units of each tile: units and masks [H, tiles, width], counts [H, tiles]; a sequence's first tile [S]."""

    units: torch.Tensor
    masks: torch.Tensor
    counts: torch.Tensor
    first: torch.Tensor
    tiles: int
    width: int


class StepLists(NamedTuple):
    """The units of one query per sequence: [S, H, width], contiguous, each unit once, -1 only at the end."""

    units: torch.Tensor
    width: int


class Inverse(NamedTuple):
    """The tiles of each unit [H, entries] and the jobs over them [H, jobs], as in `UnitJobs`."""

    tiles: torch.Tensor
    masks: torch.Tensor
    sequence: torch.Tensor
    unit: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    slot: torch.Tensor
    parts: torch.Tensor
    first_tile: torch.Tensor  # [S]
    entries: int
    jobs: int
    all_tiles: int


class PackedRows(NamedTuple):
    """The rows of a tile: q in two parts [M, D]; position [M, 1]; query, head, lane and whether it exists [M]."""

    q0: tl.tensor
    q1: tl.tensor
    position: tl.tensor
    query: tl.tensor
    head: tl.tensor
    lane: tl.tensor
    inside: tl.tensor


class Visit(NamedTuple):
    """The units of one tile, and which queries chose them; or the number of one unit."""

    count: tl.tensor
    units: tl.tensor
    masks: tl.tensor


@jit
def packed_places(tile, h, q_count, U, C):
    """-> query, head, lane of each row of a tile, and whether the row exists; h is the first head of the list."""
    row = tl.arange(0, C.BLOCK_M)
    lane = row // (C.BLOCK_M // U.LANES)
    member = row % (C.BLOCK_M // U.LANES)
    query = tile * U.LANES + lane
    inside = (query < q_count) & (member < C.GROUP)
    return query, h + tl.minimum(member, C.GROUP - 1), lane, inside


@jit
def load_packed_rows(q, tile, h, q_origin, q_count, U, C):
    query, head, lane, inside = packed_places(tile, h, q_count, U, C)
    q0 = load_packed(q, query, head, inside, 0, C.QK0, C.QK_DIM)
    q1 = 0.0
    if C.QK1:
        q1 = load_packed(q, query, head, inside, C.QK0, C.QK1, C.QK_DIM)
    return PackedRows(q0, q1, (q_origin + query)[:, None], query, head, lane, inside)


@jit
def packed_pointers(x, query, head):
    return x.data + query.to(tl.int64) * x.token + head.to(tl.int64) * x.head


@jit
def load_packed(x, query, head, inside, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """[M, WIDTH] tile of columns START.. of the rows; x is a Strided from the first token of the sequence on."""
    column = START + tl.arange(0, WIDTH)[None, :]
    pointers = packed_pointers(x, query, head)[:, None] + column
    mask = inside[:, None]
    if START + WIDTH > DIM:
        mask = mask & (column < DIM)
    return tl.load(pointers, mask=mask, other=0.0)


@jit
def load_packed_v(x, rows, C):
    """Rows of out or dout in two parts."""
    part0 = load_packed(x, rows.query, rows.head, rows.inside, 0, C.V0, C.V_DIM)
    part1 = 0.0
    if C.V1:
        part1 = load_packed(x, rows.query, rows.head, rows.inside, C.V0, C.V1, C.V_DIM)
    return part0, part1


@jit
def load_packed_values(x, rows, other, C):
    """One value per row (lse, delta)."""
    pointers = packed_pointers(x, rows.query, rows.head)
    return tl.load(pointers, mask=rows.inside, other=other)


@jit
def load_packed_lse(lse, rows, C):
    """lse in base 2; rows without keys become +inf: p = exp2(s - inf) = 0."""
    value = load_packed_values(lse, rows, float("-inf"), C)
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


class StepLse(NamedTuple):
    """The log-sum-exp of one query in splits, [S, Hq, splits] in base 2, and the sink that is in none of them."""

    splits: Strided
    sink: torch.Tensor | None
    many: int


@jit
def load_step_lse(lse, rows, s, C):
    """As `load_packed_lse`, of a step whose splits nobody has merged."""
    first = packed_pointers(at(lse.splits, s, 0, 0), rows.query, rows.head)[:, None]
    m, total = start_softmax(lse.sink, rows.head, C)
    for split in tl.range(0, lse.many, 32):
        i = split + tl.arange(0, 32)[None, :]
        own = tl.load(first + i, mask=rows.inside[:, None] & (i < lse.many), other=float("-inf"))
        _, _, m, total = softmax_step(own, 1.0, m, total)
    return tl.where(total == 0.0, float("inf"), m + tl.log2(total))


@jit
def store_packed(x, rows, tile, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, C):
    column = START + tl.arange(0, WIDTH)[None, :]
    pointers = packed_pointers(x, rows.query, rows.head)[:, None] + column
    tl.store(pointers, tile.to(x.data.dtype.element_ty), mask=rows.inside[:, None] & (column < DIM))


@jit
def store_packed_qk(x, rows, part0, part1, C):
    store_packed(x, rows, part0, 0, C.QK0, C.QK_DIM, C)
    if C.QK1:
        store_packed(x, rows, part1, C.QK0, C.QK1, C.QK_DIM, C)


@jit
def store_packed_v(x, rows, part0, part1, C):
    store_packed(x, rows, part0, 0, C.V0, C.V_DIM, C)
    if C.V1:
        store_packed(x, rows, part1, C.V0, C.V1, C.V_DIM, C)


@jit
def store_packed_values(x, rows, values, C):
    tl.store(packed_pointers(x, rows.query, rows.head), values, mask=rows.inside)


@jit
def visit_units(lists, s, h, tile):
    """The units listed for a tile of sequence s and list head h."""
    entry = tl.cast(h, tl.int64) * lists.tiles + tl.load(lists.first + s) + tile
    return Visit(tl.load(lists.counts + entry), lists.units + entry * lists.width, lists.masks + entry * lists.width)


@jit
def visit_step(lists, s, h):
    """The units listed for the one query of sequence s; their number is counted here, masks are not needed."""
    units = lists.units + (tl.cast(s, tl.int64) * tl.num_programs(1) + h) * lists.width
    count = 0
    for first in tl.range(0, lists.width, _COUNTED):
        place = first + tl.arange(0, _COUNTED)
        unit = tl.load(units + place, mask=place < lists.width, other=-1)
        count += tl.sum((unit >= 0).to(tl.int32), 0)
    return Visit(count, units, units)


@jit
def unit_block(units, i, U, C):
    """Number of the i-th visited block of keys: a unit is UNIT / BLOCK_N blocks."""
    if U.LISTED:
        place = i // (U.UNIT // C.BLOCK_N)
        block = (tl.load(units + place) - place) * (U.UNIT // C.BLOCK_N) + i
    else:
        block = units * (U.UNIT // C.BLOCK_N) + i
    return block


@jit
def chose(masks, i, lane, U, C):
    """Which rows chose the unit of the i-th visited block; with one query per tile, all of them."""
    if U.LANES == 1:
        found = lane >= 0
    else:
        mask = tl.load(masks + i // (U.UNIT // C.BLOCK_N))
        found = ((mask >> lane.to(tl.int64)) & 1) != 0
    return found


@jit
def store_slot(buffer, kv_head, slot, part, dk0, dk1, dv0, dv1, U, C):
    """One block of a unit in the buffer [Hk, slots, UNIT, QK_DIM + V_DIM]."""
    start = at(buffer, 0, kv_head, slot).data + tl.cast(part, tl.int64) * (C.BLOCK_N * (C.QK_DIM + C.V_DIM))
    store_qk(start, C.QK_DIM + C.V_DIM, C.BLOCK_N, dk0, dk1, C.BLOCK_N, C)
    store_v(start + C.QK_DIM, C.QK_DIM + C.V_DIM, C.BLOCK_N, dv0, dv1, C.BLOCK_N, C)


@jit
def add_slots(buffer, dk, dv, source, call, inverse, U, C):
    """One program: one block of a unit whose jobs were several; adds their parts in order."""
    job, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = tl.cast(kv_head, tl.int64) * inverse.jobs + job
    parts = tl.load(inverse.parts + entry)
    if parts == 0:
        return
    slot, s = tl.load(inverse.slot + entry), tl.load(inverse.sequence + entry)
    dk0 = zeros(C.BLOCK_N, C.QK0, C.ACC)
    dk1 = zeros(C.BLOCK_N, C.QK1, C.ACC)
    dv0 = zeros(C.BLOCK_N, C.V0, C.ACC)
    dv1 = zeros(C.BLOCK_N, C.V1, C.ACC)
    for i in tl.range(0, parts):
        start = at(buffer, 0, kv_head, slot + i).data + tl.cast(part, tl.int64) * (C.BLOCK_N * (C.QK_DIM + C.V_DIM))
        part0, part1 = load_qk(start, C.QK_DIM + C.V_DIM, C.BLOCK_N, C.BLOCK_N, True, C)
        dk0 += part0
        dk1 += part1
        part0, part1 = load_v(start + C.QK_DIM, C.QK_DIM + C.V_DIM, C.BLOCK_N, C.BLOCK_N, True, C)
        dv0 += part0
        dv1 += part1
    k_start, k_count = span(source.spans, s, source.keys)
    key = tl.load(inverse.unit + entry) * U.UNIT + part * C.BLOCK_N
    dk = at(dk, s, kv_head, k_start)
    dv = at(dv, s, kv_head, k_start)
    store_qk(token_pointer(dk, key), dk.token, k_count - key, dk0, dk1, C.BLOCK_N, C)
    store_v(token_pointer(dv, key), dv.token, k_count - key, dv0, dv1, C.BLOCK_N, C)
