"""The sizes of one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spdsl.ir.pattern import Pattern, Query, Stream

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one call. Row i has position q_origin + i, key j position k_origin + j; `kv_heads` of the first stream."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    q_origin: int
    k_origin: int

    @property
    def length(self) -> int:
        return max(self.tokens, self.q_origin + self.rows)

    @property
    def tokens(self) -> int:
        """From position 0 to the last key."""
        return self.k_origin + self.keys

    def first_tile(self, rows: int) -> int:
        """The tile of `rows` queries that holds the first query; tile 0 begins at position 0."""
        return self.q_origin // rows

    def tiles(self, rows: int) -> int:
        """Tiles of `rows` queries, of which the first and the last may hold less."""
        return (self.q_origin + self.rows - 1) // rows - self.first_tile(rows) + 1

    def ends(self, rows: int) -> Tensor:
        """The position of the last query of each cell of `rows` that the call holds: of each query for 1."""
        last = (self.first_tile(rows) + 1 + torch.arange(self.tiles(rows))) * rows - 1
        return last.clamp(max=self.q_origin + self.rows - 1)

    def positions(self, query: Query) -> Tensor:
        """Where the rows of a query stand: each at its token, or at the last one of its cell; or the last ones."""
        found = self.ends(query.width)
        return found if query.tail is None else found[-query.tail.count :]

    def cell_of_rows(self, rows: int) -> Tensor:
        """The number of the cell of each query, from the first on."""
        position = self.q_origin + torch.arange(self.rows)
        return torch.div(position, rows, rounding_mode="floor") - self.first_tile(rows)

    def units(self, unit: int) -> int:
        """Units of `unit` tokens from position 0 on, the last one cut by the last key."""
        return -(-self.tokens // unit)


def sizes_of(pattern: Pattern, inputs: Inputs, q_offset: int | None = None, k_offset: int | None = None) -> Sizes:
    """The sizes of the inputs; by default the last query stands at the last key."""
    q = inputs[next(query.name for query in pattern.inputs if isinstance(query, Query))]
    streams = (stream for stream in pattern.inputs if isinstance(stream, Stream) and stream.compress is None)
    k = inputs[next(streams).key_argument]
    k_origin = k_offset or 0
    q_origin = k_origin + k.shape[2] - q.shape[2] if q_offset is None else q_offset
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q_origin, k_origin)
