"""Sets of units for tiles of queries: a list for each tile, and the membership map that tests look up.

Tiles count from position 0 of a sequence: a call that begins or ends within one holds a part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.call.lists import membership, sequence_counts
from spdsl.runtime.sequences import Layout


def sequences_of(q: Tensor, layout: Layout) -> int:
    """Of a call, packed or not."""
    spans = layout.q_spans if layout.k_spans is None else layout.k_spans
    return q.shape[0] if spans is None else len(spans)


def row_tiles(q: Tensor, layout: Layout, rows: int) -> int:
    """Tiles of `rows` queries that hold one of a sequence; the most, where only the device knows its position."""
    if layout.k_spans is not None:
        longest = q.shape[2] if layout.q_spans is None else layout.longest
        return (longest + 2 * rows - 2) // rows
    origin = layout.q_offset if layout.q_offset is not None else layout.keys - q.shape[2]
    return (origin + q.shape[2] - 1) // rows - origin // rows + 1


def tile_lists(q: Tensor, layout: Layout, lists: int, rows: int, most: int) -> Tensor:
    """Room for the lists of all tiles, int32 [sequences, lists, row tiles, most]: -1, which no unit is."""
    shape = sequences_of(q, layout), lists, row_tiles(q, layout, rows), most
    return torch.full(shape, -1, dtype=torch.int32, device=q.device)


def tile_map(
    chosen: Tensor, rows: int, units: int, q: Tensor, k: Tensor, layout: Layout, for_all: bool = False
) -> tuple[Tensor, Tensor]:
    """Lists [sequences or 1, heads, row tiles, n] -> (membership map uint8 [.., row tiles, units], the number of a
    sequence's first tile, int32 [sequences]). `for_all`: one list, also where queries begin before position 0.
    """
    q_origin, *_ = sequence_counts(q, k, layout)
    chosen = chosen.expand(-1, -1, 2, -1) if for_all else chosen
    return membership(chosen, units).view(torch.uint8), torch.div(q_origin, rows, rounding_mode="floor").int()
