"""Block lists for sets that only the values of tensors tell, and the membership maps of given and random sets.

Everything stays on the device, with fixed sizes and no host sync. Index tensors are 4-D, [S or 1, H or 1, rows, keys].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.entries.entries import Cells, entry_count, entry_counts
from spdsl.runtime.sequences import Layout

_PIECE = 1 << 22  # pairs that are read at once to find the bounds of tiles: with copies of int64 about 100 MB


class BlockLists(NamedTuple):
    """Blocks to visit, int32: `full` and `partial` [S, H, tiles, width] hold block numbers, the counts [S, H, tiles].

    Full blocks come without a mask, so they lie inside the sequence. No block is in both lists. `sequence` and `head`
    are strides in lists (0: shared).
    """

    full: Tensor
    full_count: Tensor
    partial: Tensor
    partial_count: Tensor
    width: int
    sequence: int
    head: int


class Tiles(NamedTuple):
    """The corners of all tiles of all sequences: rows [S, 1, tiles, 1], keys [S, 1, 1, blocks], ends inclusive.

    `inside` [S, 1, tiles, blocks] tells which tiles exist, `whole_rows` and `whole_keys` which lie in it entirely.
    """

    q_first: Tensor
    q_last: Tensor
    k_first: Tensor
    k_last: Tensor
    length: Tensor  # [S, 1, 1, 1]
    inside: Tensor
    whole_rows: Tensor
    whole_keys: Tensor
    block_m: int
    block_n: int


def tiles_of(
    q_origin: Tensor, rows: Tensor, k_origin: Tensor, keys: Tensor, sizes: tuple[int, int, int, int],
    length: Tensor | None = None,
) -> Tiles:  # fmt: skip
    """Tiles of sequences whose origins and counts are [S]; sizes = (row tiles, BLOCK_M, key blocks, BLOCK_N).

    length [S] in tokens, where keys or rows are cells of them.
    """
    tiles, block_m, blocks, block_n = sizes
    device = rows.device
    q_origin, rows, k_origin, keys = (x.view(-1, 1, 1, 1) for x in (q_origin, rows, k_origin, keys))
    row = (torch.arange(tiles, device=device) * block_m).view(1, 1, -1, 1)
    key = (torch.arange(blocks, device=device) * block_n).view(1, 1, 1, -1)
    row_end, key_end = torch.minimum(row + block_m, rows), torch.minimum(key + block_n, keys)
    length = torch.maximum(k_origin + keys, q_origin + rows) if length is None else length.view(-1, 1, 1, 1)
    inside = (row < rows) & (key < keys)
    return Tiles(
        q_origin + row, q_origin + row_end - 1, k_origin + key, k_origin + key_end - 1, length, inside,
        row + block_m <= rows, key + block_n <= keys, block_m, block_n,
    )  # fmt: skip


def sequence_counts(q: Tensor, k: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(position of row 0, rows, position of key 0, keys) of every sequence, each [S], on the device."""
    if layout.k_spans is not None:
        keys = layout.k_spans[:, 1]
        rows = torch.full_like(keys, q.shape[2]) if layout.q_spans is None else layout.q_spans[:, 1]
        return keys - rows, rows, torch.zeros_like(keys), keys
    rows, keys = (torch.full((q.shape[0],), size, device=q.device) for size in (q.shape[2], k.shape[2]))
    if layout.q_offset is None or layout.k_offset is None:
        return keys - rows, rows, torch.zeros_like(keys), keys
    return torch.full_like(rows, layout.q_offset), rows, torch.full_like(keys, layout.k_offset), keys


def cell_tiles(q: Tensor, layout: Layout, cells: Cells, sizes: tuple[int, int, int, int]) -> Tiles:
    """Tiles of rows and entries of all sequences."""
    if layout.k_spans is None:
        origin = layout.keys - q.shape[2] if layout.q_offset is None else layout.q_offset
        length = max(layout.keys, origin + q.shape[2])
        known = (origin, q.shape[2], entry_count(layout.keys, cells), length)
        origins, rows, entries, lengths = (torch.full((q.shape[0],), size, device=q.device) for size in known)
    else:
        lengths = layout.k_spans[:, 1]
        rows = torch.full_like(lengths, q.shape[2]) if layout.q_spans is None else layout.q_spans[:, 1]
        origins = lengths - rows if layout.q_origins is None else layout.q_origins
        entries = entry_counts(lengths, cells)
    return tiles_of(origins, rows, torch.zeros_like(rows), entries, sizes, lengths)


def row_shift(q: Tensor, layout: Layout) -> Tensor | int:
    """What leads from a position to its row in q [B, H, rows, D], where sequences may lie packed or padded.

    [S, 1, 1, 1], or one number for all sequences.
    """
    if layout.k_spans is None:
        return q.shape[2] - layout.keys if layout.q_offset is None else -layout.q_offset
    keys = layout.k_spans[:, 1]
    start, rows = (0, q.shape[2]) if layout.q_spans is None else layout.q_spans.unbind(1)
    return (start + rows - keys).view(-1, 1, 1, 1)


def per_sequence(x: Tensor, axis: int, spans: Tensor, longest: int) -> Tensor:
    """A packed token axis as one row per sequence: [1 or S, .., T, ..] -> [S, .., longest, ..], 0 past the end."""
    start, count = spans[:, 0].long(), spans[:, 1].long()
    step = torch.arange(longest, device=x.device)
    index = (start[:, None] + step).clamp(max=max(0, x.shape[axis] - 1))
    moved = x.movedim(axis, 1).expand(len(spans), *x.movedim(axis, 1).shape[1:])
    rows = moved[torch.arange(len(spans), device=x.device)[:, None], index]
    inside = (step < count[:, None]).view(len(spans), longest, *[1] * (rows.dim() - 2))
    return torch.where(inside, rows, torch.zeros((), dtype=x.dtype, device=x.device)).movedim(1, axis)


def block_lists(may: Tensor, must: Tensor, tiles: Tiles, heads: int) -> tuple[BlockLists, BlockLists]:
    """Key blocks of every row tile, and its transpose: row tiles of every key block."""
    visited = may & tiles.inside
    full = visited & must & tiles.whole_keys  # without a mask, whatever is loaded counts
    of_rows = _lists(full, visited & ~full, heads)
    full = (full & tiles.whole_rows).transpose(2, 3)
    return of_rows, _lists(full, visited.transpose(2, 3) & ~full, heads)


def _lists(full: Tensor, partial: Tensor, heads: int) -> BlockLists:
    full_numbers, full_count = _compact(full)
    partial_numbers, partial_count = _compact(partial)
    own_heads, tiles, width = full.shape[1:]
    sequence = own_heads * tiles if full.shape[0] > 1 else 0
    head = 0 if own_heads == 1 and heads > 1 else tiles
    return BlockLists(full_numbers, full_count, partial_numbers, partial_count, width, sequence, head)


def _compact(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the true entries of each row first, ascending; and how many there are."""
    numbers = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return numbers.int().contiguous(), chosen.sum(-1, dtype=torch.int32).contiguous()


def read(x: Tensor, *indices: Tensor | int) -> Tensor:
    """x [S or 1, ...] at 4-D indices or one number, one per axis after the first; outside of x it is 0.

    Numbers of 16 bits come out with 32.
    """
    at: list[Tensor] = [torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)]
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, place in enumerate(indices, 1):
        # Not without axes: an index of one number is read on the host.
        index = place if isinstance(place, Tensor) else torch.full((1, 1, 1, 1), place, device=x.device)
        at.append(index.clamp(0, max(0, x.shape[axis] - 1)))
        inside = inside & (index >= 0) & (index < x.shape[axis])
    if 0 in x.shape:
        return x.new_zeros(torch.broadcast_shapes(inside.shape, at[0].shape))
    found = torch.where(inside, x[tuple(at)], torch.zeros((), dtype=x.dtype, device=x.device))
    return found.float() if x.dtype in (torch.float16, torch.bfloat16) else found


def row_extremes(
    x: Tensor, tiles: Tiles, *before: Tensor | int, after: tuple[Tensor | int, ...] = (), shift: Tensor | int = 0
) -> tuple[Tensor, Tensor]:
    """Least and greatest value of x over the positions of each row tile: [S or 1, H or 1, tiles, 1].

    `before` and `after` are 4-D indices, or numbers, of the axes before and after that of positions (heads). Where x
    has rows instead, `shift` leads to them.
    """
    step = torch.arange(tiles.block_m, device=x.device).view(1, 1, 1, -1)
    position = torch.minimum(tiles.q_first + step, tiles.q_last)  # [S, 1, tiles, block_m]
    values = read(x, *before, position + shift, *after)
    return values.amin(3, keepdim=True), values.amax(3, keepdim=True)


def key_extremes(
    x: Tensor, tiles: Tiles, *before: Tensor | int, after: tuple[Tensor | int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Least and greatest value of x over the positions of each key block: [S or 1, H or 1, 1, blocks]."""
    step = torch.arange(tiles.block_n, device=x.device).view(1, 1, -1, 1)
    position = torch.minimum(tiles.k_first + step, tiles.k_last)  # [S, 1, block_n, blocks]
    values = read(x, *before, position, *after)
    return values.amin(2, keepdim=True), values.amax(2, keepdim=True)


def pair_extremes(tiles: Tiles, values: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Least and greatest of `values` of positions q [S, 1, rows, 1] and k [S, 1, 1, keys] over the pairs of each tile:
    [S, H or 1, tiles, blocks].

    They are read a piece at a time: as many tiles as have PIECE pairs, or one tile of each sequence and head.
    """
    device = tiles.q_first.device
    q = torch.minimum(tiles.q_first + torch.arange(tiles.block_m, device=device), tiles.q_last)
    k = tiles.k_first.transpose(2, 3) + torch.arange(tiles.block_n, device=device)
    k = torch.minimum(k, tiles.k_last.transpose(2, 3))
    lead = values(q[:, :, :0].flatten(2)[..., None], k.flatten(2)[:, :, None]).shape[:2]
    pairs = max(1, lead.numel() * tiles.block_m * tiles.block_n)
    across = max(1, min(k.shape[2], _PIECE // pairs))
    down = max(1, _PIECE // (pairs * across))

    def piece(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        found = values(q.flatten(2)[..., None], k.flatten(2)[:, :, None])
        found = found.expand(*lead, q.shape[2] * q.shape[3], k.shape[2] * k.shape[3])
        found = found.unflatten(3, k.shape[2:]).unflatten(2, q.shape[2:])
        return found.amin((3, 5)), found.amax((3, 5))

    rows = [zip(*(piece(own, some) for some in k.split(across, 2)), strict=True) for own in q.split(down, 2)]
    low, high = zip(*([torch.cat(part, 3) for part in row] for row in rows), strict=True)
    return torch.cat(low, 2), torch.cat(high, 2)


def maximum(a: Tensor | int, b: Tensor | int) -> Tensor:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def minimum(a: Tensor | int, b: Tensor | int) -> Tensor:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def above_of(a: Tensor | int, b: Tensor | int) -> Tensor:
    """The derivative of maximum(a, b) by a: both sides have a half of a tie."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return (a > b) + 0.5 * (a == b)


def exact(x: Tensor | int) -> Tensor:
    """Whole numbers, before a fraction or a root is taken of them: PyTorch would take it in float32."""
    return torch.as_tensor(x, dtype=torch.float64)


def root(x: float) -> float:
    """The square root; NaN below 0, as on tensors."""
    return math.sqrt(x) if x >= 0 else math.nan


def bounds_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of the whole tensor, and of the 0 that a read beyond its ends gives, per sequence."""
    flat = torch.nn.functional.pad(x.flatten(1), (0, 1))
    return flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)


def pooled(
    members: Tensor, head: Tensor, rows: tuple[Tensor, Tensor], units: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Least and greatest value (0 or 1) of a membership map over rectangles of (row tiles, units), ends inclusive."""
    sums = torch.nn.functional.pad(members.int().cumsum(2).cumsum(3), (1, 0, 1, 0))
    most_row, most_unit = members.shape[2], members.shape[3]
    top, bottom = rows[0].clamp(0, most_row), (rows[1] + 1).clamp(0, most_row)
    left, right = units[0].clamp(0, most_unit), (units[1] + 1).clamp(0, most_unit)
    count = _plain(sums, head, bottom, right) - _plain(sums, head, top, right)
    count = count - _plain(sums, head, bottom, left) + _plain(sums, head, top, left)
    area = (rows[1] - rows[0] + 1) * (units[1] - units[0] + 1)
    return (count == area).int(), (count > 0).int()


def _plain(x: Tensor, *indices: Tensor) -> Tensor:
    sequence = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    return x[(sequence, *indices)]


def membership(units: Tensor, most: int) -> Tensor:
    """Unit indices [S, H, row tiles, width], padded with -1 -> bool [S, H, row tiles, most].

    Order and repetition do not matter; indices outside [0, most) are dropped.
    """
    valid = (units >= 0) & (units < most)
    slots = torch.where(valid, units, most).long()
    found = torch.zeros(*units.shape[:3], most + 1, dtype=torch.bool, device=units.device)
    return found.scatter_(3, slots, True)[..., :most].contiguous()


def random_units(
    count: int, seed: int, heads: int, rows: int, unit: int, causal: bool, tiles: int, units: int, keys: Tensor | None
) -> Tensor:
    """The membership map of `random`: bool [1 or S, heads, tiles, units].

    Of the units that the last row of a tile may see, the `count` with the lowest hash of (seed, head, tile, unit).
    Without `causal` those are the units of the sequence, whose `keys` [S] must be given.
    """
    device = None if keys is None else keys.device
    # A causal draw ranges over all units that a tile's last row will ever see, however many keys there are by now.
    drawn = max(units, -(-tiles * rows // unit)) if causal else units
    head = torch.arange(heads, device=device).view(1, -1, 1, 1)
    tile = torch.arange(tiles, device=device).view(1, 1, -1, 1)
    number = torch.arange(drawn, device=device).view(1, 1, 1, -1)
    rank = _hash(_hash(_hash(torch.full((1, 1, 1, 1), seed, device=device) + head) + tile) + number)
    none = torch.iinfo(torch.int64).max
    if causal:
        rank = rank.masked_fill(number * unit > (tile + 1) * rows - 1, none)
    elif keys is not None:
        rank = rank.masked_fill(number * unit >= keys.view(-1, 1, 1, 1), none)
    chosen = rank.argsort(dim=-1, stable=True)[..., :count]
    found = torch.zeros_like(rank, dtype=torch.bool).scatter_(3, chosen, True)
    return (found & (rank < none))[..., :units].contiguous()


def _hash(x: Tensor) -> Tensor:
    """A fixed mixing of 63-bit integers (xorshift-multiply), the same on every machine."""
    x = (x + 0x1E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0x3F58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x14D049BB133111EB) & 0x7FFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) & 0x7FFFFFFFFFFFFFFE
