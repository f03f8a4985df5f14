"""Queries of cells in torch: one row for each cell of `width` neighbouring queries, and rows back to their queries.

Cells count from position 0 of a sequence. A call may begin and end within one: the rows of such cells are made of the
queries that it holds. Differentiable, sizes known without the lengths, no host sync. No place holds two queries, so
gradients are sums in one order.

    width 4, queries at positions 6 to 12:   cell 1 holds 6 7, cell 2 holds 8 9 10 11, cell 3 holds 12
    places of the cells                      . . 6 7 | 8 9 10 11 | 12 . . .
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from spdsl.runtime.pools.table import POOLS
from spdsl.runtime.sequences import Layout, expect


class QueryCells(NamedTuple):
    """The cells of the queries of a call. Width 1: each has one query alone, and is it.

    layout: with rows for cells, whose positions are the numbers of cells. first: places before the first query of a
    dense batch. place: int64 [B, N], that of each query where sequences have spans; behind the last one: none.
    """

    width: int
    rows: int  # tokens of a batch row
    cells: int
    layout: Layout
    first: int = 0
    place: Tensor | None = None


def query_cells(q: Tensor, layout: Layout, width: int) -> QueryCells:
    """Of queries q [B, H, N, D]. Raises ValueError where a cell that the call holds in part has keys behind it."""
    expect(not layout.k_offset, "k_offset", "0 where queries are pooled", layout.k_offset)
    if layout.k_spans is not None:
        return _of_spans(q, layout, layout.k_spans, width)
    origin, rows = layout.keys - q.shape[2], q.shape[2]
    if layout.q_offset is not None:
        origin, end = layout.q_offset, layout.q_offset + rows
        known = end == layout.keys or (end < layout.keys and end % width == 0) or not rows
        name = "an end at the last key, or before it at the end of a cell of {}"
        expect(known, "q_offset", name, f"{end} of {layout.keys}", width)
    first = origin // width
    cells = (origin + rows - 1) // width - first + 1 if rows else 0
    own = layout._replace(q_offset=first, k_offset=0, longest=cells)
    return QueryCells(width, rows, cells, own, origin - first * width)


def _of_spans(q: Tensor, layout: Layout, k_spans: Tensor, width: int) -> QueryCells:
    """Sequences one after the other in one batch row, or one in each."""
    batch, rows = q.shape[0], q.shape[2]
    if layout.q_spans is None and rows == 1:  # a step
        number = (k_spans[:, 1] - 1).div(width, rounding_mode="floor")
        return QueryCells(1, 1, 1, layout._replace(q_origins=number))
    whole, packed = layout.q_spans is k_spans, layout.q_spans is not None and batch == 1
    spans = layout.q_spans
    if spans is None:
        spans = torch.stack([torch.zeros_like(k_spans[:, 1]), torch.full_like(k_spans[:, 1], rows)], 1)
    starts, counts = spans.long().unbind(1)
    origins = k_spans[:, 1] - counts
    first = origins.div(width, rounding_mode="floor")
    own = torch.where(counts > 0, (origins + counts - 1).div(width, rounding_mode="floor") - first + 1, 0)
    more = (width - 1) * (1 if whole else 2)  # places of a sequence without a query
    cells = min(rows, (rows + more * (len(spans) if packed else 1)) // width)
    begin = own.cumsum(0) - own if packed else torch.zeros_like(own)
    number = torch.arange(rows, device=q.device)
    if packed:
        s = (torch.searchsorted(starts.contiguous(), number, right=True) - 1).clamp(min=0)[None]
    else:
        s = torch.arange(batch, device=q.device)[:, None]
    row = number - starts[s]
    position = row + origins[s]
    place = (begin - first)[s] * width + position
    place = place.masked_fill((row < 0) | (row >= counts[s]), cells * width)
    longest = cells if layout.q_spans is None else layout.longest  # with spans of keys, too
    own_layout = layout._replace(q_spans=torch.stack([begin, own], 1).int(), q_origins=first.int(), longest=longest)
    return QueryCells(width, rows, cells, own_layout, place=place)


def pooled_query(q: Tensor, cells: QueryCells, by: str) -> Tensor:
    """q [B, H, N, D] -> [B, H, cells, D] in its dtype, by `mean` or `max`; 0 behind the last cell."""
    if cells.width == 1:
        return q
    if cells.place is None:
        behind = cells.cells * cells.width - cells.first - cells.rows
        place = torch.arange(cells.cells * cells.width, device=q.device) - cells.first
        there = ((place >= 0) & (place < cells.rows)).view(1, cells.cells, cells.width)
        tokens = pad(q, (0, 0, cells.first, behind))
    else:
        at = _queries_at(cells, cells.place)
        there = (at < cells.rows).unflatten(1, (cells.cells, cells.width))
        at = at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        tokens = pad(q, (0, 0, 0, 1)).gather(2, at)
    tokens = tokens.unflatten(2, (cells.cells, cells.width))
    there = there | ~there.any(2, keepdim=True)  # behind the last cell: the mean of zeros
    return POOLS[by].entries(tokens, there)


def _queries_at(cells: QueryCells, place: Tensor) -> Tensor:
    """int64 [B, places]: the query in each place, `rows` where there is none."""
    at = place.new_full((len(place), cells.cells * cells.width + 1), cells.rows)
    number = torch.arange(cells.rows, device=place.device).expand_as(place)
    return at.scatter_(1, place, number)[:, :-1]


def to_queries(x: Tensor, cells: QueryCells, nothing: float) -> Tensor:
    """Rows of cells x [B, H, cells, ..] -> [B, H, N, ..]: to each query that of its cell; in no sequence `nothing`."""
    spread = x.unsqueeze(3).expand(*x.shape[:3], cells.width, *x.shape[3:]).flatten(2, 3)
    if cells.place is None:
        return spread.narrow(2, cells.first, cells.rows)
    spread = pad(spread, (0, 0) * (x.dim() - 3) + (0, 1), value=nothing)
    place = cells.place.view(len(cells.place), 1, cells.rows, *[1] * (x.dim() - 3))
    return spread.gather(2, place.expand(*x.shape[:2], cells.rows, *x.shape[3:]))


class LastQueries(NamedTuple):
    """The last queries of each sequence of a call, and where they lie."""

    q: Tensor
    layout: Layout


def last_queries(q: Tensor, layout: Layout, count: int) -> LastQueries:
    """The last `count` queries of q [B, H, N, D], of each sequence, or all where it has fewer."""
    if layout.q_spans is not None:
        start, rows = layout.q_spans.unbind(1)
        own = rows.clamp(max=count)
        return LastQueries(q, layout._replace(q_spans=torch.stack([start + rows - own, own], 1)))
    first = max(0, q.shape[2] - count)
    offset = None if layout.q_offset is None else layout.q_offset + first
    return LastQueries(q[:, :, first:], layout._replace(q_offset=offset, longest=q.shape[2] - first))


def part_of_queries(part: Any, cells: QueryCells) -> Any:
    """out and lse of cells -> those of their queries. Of a step they may be splits, and stay as they are."""
    if cells.width == 1:
        return part
    out, lse = part
    return to_queries(out, cells, 0.0), to_queries(lse, cells, -torch.inf)


def lists_of_queries(lists: Tensor, cells: QueryCells) -> Tensor:
    """The lists of cells, int32 [B, lists, cells, n] -> a list for each query, as kernels walk them."""
    return lists if cells.width == 1 else to_queries(lists, cells, -1).contiguous()


def lists_of_tiles(lists: Tensor, cells: QueryCells) -> Tensor:
    """The same -> those of each sequence, int32 [sequences, lists, cells, n]; -1 behind its last cell."""
    spans = cells.layout.q_spans
    if spans is None or len(spans) == len(lists):
        return lists
    start, count = spans.long().unbind(1)
    number = torch.arange(cells.cells, device=lists.device)
    at = (start[:, None] + number).clamp(max=cells.cells - 1)
    own = lists[0][:, at].transpose(0, 1)
    return own.masked_fill((number >= count[:, None])[:, None, :, None], -1)
