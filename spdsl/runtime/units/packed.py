"""Tiles whose rows are a few neighbouring queries times the query heads that share one list of units.

Row r is query `lane = r // (BLOCK_M / LANES)` of the tile and head `r % (BLOCK_M / LANES)` of the list's heads; groups
that are no power of two leave rows empty. Rows of one head that were gathered (`pairs`) are kept in the same tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import Block, RowTile, Strided, jit
from spdsl.runtime.tiles.keys import block_of
from spdsl.runtime.tiles.positions import span
from spdsl.runtime.tiles.rows import load_qk_of, load_v_of, load_values_of, row_pointers
from spdsl.runtime.tiles.softmax import softmax_step, start_softmax
from spdsl.runtime.tiles.tiles import at, in_base_2, load_qk, load_v, store_qk, store_v, token_pointer, zeros

_COUNTED = tl.constexpr(256)  # entries of a list that are looked at at once


class UnitConst(NamedTuple):
    """What kernels over units are compiled for (all tl.constexpr).

    BLOCK_N divides UNIT, or the keys of units are gathered. dK and dV of short units are made block by block: UNIT are
    then the keys of PER neighbouring units, and each entry of the inverse has a mask for each of these.
    """

    UNIT: tl.constexpr  # keys of a unit
    LANES: tl.constexpr  # queries of a tile
    LISTS: tl.constexpr  # lists per kv head
    LISTED: tl.constexpr  # whether a program visits a list of units, or one unit
    PER: tl.constexpr  # units of the lists in one of the inverse
    WORDS: tl.constexpr  # of the masks of an entry: PER times LANES bits


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
    """The rows of a tile: q in two parts [M, D]; position and head [M, 1]; query, head, lane, whether it exists [M]."""

    q0: tl.tensor
    q1: tl.tensor
    position: tl.tensor
    head: tl.tensor
    query: tl.tensor
    heads: tl.tensor
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
    query, heads, lane, inside = packed_places(tile, h, q_count, U, C)
    q0, q1 = load_qk_of(q, query, heads, inside, True, C)
    return PackedRows(q0, q1, (q_origin + query)[:, None], heads[:, None], query, heads, lane, inside)


@jit
def packed_tile(rows, dout, lse, delta):
    """The rows as a block of keys meets them."""
    position = tl.trans(rows.position)
    head = rows.heads[None, :]
    return RowTile(rows.q0, rows.q1, position, head, dout, lse, delta, 0, rows.query, rows.heads, rows.inside)


@jit
def load_packed_v(x, rows, C):
    """Rows of out or dout in two parts."""
    return load_v_of(x, rows.query, rows.heads, rows.inside, True, C)


@jit
def load_packed_values(x, rows, other):
    """One value per row (lse, delta)."""
    return load_values_of(x, rows.query, rows.heads, rows.inside, other)


@jit
def load_packed_lse(lse, rows):
    """lse in base 2; rows without keys become +inf: p = exp2(s - inf) = 0."""
    return in_base_2(load_packed_values(lse, rows, float("-inf")))


class StepLse(NamedTuple):
    """The log-sum-exp of one query in splits, [S, Hq, splits] in base 2, and the sink that is in none of them.

    Empty (`many` None) where it is merged already: before triton 3.7 a kernel cannot ask whether a tuple is None.
    """

    splits: Strided | None
    sink: torch.Tensor | None
    many: int | None


@jit
def load_step_lse(lse, rows, s, C):
    """As `load_packed_lse`, of a step whose splits nobody has merged."""
    first = row_pointers(at(lse.splits, s, 0, 0), rows.query, rows.heads)[:, None]
    m, total = start_softmax(lse.sink, rows.heads, C)
    for split in tl.range(0, lse.many, 32):
        i = split + tl.arange(0, 32)[None, :]
        own = tl.load(first + i, mask=rows.inside[:, None] & (i < lse.many), other=float("-inf"))
        _, _, m, total = softmax_step(own, 1.0, m, total)
    return tl.where(total == 0.0, float("inf"), m + tl.log2(total))


@jit
def store_packed(x, rows, tile, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, C):
    column = START + tl.arange(0, WIDTH)[None, :]
    pointers = row_pointers(x, rows.query, rows.heads)[:, None] + column
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
    tl.store(row_pointers(x, rows.query, rows.heads), values, mask=rows.inside)


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
def visited_blocks(count, U, C):
    """Blocks that hold the keys of `count` units."""
    blocks = tl.cdiv(count * U.UNIT, C.BLOCK_N) if C.GATHERED else count * (U.UNIT // C.BLOCK_N)
    return blocks


@jit
def unit_block(keys, visit, i, U, C):
    """The i-th visited block of keys: a unit is UNIT / BLOCK_N blocks, or a block holds the keys of several units."""
    if C.GATHERED:
        place, within = gathered_place(i, U, C)
        unit = tl.load(visit.units + place, mask=place < visit.count, other=0)
        token = tl.where(place < visit.count, unit * U.UNIT + within, keys.count)
        block = Block(token, keys.count - token, (keys.origin + token)[None, :])
    else:
        block = block_of(keys, unit_block_number(visit, i, U, C), C)
    return block


@jit
def gathered_place(i, U, C):
    """-> for each key of the i-th gathered block the place of its unit in the list, and which of its keys it is.

    With UNIT = 6 and BLOCK_N = 16, block 0 holds the units 0, 1 and four keys of unit 2, block 1 begins with its rest.
    """
    key = i * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    return key // U.UNIT, key % U.UNIT


@jit
def unit_block_number(visit, i, U, C):
    if U.LISTED:
        place = i // (U.UNIT // C.BLOCK_N)
        number = (tl.load(visit.units + place) - place) * (U.UNIT // C.BLOCK_N) + i
    else:
        number = visit.units * (U.UNIT // C.BLOCK_N) + i
    return number


@jit
def chose(visit, i, lane, U, C):
    """Which queries chose the i-th visited block, or each of its keys.

    `lane` is a column [M, 1], or a row where keys are a column; so is the result, but with an axis of keys if they are
    gathered. With one query in a tile, it has chosen all of them.
    """
    if U.LANES == 1:
        chosen = lane >= 0
    elif C.GATHERED:
        place, _ = gathered_place(i, U, C)
        mask = tl.load(visit.masks + place, mask=place < visit.count, other=0)
        mask = mask[None, :] if lane.shape[1] == 1 else mask[:, None]
        chosen = ((mask >> lane.to(tl.int64)) & 1) != 0
    else:
        mask = tl.load(visit.masks + i // (U.UNIT // C.BLOCK_N))
        chosen = ((mask >> lane.to(tl.int64)) & 1) != 0
    return chosen


@jit
def chose_unit(inverse, entry, part, lane, U, C):
    """Which queries of a tile, given as a row [1, M], chose the unit of one entry of the inverse, or each of its keys.

    With PER = 16 units of one key and LANES = 4, bit 4 k + l of 64 says whether query l chose key k.
    """
    if U.PER == 1:
        chosen = ((tl.load(inverse.masks + entry) >> lane.to(tl.int64)) & 1) != 0
    else:
        key = part * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
        bit = (key // (U.UNIT // U.PER) * U.LANES)[:, None]
        mask = tl.load(inverse.masks + entry * U.WORDS + bit // 64)
        chosen = ((mask >> (bit % 64 + lane).to(tl.int64)) & 1) != 0
    return chosen


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
