"""Pairs (row, chosen unit) of a block of rows as tiles of equal size, sorted by unit, and the logits of some tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu_short_units import taken_together, units_together
from spdsl.runtime.cpu.cpu_tiles import Logits

# Query positions [rows, 1], key indices [rows, keys], query heads [G, rows, 1] -> bool, or numbers, broadcastable to
# [G, rows, keys], or to [B, G, rows, keys] where it differs by batch row.
UnitTest = Callable[[Tensor, Tensor, Tensor], Tensor]

_UNIT_RESULTS = 1 << 22  # numbers of a block's results in tile order: 16 MB in fp32
_UNIT_LOGITS = 1 << 19  # logits of one batched product, of which a few copies live in the cache: 2 MB in fp32
_UNIT_TILE = 256  # rows of a product at most, the heads of a list included


class UnitSizes(NamedTuple):
    batch: int
    lists: int  # heads of lists
    group: int  # query heads of a list
    rows: int
    kv_heads: int
    keys: int
    unit: int  # keys of a unit, or of `per` short ones that are taken together
    units: int  # of a sequence
    q_origin: int
    per: int


class UnitTests(NamedTuple):
    visible: UnitTest
    bias: UnitTest | None


class PairTiles(NamedTuple):
    """The pairs of a block of rows, by unit. A row is a number in [B, Hc, N], a table unit one in [B, Hk, units]."""

    row: Tensor  # [tiles, pairs]
    hidden: Tensor  # [tiles, pairs]: fills a tile up, no pair
    head: Tensor  # [tiles] head of lists
    unit: Tensor  # [tiles] unit of its sequence
    table: Tensor  # [tiles] table unit
    masks: Tensor | None  # [tiles, pairs]: bit i tells whether the row chose the i-th short unit


class PairChunk(NamedTuple):
    """Some tiles of a block and the inputs of their products; P = pairs * group."""

    tiles: slice  # of the block
    place: slice  # of its pairs among those of the block
    rows: Tensor  # [tiles, pairs]
    table: Tensor  # [tiles]
    logits: Tensor  # [tiles, P, unit], -inf where hidden
    slope: Tensor | None  # of the cap
    hidden: Tensor  # [tiles, pairs, 1 or G, unit]
    q: Tensor  # [tiles, P, Dqk], scaled
    k: Tensor  # [tiles, unit, Dqk]


def unit_sizes(q: Tensor, k: Tensor, chosen: Tensor, unit: int, form: Logits) -> UnitSizes:
    lists, keys = chosen.shape[1], k.shape[2]
    unit = max(1, min(unit, keys))  # a unit that is larger has the same number and keys
    per = units_together(unit, chosen.shape[3], keys)
    whole = unit * per
    return UnitSizes(
        q.shape[0],
        lists,
        q.shape[1] // lists,
        q.shape[2],
        k.shape[1],
        keys,
        whole,
        -(-keys // whole),
        form.q_origin,
        per,
    )


def rows_by_list(x: Tensor, sizes: UnitSizes) -> Tensor:
    """[B, Hq, N, D] -> [B * Hc * N, G, D]: what a list serves lies together."""
    rows: Tensor = x.unflatten(1, (sizes.lists, sizes.group)).transpose(2, 3).flatten(0, 2).contiguous()
    return rows


def heads_by_row(x: Tensor, sizes: UnitSizes) -> Tensor:
    """[B * Hc * N, G, D] -> [B, Hq, N, D]."""
    return x.view(sizes.batch, sizes.lists, sizes.rows, *x.shape[1:]).transpose(2, 3).flatten(1, 2)


def keys_by_unit(x: Tensor, sizes: UnitSizes, dtype: torch.dtype) -> Tensor:
    """[B, Hk, M, D] -> [B * Hk * units, unit, D], zeros past the end."""
    more = sizes.units * sizes.unit - sizes.keys
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, more)) if more else x.to(dtype)
    return x.reshape(-1, sizes.unit, x.shape[3])


def keys_in_order(x: Tensor, sizes: UnitSizes) -> Tensor:
    """[B * Hk * units, unit, D] -> [B, Hk, M, D]."""
    return x.view(sizes.batch, sizes.kv_heads, sizes.units * sizes.unit, x.shape[2])[:, :, : sizes.keys]


def pair_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[B * Hc * N, G, D] at rows [tiles, pairs] -> [tiles, pairs * G, D]."""
    return x.index_select(0, rows.flatten()).view(len(rows), -1, x.shape[2])


def hide(x: Tensor, hidden: Tensor, value: float) -> Tensor:
    """x [tiles, pairs * G, unit] with `value` where hidden [tiles, pairs, 1 or G, unit], in place."""
    x.view(*hidden.shape[:2], -1, hidden.shape[3]).masked_fill_(hidden, value)
    return x


def unit_blocks(chosen: Tensor, sizes: UnitSizes, dim: int) -> list[slice]:
    """Blocks of the rows [B * Hc * N] whose results have about _UNIT_RESULTS numbers."""
    rows, pairs = chosen.shape[:3].numel(), chosen.shape[3] if sizes.per == 1 else sizes.units
    step = max(1, _UNIT_RESULTS // max(1, pairs * sizes.group * dim))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def pair_tiles(chosen: Tensor, first: int, sizes: UnitSizes) -> tuple[PairTiles, Tensor]:
    """The pairs of rows `first`.. with lists [rows, n] by (batch, head of lists, unit), and the place of each."""
    masks = None
    if sizes.per > 1:
        chosen, masks = taken_together(chosen, sizes.per, -(-sizes.keys * sizes.per // sizes.unit), sizes.units)
    real = (chosen >= 0) & (chosen < sizes.units)
    sequence = (first + torch.arange(len(chosen))).unsqueeze(1) // max(1, sizes.rows)  # [B, Hc] as one number
    key, order = torch.sort(
        (sequence * sizes.units + chosen).masked_fill(~real, torch.iinfo(torch.int64).max).flatten(), stable=True
    )
    count = int(real.sum())
    found, sharing = torch.unique_consecutive(key[:count], return_counts=True)
    pairs = _pairs_of_tile(count, len(found), sizes)
    cuts = (sharing + pairs - 1) // pairs
    segment = torch.repeat_interleave(cuts)
    end = sharing.cumsum(0)
    within = torch.arange(len(segment)) - (cuts.cumsum(0) - cuts)[segment]
    at = ((end - sharing)[segment] + within * pairs).unsqueeze(1) + torch.arange(pairs)
    hidden = at >= end[segment].unsqueeze(1)
    pair = order[at.clamp(max=max(0, count - 1))]
    place = torch.full((chosen.numel(),), pair.numel())
    place[pair[~hidden]] = torch.arange(pair.numel()).view(pair.shape)[~hidden]
    key = found[segment]
    sequence, unit = key // max(1, sizes.units), key % max(1, sizes.units)
    kv_head = sequence * sizes.kv_heads // sizes.lists  # lists are a multiple of the kv heads: [B, Hc] -> [B, Hk]
    row = first + pair // max(1, chosen.shape[1])
    masks = None if masks is None else masks.flatten()[pair]
    tiles = PairTiles(row, hidden, sequence % sizes.lists, unit, kv_head * sizes.units + unit, masks)
    return tiles, place.view(chosen.shape)


def _pairs_of_tile(count: int, units: int, sizes: UnitSizes) -> int:
    """A power of two, at most what a unit has on average: so at least half of the places are taken."""
    most = min(_UNIT_TILE // sizes.group, _UNIT_LOGITS // (sizes.group * sizes.unit))
    pairs = min(most, count // max(1, units))
    return 1 << max(0, pairs.bit_length() - 1)


def pair_chunks(
    tiles: PairTiles, q_rows: Tensor, k_units: Tensor, tests: UnitTests, form: Logits, sizes: UnitSizes
) -> Iterator[PairChunk]:
    count, pairs = tiles.row.shape
    step = max(1, _UNIT_LOGITS // (pairs * sizes.group * sizes.unit))
    for first in range(0, count, step):
        part = part_of_tiles(tiles, slice(first, first + step))
        q, k = pair_rows(q_rows, part.row), k_units.index_select(0, part.table)
        logits, slope = q @ k.transpose(1, 2), None
        if form.softcap is not None:
            bent = logits.div_(form.softcap).tanh_()
            logits, slope = bent * form.softcap, 1 - bent * bent
        hidden, added = _unit_tests(part, tests, sizes)
        if added is not None:
            logits.view(*part.row.shape, sizes.group, sizes.unit).add_(added)
        place = slice(first * pairs, (first + len(part.row)) * pairs)
        yield PairChunk(
            slice(first, first + step),
            place,
            part.row,
            part.table,
            hide(logits, hidden, -torch.inf),
            slope,
            hidden,
            q,
            k,
        )


def part_of_tiles(tiles: PairTiles, part: slice) -> PairTiles:
    row, hidden, head, unit, table, masks = tiles
    masks = None if masks is None else masks[part]
    return PairTiles(row[part], hidden[part], head[part], unit[part], table[part], masks)


class OnPairs(NamedTuple):
    """Query positions [rows, 1], keys [rows, unit] and heads [G, rows, 1] of the pairs of some tiles, for a function.

    by_tile: what the function gives, as [tiles, pairs, 1 or G, 1 or unit].
    """

    places: tuple[Tensor, Tensor, Tensor]
    by_tile: Callable[[Tensor], Tensor]
    beyond: Tensor | None  # keys past the end, [rows, unit]


def on_pairs_of(tiles: PairTiles, sizes: UnitSizes) -> OnPairs:
    n, pairs = tiles.row.shape
    rows = n * pairs
    q = (tiles.row % sizes.rows + sizes.q_origin).view(rows, 1)
    k = tiles.unit.view(n, 1, 1) * sizes.unit + torch.arange(sizes.unit)
    k = k.expand(n, pairs, -1).reshape(rows, -1)
    heads = tiles.head.view(1, n, 1) * sizes.group + torch.arange(sizes.group).view(-1, 1, 1)
    heads = heads.expand(-1, n, pairs).reshape(-1, rows, 1)
    rest = sizes.units * sizes.unit > sizes.keys

    def by_tile(x: Tensor) -> Tensor:
        x = x.broadcast_to(torch.broadcast_shapes(x.shape, (1, rows, sizes.unit)))
        if x.dim() == 4:  # each row keeps what belongs to its batch row
            batch = tiles.row.flatten() // (sizes.lists * sizes.rows)
            x = x.expand(sizes.batch, -1, -1, -1)[batch, :, torch.arange(rows)].transpose(0, 1)
        by_head: Tensor = x.unflatten(1, (n, pairs))
        return by_head.permute(1, 2, 0, 3)

    inside = k.clamp(max=sizes.keys - 1) if rest else k
    return OnPairs((q, inside, heads), by_tile, k >= sizes.keys if rest else None)


def _unit_tests(tiles: PairTiles, tests: UnitTests, sizes: UnitSizes) -> tuple[Tensor, Tensor | None]:
    """Which logits are hidden, and what is added to them: [tiles, pairs, 1 or G, unit]."""
    n, pairs = tiles.row.shape
    on_pairs = on_pairs_of(tiles, sizes)
    hidden = ~on_pairs.by_tile(tests.visible(*on_pairs.places)) | tiles.hidden.view(n, pairs, 1, 1)
    if on_pairs.beyond is not None:
        hidden = hidden | on_pairs.beyond.view(n, pairs, 1, -1)
    if tiles.masks is not None:
        bit = torch.arange(sizes.unit) // (sizes.unit // sizes.per)
        hidden = hidden | (tiles.masks[..., None] >> bit & 1).eq(0).unsqueeze(2)
    if tests.bias is None:
        return hidden, None
    added = on_pairs.by_tile(tests.bias(*on_pairs.places))
    return hidden | (added == -torch.inf), added
