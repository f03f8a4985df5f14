"""From the units that each query chose to what kernels walk: the union over neighbouring queries, and its inverse.

Everything stays on the device, with sizes known from shapes alone and no host sync. Memory is O(queries * units
chosen).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.call.lists import membership
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tuning.unit_configs import mask_words


class UnitTiles(NamedTuple):
    """Tiles of `lanes` neighbouring queries, those of all sequences in a row, and the units that any of them chose.

    Bit i of a mask tells whether query i of the tile chose the unit.
    """

    units: Tensor  # int32 [H, tiles, width], ascending
    masks: Tensor  # int64 [H, tiles, width], or [H, tiles, width, words]: see `whole_units`
    counts: Tensor  # int32 [H, tiles]
    first: Tensor  # int32 [S]: the number of a sequence's first tile
    tiles: int
    width: int


class UnitJobs(NamedTuple):
    """The inverse: for each unit of each sequence the tiles that visit it, cut into jobs of bounded length.

    Of H groups of list heads; the tiles of a group are numbered in a row. A unit with one job writes its gradients
    itself; those of several jobs meet in a buffer and are added in order.
    """

    places: Tensor  # int64 [H, entries]: tile * width + number of the unit in its list, grouped by unit
    sequence: Tensor  # int32 [H, jobs]; -1: no job
    unit: Tensor  # int32 [H, jobs]: counted from the sequence's first key
    begin: Tensor  # int32 [H, jobs]: the entries begin .. end - 1
    end: Tensor
    slot: Tensor  # int32 [H, jobs]: place in the buffer; -1: none
    parts: Tensor  # int32 [H, jobs]: with the first job of a unit that has several, their number, else 0
    slots: int


def unit_tiles(chosen: Tensor, lanes: int, unit: int, layout: Layout) -> UnitTiles:
    """Lists [B, H, N, n] (ascending, -1 at the end) -> the union over every `lanes` queries of a sequence.

    Numbers of units of `unit` keys past the end of a sequence are dropped.
    """
    rows, inside, first = _lane_rows(chosen, lanes, layout)
    most = max(1, -(-layout.keys // unit))
    room: int | Tensor = most if layout.k_spans is None else _rooms(unit, layout.k_spans, first, len(rows))
    heads, wanted = chosen.shape[1], chosen.shape[3]
    flat = chosen.transpose(0, 1).flatten(1, 2)  # [H, B * N, n]
    own = flat[:, rows.flatten()].view(heads, *rows.shape, wanted)  # [H, tiles, lanes, n]
    lane = torch.arange(lanes, device=chosen.device).view(1, 1, -1, 1)
    end = most * lanes
    keys = torch.where((own >= 0) & (own < room) & inside[None, :, :, None], own.long() * lanes + lane, end)
    keys = keys.flatten(2).sort(dim=-1).values
    number, lane = keys // lanes, keys % lanes
    new = torch.ones_like(keys, dtype=torch.bool)
    new[..., 1:] = number[..., 1:] != number[..., :-1]
    valid = keys < end
    width = max(1, min(keys.shape[-1], most))
    slot = torch.where(valid, new.cumsum(-1) - 1, width)
    units = torch.full((*keys.shape[:2], width + 1), -1, dtype=torch.int32, device=chosen.device)
    units.scatter_(2, slot, torch.where(valid, number, -1).int())
    masks = torch.zeros(*keys.shape[:2], width + 1, dtype=torch.int64, device=chosen.device)
    masks.scatter_add_(2, slot, torch.ones_like(lane) << lane)  # each lane names a unit once: a sum is a union
    counts = (new & valid).sum(-1, dtype=torch.int32)
    units, masks = units[..., :width].contiguous(), masks[..., :width].contiguous()
    return UnitTiles(units, masks, counts, first, rows.shape[0], width)


def whole_units(tiles: UnitTiles, per: int, lanes: int, most: int) -> UnitTiles:
    """The same tiles by whole units, each of `per` neighbouring units, of which a sequence has `most` or less.

    Bit `number * lanes + lane` of a mask, over several words, tells whether query `lane` of the tile chose that unit of
    the whole one: `lanes` is a power of two up to 64, so the bits of a unit lie in one word.
    """
    valid = tiles.units >= 0
    whole = torch.where(valid, tiles.units // per, -1)
    new = valid.clone()
    new[..., 1:] &= whole[..., 1:] != whole[..., :-1]
    width, words = max(1, min(tiles.width, most)), mask_words(per, lanes)
    slot = torch.where(valid, new.cumsum(-1) - 1, width)
    shape = tiles.units.shape[:2]
    units = torch.full((*shape, width + 1), -1, dtype=torch.int32, device=whole.device)
    units.scatter_(2, slot, whole)
    bit = torch.where(valid, tiles.units % per, 0) * lanes
    masks = torch.zeros(*shape, (width + 1) * words, dtype=torch.int64, device=whole.device)
    masks.scatter_add_(2, slot * words + bit // 64, torch.where(valid, tiles.masks << (bit % 64), 0))
    masks = masks.view(*shape, width + 1, words)
    units, masks = units[..., :width].contiguous(), masks[:, :, :width].contiguous()
    return tiles._replace(units=units, masks=masks, counts=new.sum(-1, dtype=torch.int32), width=width)


def _rooms(unit: int, k_spans: Tensor, first: Tensor, tiles: int) -> Tensor:
    """Units of each tile's sequence, [1, tiles, 1, 1]."""
    return ((k_spans[:, 1] + (unit - 1)) // unit)[_sequences(first, tiles)].view(1, -1, 1, 1)


def _sequences(first: Tensor, tiles: int) -> Tensor:
    """The sequence of each tile."""
    tile = torch.arange(tiles, device=first.device, dtype=torch.int32)
    return torch.bucketize(tile, first, right=True) - 1


def _lane_rows(chosen: Tensor, lanes: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """-> rows of every tile in the flattened [B * N], which of them exist [tiles, lanes], first tile [S]."""
    batch, _, count, _ = chosen.shape
    device = chosen.device
    step = torch.arange(lanes, device=device)
    whole = -(-count // lanes)
    if layout.q_spans is None or batch > 1:  # every sequence has a batch row of its own
        first = torch.arange(batch, device=device, dtype=torch.int32) * whole
        start, counts = _row_spans(layout, batch, count, device)
        tile = torch.arange(batch * whole, device=device)
        sequence, number = tile // max(1, whole), tile % max(1, whole)
        origin = start[sequence] + sequence * count
    else:
        start, counts = _row_spans(layout, batch, count, device)
        of_sequence = -(-counts // lanes)
        ends = of_sequence.cumsum(0)
        first = (ends - of_sequence).int()
        tile = torch.arange(whole + len(counts), device=device)  # no sequence wastes more than one tile
        sequence = torch.bucketize(tile, ends, right=True).clamp(max=len(counts) - 1)
        number, origin = tile - first[sequence], start[sequence]
    index = number[:, None] * lanes + step
    inside = (index >= 0) & (index < counts[sequence][:, None])
    return torch.where(inside, origin[:, None] + index, 0), inside, first


def _row_spans(layout: Layout, batch: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(start, count) of each sequence's rows, int64 [S]."""
    if layout.q_spans is not None:
        return layout.q_spans[:, 0].long(), layout.q_spans[:, 1].long()
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    return zeros, zeros + count


def unit_jobs(tiles: UnitTiles, unit: int, heads: int, batch: int, layout: Layout, longest: int) -> UnitJobs:
    """The inverse of `tiles` for units of `unit` keys, of `heads` groups of lists, in jobs of at most `longest` tiles.

    `batch`: rows of the batch that the keys have.
    """
    device = tiles.units.device
    first_unit, most = _first_units(unit, batch, layout, tiles.first)
    number = _numbered(tiles, first_unit, most).view(heads, -1)
    order = number.argsort(dim=-1, stable=True)
    edges = torch.arange(most + 1, device=device).expand(heads, -1).contiguous()
    starts = torch.searchsorted(number.gather(1, order), edges)  # [H, units + 1]
    parts = -(-(starts[:, 1:] - starts[:, :-1]) // longest)
    ends = parts.cumsum(1)
    jobs = most + number.shape[1] // longest
    job = torch.arange(jobs, device=device).expand(heads, -1).contiguous()
    own = torch.searchsorted(ends, job, right=True)
    exists, own = own < most, own.clamp(max=most - 1)
    parts, part = parts.gather(1, own), job - (ends - parts).gather(1, own)
    begin = starts.gather(1, own) + part * longest
    end = torch.minimum(begin + longest, starts.gather(1, own + 1))
    in_buffer = exists & (parts > 1)
    sequence = torch.bucketize(own, first_unit, right=True) - 1
    return UnitJobs(
        order, torch.where(exists, sequence, -1).int(), (own - first_unit[sequence]).int(),
        torch.where(exists, begin, 0).int(), torch.where(exists, end, 0).int(),
        torch.where(in_buffer, in_buffer.cumsum(1) - 1, -1).int(),
        torch.where(in_buffer & (part == 0), parts, 0).int(), 2 * (number.shape[1] // longest),
    )  # fmt: skip


def _numbered(tiles: UnitTiles, first_unit: Tensor, most: int) -> Tensor:
    """The units of the tiles [H, tiles, width] numbered over all sequences; `most` where there is none."""
    sequence = _sequences(tiles.first, tiles.tiles)
    return torch.where(tiles.units >= 0, tiles.units + first_unit[sequence].view(1, -1, 1), most)


def _first_units(unit: int, batch: int, layout: Layout, sequence: Tensor) -> tuple[Tensor, int]:
    """-> the number of each sequence's first unit [S], and how many units all sequences have at most."""
    if layout.k_spans is None or batch > 1:
        width = max(1, -(-layout.keys // unit))
        return torch.arange(len(sequence), device=sequence.device) * width, len(sequence) * width
    counts = -(-layout.k_spans[:, 1] // unit)
    return counts.cumsum(0) - counts, layout.keys // unit + len(sequence)


def unit_mask(chosen: Tensor, unit: int, keys: int, heads: int) -> Tensor:
    """Lists [B, H, N, n] -> bool [B, heads, N, keys]: which keys lie in a unit of the list."""
    units = max(1, -(-keys // unit))
    of_key = torch.arange(keys, device=chosen.device) // unit
    return membership(chosen, units)[..., of_key].repeat_interleave(heads // chosen.shape[1], 1)
