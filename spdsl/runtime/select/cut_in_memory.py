"""Choices whose scores stand in memory, on a GPU: a kernel makes products, torch scores of units, a kernel cuts lists.

A piece of tiles at a time, so that memory is bounded; which rows a tile has is found on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.entries.entries import entry_counts
from spdsl.runtime.entries.entry_corners import entry_source
from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import (
    INTERPRETED,
    call_of,
    constants,
    launch,
    page_of,
    rows_contiguous,
    scale_of,
    source,
    strided,
    wide,
)
from spdsl.runtime.select.cell_kernel import CellConst, multiply_cells
from spdsl.runtime.select.choose import ScoreShape, Selection
from spdsl.runtime.select.cut import CutConst, CutTiles
from spdsl.runtime.select.cut_launch import cut_constants, cut_units, most_units
from spdsl.runtime.select.in_memory import Scored, ScoreOf, Scores, UnitsOf, unit_scores
from spdsl.runtime.select.products import PRODUCTS
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tuning.configs import Config, power_of_2
from spdsl.runtime.tuning.unit_configs import CELL_LANES, UnitShape

_FORCED, _NOT_CUT, _NO_MASS = 2**31 - 1, -(2**31), -(2**31) + 1  # as in cut_bits and cut_mass


class TileRows(NamedTuple):
    """The rows of each tile of a piece, int64 [tiles]: sequence, how many there are, positions of the first place and
    the first and the last row; and the tokens of the sequence."""

    s: Tensor
    rows: Tensor
    first: Tensor
    origin: Tensor
    last: Tensor
    length: Tensor


def cut_in_memory(
    of: Sequence[Scored], score: ScoreOf, units_of: UnitsOf, layout: Layout, selection: Selection, causal: bool,
    found: Tensor, limits: Tensor | None = None, tiled: bool = False,
) -> None:  # fmt: skip
    """Fills `found` int32 [batch, lists, rows, most] with the units of every query, or `tiled` of every tile of rows,
    [sequences, lists, row tiles, most]. limits: of `list_limits`, in place of constants.
    """
    q, paged = of[0].q, of[0].paged
    units = most_units(q, layout, selection.unit, paged)
    lanes = 1 if q.shape[2] == 1 else CELL_LANES
    own = 1 if selection.rows > 1 else lanes
    cells = max(1, selection.rows // of[0].step) * own
    width = most_units(q, layout, selection.cells.stride, paged)
    S = _constants(UnitShape(_config(q, cells), 1, lanes), selection, causal, units, tiled)

    def bits_of(bits: Tensor, tiles: CutTiles, many: int) -> None:
        logits = [_products(one, selection, width, tiles, many, cells, layout, S) for one in of]
        places = places_of(q, layout, tiles, many, S)
        bits.copy_(_bits(logits, of, score, units_of, places, selection, layout, units, own, limits))

    cut_units(bits_of, found, q, layout, S, units, limits, len(of) * q.shape[1] * cells * width)


def _constants(shape: UnitShape, selection: Selection, causal: bool, units: int, tiled: bool) -> CutConst:
    """Of numbers that the call says, the kernel asks the limits of each list."""
    least, level, part = selection.least, selection.level, selection.part
    return cut_constants(
        shape, selection.unit, selection.rows, 1 if isinstance(least, Tensor) else least,
        None if isinstance(level, Tensor) else level, selection.unit, 0, 1, 1, causal, units,
        0.0 if part is None else 1.0 if isinstance(part, Tensor) else part, selection.below, tiled,
    )  # fmt: skip


def _config(q: Tensor, cells: int) -> Config:
    """Blocks of `cells` and 64 keys at the most: their sums take 32 registers; of longer rows fewer lie in memory."""
    if INTERPRETED:
        return Config(16, 16, 4, 1)
    row = q.shape[3] * q.element_size()
    most = 64 if row <= 256 else 32
    return Config(max(16, min(most, power_of_2(cells))), 64 if row <= 512 else 32, 4, 2 if row <= 256 else 1)


def _products(
    of: Scored, selection: Selection, width: int, tiles: CutTiles, many: int, cells: int, layout: Layout, S: CutConst
) -> Tensor:
    """Scaled products [heads, cells of the tiles, width], of whatever lies there."""
    q, k = rows_contiguous(of.q), rows_contiguous(of.k)
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    config = _config(q, cells)
    if of.form.cells is None:
        keys = source(q, k, k, sequences, layout, of.paged)
    else:
        keys = entry_source(q, k, k, sequences, layout, of.form.cells, of.paged)
    found = torch.empty(q.shape[1], many * cells, width, dtype=wide(q.dtype), device=q.device)
    stride, before = selection.cells.stride, selection.cells.before
    step, cell_count, stride, before = (tl.constexpr(x) for x in (of.step, cells, stride, before))
    P = CellConst(step, cell_count, stride, before, PRODUCTS[of.form.product].rows)
    scale = scale_of(q, layout) if of.form.scale is None else tl.constexpr(of.form.scale)
    launch(
        multiply_cells, (many * triton.cdiv(cells, config.block_m), q.shape[1], triton.cdiv(width, config.block_n)),
        strided(q, sequences), keys, found, width, tiles, call_of(q, layout), S, P,
        constants(q, q.shape[3], scale, config, page=page_of(of.paged)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return found


def places_of(q: Tensor, layout: Layout, tiles: CutTiles, many: int, S: CutConst) -> TileRows:
    """As `cut_rows`, of `many` tiles at once."""
    number = tiles.begin + torch.arange(many, device=q.device)
    if tiles.first is None:
        s, tile = number // tiles.each, number % tiles.each
    else:
        s = torch.searchsorted(tiles.first.long(), number, right=True) - 1
        tile = number - tiles.first[s]
    rows = torch.full_like(s, q.shape[2]) if layout.q_spans is None else layout.q_spans[:, 1].long()[s]
    keys = torch.full_like(s, layout.keys) if layout.k_spans is None else layout.k_spans[:, 1].long()[s]
    q_origin = keys - rows if layout.q_offset is None else torch.full_like(s, layout.q_offset)
    length = keys if layout.q_offset is None else torch.maximum(keys, q_origin + rows)
    size = S.ROWS.value
    if size == 1:
        first = origin = q_origin + tile * S.LANES.value
        count = (q_origin + rows - origin).clamp(max=S.LANES.value)
        return TileRows(s, count, first, origin, origin + count - 1, length)
    first = (torch.div(q_origin, size, rounding_mode="floor") + tile) * size
    origin = torch.maximum(first, q_origin)
    count = torch.minimum(first + size, q_origin + rows) - origin
    return TileRows(s, count, first, origin, first + size - 1, length)


def _bits(
    logits: Sequence[Tensor], of: Sequence[Scored], score: ScoreOf, units_of: UnitsOf, places: TileRows,
    selection: Selection, layout: Layout, units: int, own: int, limits: Tensor | None,
) -> Tensor:  # fmt: skip
    """The bits of the units of the lists of a piece, int32 [lists, tiles * own, units]."""
    lists, step = selection.lists, of[0].step
    lane = torch.arange(own, device=places.s.device)
    last = places.last if own == 1 and selection.rows > 1 else (places.origin[:, None] + lane).flatten()
    position = last.view(1, 1, -1, 1)
    length = places.length.repeat_interleave(own).view(1, 1, -1, 1)
    k_first = torch.arange(units, device=position.device).view(1, 1, 1, -1) * selection.unit
    k_last = torch.minimum(k_first + selection.unit, length) - 1
    exists = k_first < length
    forced, allowed = (units_of(position, k_first, k_last, length, side) & exists for side in (True, False))
    forced = forced & allowed
    cells = [_seen(one, x, places, length, own, layout) for one, x in zip(of, logits, strict=True)]
    shape = ScoreShape(1, cells[0].value.shape[1], 0, cells[0].value.shape[3], units, 0, 2**31 - 1)
    scores = unit_scores(cells, score, allowed, shape, selection, step)[0].float()
    may = allowed[0] & (scores > -torch.inf)  # NaN is none
    if limits is not None and selection.level is not None and selection.part is None:
        level = limits[places.s.repeat_interleave(own), :, 2].t().unsqueeze(-1)
        may &= (scores >= level) | (limits[places.s.repeat_interleave(own), :, 0].t().unsqueeze(-1) > 0)
    elif selection.level is not None and isinstance(selection.least, int) and selection.least == 0:
        may &= scores >= selection.level
    if selection.part is not None:
        own_bits = _score_bits(scores.where(may, 0.0).clamp(min=0))
        return own_bits.where(forced[0], (own_bits + _NO_MASS).where(may, _NOT_CUT)).expand(lists, -1, -1)
    return _score_bits(scores.where(may, 0.0)).where(may, _NOT_CUT).masked_fill(forced[0], _FORCED)


def _score_bits(score: Tensor) -> Tensor:
    """As `score_bits`; -0.0 is no lower than 0.0."""
    bits = (score + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _seen(of: Scored, x: Tensor, places: TileRows, length: Tensor, own: int, layout: Layout) -> Scores:
    """Products [heads, cells of the tiles, entries] with what of them a query sees."""
    each = x.shape[1] // len(places.s)
    cell = torch.arange(each, device=x.device)
    q_at = (places.first[:, None] + cell * of.step).view(1, 1, -1, 1)
    first, last = places.origin, places.origin + places.rows
    there = (q_at.view(len(first), each) + of.step > first[:, None]) & (q_at.view(len(first), each) < last[:, None])
    tokens = places.length if layout.k_spans is not None else torch.full_like(places.s, layout.keys)
    entries = -(-tokens // of.step) if of.form.cells is None else entry_counts(tokens, of.form.cells)
    k_at = torch.arange(x.shape[2], device=x.device).view(1, 1, 1, -1)
    h = torch.arange(x.shape[0], device=x.device).view(1, -1, 1, 1)
    own_length = places.length.repeat_interleave(each).view(1, 1, -1, 1)
    seen = of.form.sweeps[0].mask(q_at, k_at * of.step, h, own_length)
    seen = seen & there.view(1, 1, -1, 1) & (k_at < entries.repeat_interleave(each).view(1, 1, -1, 1))
    value, seen = x.unsqueeze(0), seen.expand(1, *x.shape)
    return Scores(value.masked_fill(~seen, 0.0), seen)
