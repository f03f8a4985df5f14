"""Which units a tile of queries may choose, and which are forced, where tensors or other sets tell: token by token.

A tile asks for its last row, whether or not the call holds it. A unit is in a set if one of its tokens is, for any head
of the list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.call.lists import sequence_counts
from spdsl.runtime.call.tile_maps import row_tiles
from spdsl.runtime.language import tl
from spdsl.runtime.sequences import Layout, length_of
from spdsl.runtime.tiles.kernel import jit

_AT_ONCE = 1 << 22  # tests of a tile and a token

Mask = Callable[..., tuple[Tensor, Tensor]]  # of positions q and k, heads, length: forced, may be chosen


class UnitSets(NamedTuple):
    """For a kernel: uint8 [sequences, lists, row tiles, units]: 0 may not be chosen, 1 may, 2 is forced."""

    data: Tensor
    sequence: int
    lists: int
    units: int


def sets_of(sets: Tensor, sequences: int) -> UnitSets:
    """What `unit_sets` made, for a kernel."""
    sets = sets.contiguous()
    return UnitSets(sets, 0 if sets.shape[0] < sequences else sets.stride(0), sets.shape[2], sets.shape[3])


@jit
def load_sets(sets, s, list_head, tile, unit):
    """Those of units [1, units] of one tile, or of tiles [tiles, 1]."""
    row = tl.cast(s, tl.int64) * sets.sequence + (tl.cast(list_head, tl.int64) * sets.lists + tile) * sets.units
    return tl.load(sets.data + row + unit, mask=(tile < sets.lists) & (unit >= 0) & (unit < sets.units), other=0)


def unit_sets(
    mask: Mask, q: Tensor, k: Tensor, layout: Layout, lists: int, sizes: tuple[int, int, int, int], *t: Any
) -> Tensor:
    """uint8 [sequences, lists, row tiles, units]: 1 for units that may be chosen, 2 for those that are forced, else 0.

    `sizes`: queries of a tile (0: all of a sequence), tokens of a unit, units, and after how many tokens of a unit the
    mask may change.
    """
    rows, unit, units, step = sizes
    q_origin, q_count, _, keys = (x.view(-1, 1, 1, 1) for x in sequence_counts(q, k, layout))
    heads, device = q.shape[1], q.device
    token = torch.arange(0, units * unit, step, device=device).view(1, 1, 1, -1)
    head = torch.arange(heads, device=device).view(1, -1, 1, 1)
    length = length_of(q, k, layout)
    length = length.view(-1, 1, 1, 1) if isinstance(length, Tensor) else length
    last_rows = q_origin + q_count - 1
    if rows:
        tiles = torch.div(q_origin, rows, rounding_mode="floor") + 1
        last_rows = (tiles + torch.arange(row_tiles(q, layout, rows), device=device).view(1, 1, -1, 1)) * rows - 1
    shape = (len(q_origin), heads, -1, token.shape[3])

    def of_units(found: Tensor, tiles: int) -> Tensor:
        found = (found & (token < keys)).expand(shape[0], heads, tiles, shape[3])
        of_heads: Tensor = found.unflatten(3, (units, -1)).any(4)
        return of_heads.unflatten(1, (lists, -1)).any(2)  # type: ignore[no-any-return]

    def piece(last: Tensor) -> Tensor:
        forced, may = (of_units(found, last.shape[2]) for found in mask(last, token, head, length, *t))
        return may.to(torch.uint8) * (1 + (forced & may).to(torch.uint8))

    at_once = max(1, _AT_ONCE // max(1, shape[0] * heads * shape[3]))
    return torch.cat([piece(own) for own in last_rows.split(at_once, 2)], 2)
