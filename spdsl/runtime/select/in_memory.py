"""Choices whose scores stand in memory before they are reduced, in pieces of rows: of cells of queries, or of others.

A score has a number for each head, cell of queries and entry. Heads are put together first, then the cells of a tile,
then what sees a row whole (`relative`, `smoothed`) has its turn, then the entries of units. Plain torch; on a GPU a
kernel makes the products and another one cuts the lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.attention import Form
from spdsl.runtime.launch.launch import Paged, wide
from spdsl.runtime.select.choose import (
    _SCORES_AT_ONCE,
    ScoreShape,
    Selection,
    _chosen,
    _entries_of_units,
    _padded,
    _reduced,
)
from spdsl.runtime.select.products import PRODUCTS
from spdsl.runtime.sequences import Corner


class Scores(NamedTuple):
    """Numbers [batch, heads, rows, entries], 0 where there is none, and whether there is one."""

    value: Tensor
    seen: Tensor


class Scored(NamedTuple):
    """What a score multiplies: queries, and keys of which one lies in each entry or `step` of them in each cell."""

    form: Form
    q: Tensor
    k: Tensor
    step: int = 1
    paged: Paged | None = None


ScoreOf = Callable[[Sequence[Scores], Callable[[Scores], Scores]], Scores]
UnitsOf = Callable[[Tensor, Tensor, Tensor, "int | Tensor", bool], Tensor]


def probabilities(logits: Scores) -> Scores:
    """Over the entries that a row sees."""
    hidden = logits.value.masked_fill(~logits.seen, -torch.inf)
    lse = torch.logsumexp(hidden, -1, keepdim=True)
    return Scores((hidden - lse).exp().masked_fill(~logits.seen | (lse == -torch.inf), 0.0), logits.seen)


def weighted_sum(weights: Sequence[float], parts: Sequence[Scores]) -> Scores:
    """Of scores of one grain, where all of them have a number."""
    seen = parts[0].seen
    value = weights[0] * parts[0].value
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        value, seen = value + weight * part.value, seen & part.seen
    return Scores(value.masked_fill(~seen, 0.0), seen)


def relative(scores: Scores) -> Scores:
    """Less the greatest of the row, which passes by NaN."""
    if scores.value.shape[-1] == 0:
        return scores
    known = scores.value.masked_fill(~scores.seen | scores.value.isnan(), -torch.inf)
    most = known.amax(-1, keepdim=True)
    value = scores.value - most
    return Scores(value.masked_fill(~scores.seen, 0.0), scores.seen)


def smoothed(scores: Scores, width: int, by: str) -> Scores:
    """`mean` or `max` of the `width` entries around each; for a mean those without a number are 0."""
    if scores.value.shape[-1] == 0:
        return scores
    room = width // 2
    if by == "max":
        value = torch.nn.functional.pad(
            scores.value.masked_fill(~scores.seen, -torch.inf), (room, room), value=-torch.inf
        )
        value = value.unfold(-1, width, 1).amax(-1)
    else:
        value = torch.nn.functional.pad(scores.value, (room, room)).unfold(-1, width, 1).sum(-1) / width
    return Scores(value.masked_fill(~scores.seen, 0.0), scores.seen)


def choose_in_memory(
    of: Sequence[Scored], score: ScoreOf, units_of: UnitsOf, corner: Corner, selection: Selection
) -> Tensor:
    """The units that the tiles of one sequence, or of a dense batch, choose: int32 [batch, lists, row tiles, most]."""
    q, step = of[0].q, of[0].step
    batch, heads, rows = q.shape[:3]
    entries = -(-of[0].k.shape[2] // step)
    units = -(-corner.length // selection.unit)
    k_first = torch.arange(units, device=q.device).view(1, 1, 1, -1) * selection.unit
    k_last = (k_first + selection.unit).clamp(max=corner.length) - 1
    tokens = -(-corner.length // step) * step if step > 1 else corner.length
    keys, found = [_keys_of(one) for one in of], []
    for first, end in _pieces(batch * heads, rows, entries, corner.q_origin, selection.rows, step):
        shape = ScoreShape(batch, heads, end - first, entries, units, corner.q_origin + first, tokens)
        tiles = _tiles(corner.q_origin + first, corner.q_origin + end, selection.rows, q.device)
        forced, allowed = (units_of(tiles, k_first, k_last, corner.length, side) for side in (True, False))
        logits = [_cells_of_corner(one, k, corner, first, end) for one, k in zip(of, keys, strict=True)]
        found.append(_lists_of(logits, score, forced, allowed, shape, selection, step))
    return torch.cat(found, 2)


def for_each_row(lists: Tensor, tile: int, rows: int, q_origin: int) -> Tensor:
    """Lists of tiles of `tile` queries as one for each of `rows` queries, as kernels walk them."""
    number = (q_origin + torch.arange(rows, device=lists.device)) // tile
    return lists[:, :, number - q_origin // tile]


def _pieces(each: int, rows: int, entries: int, q_origin: int, tile: int, step: int) -> list[tuple[int, int]]:
    """Row ranges of whole tiles whose scores have room together."""
    most = max(1, _SCORES_AT_ONCE // max(1, each * entries * max(1, tile // step)))
    ends = range((q_origin // tile + most) * tile - q_origin, rows, most * tile)
    firsts = [0, *ends]
    return list(zip(firsts, [*ends, rows], strict=True))


def _tiles(first: int, end: int, rows: int, device: torch.device) -> Tensor:
    """The last position of each tile, whether or not the call holds it: a tile sees what that sees."""
    number = torch.arange(first // rows, (end - 1) // rows + 1 if end > first else first // rows, device=device)
    return ((number + 1) * rows - 1).view(1, 1, -1, 1)


def _keys_of(of: Scored) -> Tensor:
    """Vectors of the cells or entries for each query head, [B, Hq, entries, .. D]."""
    k = _stacked(of.k, of.step, 0, flipped=False)
    _, k = PRODUCTS[of.form.product].vectors(k, k)
    return k.repeat_interleave(of.q.shape[1] // k.shape[1], 1)


def _cells_of_corner(of: Scored, k: Tensor, corner: Corner, first: int, end: int) -> Scores:
    """The logits of the cells that rows first..end - 1 lie in; k of `_keys_of`."""
    step, q_first = of.step, corner.q_origin + first
    q = _stacked(of.q[:, :, first:end], step, q_first % step, flipped=True)
    q, _ = PRODUCTS[of.form.product].vectors(q, q)
    found = (q @ k.transpose(-1, -2)).to(wide(q.dtype)) * (of.form.scale_of(of.q, corner) / step)
    q_at = (q_first // step + torch.arange(q.shape[2], device=q.device)).view(1, 1, -1, 1) * step
    k_at = torch.arange(k.shape[2], device=q.device).view(1, 1, 1, -1) * step
    h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    seen = of.form.sweeps[0].mask(q_at, k_at, h, corner.length).expand(found.shape)
    return Scores(found.masked_fill(~seen, 0.0), seen)


def _stacked(x: Tensor, step: int, before: int, flipped: bool) -> Tensor:
    """[B, H, N, D] -> the vectors of each cell of `step` rows side by side, [B, H, cells, step * D]; 0 for no row.

    `before` rows of the first cell are not there.
    """
    if step == 1:
        return x
    x = torch.nn.functional.pad(x, (0, 0, before, -(before + x.shape[2]) % step)).unflatten(2, (-1, step))
    return (x.flip(3) if flipped else x).flatten(3)


def _lists_of(
    logits: Sequence[Scores], score: ScoreOf, forced: Tensor, allowed: Tensor, shape: ScoreShape, selection: Selection,
    step: int,
) -> Tensor:  # fmt: skip
    """The lists of whole tiles, [batch, lists, row tiles, most]."""
    scores = unit_scores(logits, score, allowed, shape, selection, step)
    may = allowed.expand(scores.shape)
    return _chosen(scores.masked_fill(~may, -torch.inf), forced & may, selection)


def _candidates(allowed: Tensor, entries: int, selection: Selection) -> Tensor:
    """Whether an entry overlaps a unit that may be chosen: bool [.., entries], from that of units."""
    width, stride, before, _ = selection.cells
    start = torch.arange(entries, device=allowed.device) * stride - before
    upto = torch.nn.functional.pad(allowed.cumsum(-1), (1, 0))
    first = start.clamp(min=0) // selection.unit
    end = (start + width - 1) // selection.unit + 1
    most = allowed.shape[-1]
    return upto[..., end.clamp(max=most)] > upto[..., first.clamp(max=most)]


def unit_scores(
    logits: Sequence[Scores], score: ScoreOf, allowed: Tensor, shape: ScoreShape, selection: Selection, step: int
) -> Tensor:
    """Scores of units [batch, lists, row tiles, units], -inf for none. `allowed`: which units are candidates."""
    each = max(1, selection.rows // step)  # cells of a tile

    def of_lists(scores: Scores) -> Scores:
        group = (selection.lists, scores.value.shape[1] // selection.lists)
        x, none = scores.value.unflatten(1, group), ~scores.seen.unflatten(1, group)
        x, none = _reduced(x, none, selection.heads_by, 2)
        before = shape.q_origin // step % each
        x, none = _padded(x, none, (0, 0, before, -(before + x.shape[2]) % each))
        x, none = _reduced(x.unflatten(2, (-1, each)), none.unflatten(2, (-1, each)), selection.rows_by, 3)
        none = none | ~_candidates(allowed.expand(*x.shape[:3], -1), x.shape[-1], selection)
        return Scores(x.masked_fill(none, 0.0), ~none)

    x, seen = score(logits, of_lists)
    entries, weights = _entries_of_units(shape, selection, x.device)
    x, none = _padded(x, ~seen, (0, 1))
    of_sum = weights.to(x.dtype) if selection.unit_by == "sum" else None
    x, none = _reduced(x[..., entries], none[..., entries], selection.unit_by, 4, of_sum)
    return x.masked_fill(none, -torch.inf)
