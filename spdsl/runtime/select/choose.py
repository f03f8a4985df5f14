"""Lists of the units that queries choose by a score: exact, in plain torch, on any device.

A score is reduced over the heads of a list, then over the rows of a tile, then over the entries of a unit. An entry
counts where it is visible only, so every step carries along where nothing counted. NaN goes through: no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.entries.entries import Cells

_SCORES_AT_ONCE = 1 << 24


class Selection(NamedTuple):
    """What a choice is, by constants: units of `unit` keys for tiles of `rows` queries, or (0) for all together.

    Entries of the score are those of `cells`. Reductions are `sum`, `mean`, `max`, or None where there is nothing to
    reduce. `count` units are chosen (top_k), or those of a score >= `level`, or the best that hold `part` of all mass
    (the fewest that hold it; `below`: the most that hold no more); and as many others as `least` of them all lack;
    never above `most`, the width of a list. Numbers of the call are tensors [batch or 1, lists, 1, 1].
    """

    unit: int
    rows: int
    cells: Cells
    lists: int  # heads of lists
    heads_by: str | None
    rows_by: str | None
    unit_by: str | None
    count: int | Tensor | None  # type: ignore[assignment]  # hides the method of tuples
    level: float | Tensor | None
    most: int
    least: int | Tensor = 0
    part: float | Tensor | None = None
    below: bool = False


class ScoreShape(NamedTuple):
    """The sizes of a score: [batch, heads, rows, entries]; row i has position q_origin + i."""

    batch: int
    heads: int
    rows: int
    entries: int
    units: int  # that a list may name
    q_origin: int
    tokens: int  # of the sequence


def choose(
    logits: Callable[[int, int], Tensor],
    lse: Tensor | None,
    forced: Callable[[int, int], Tensor],
    allowed: Callable[[int, int], Tensor],
    shape: tuple[int, ...],
    selection: Selection,
) -> Tensor:
    """The chosen units, int32 [batch, lists, row tiles, most]: ascending, -1 at the end.

    `shape` is a `ScoreShape`. `logits(first, end)` gives rows [first, end), [batch, heads, end - first, entries],
    -inf where an entry is not visible; `lse` [batch, heads, rows] makes probabilities of them. `forced` and `allowed`
    (first, end) are bool, broadcastable to [batch, lists, row tiles of these rows, units]. A tile holds the rows with
    one position // rows. Forced units count and come first, then the highest scores; ties go to the lowest index.
    """
    sizes = ScoreShape(*shape)
    if selection.rows == 0:
        scores = _scores_of_all(logits, lse, sizes, selection)
        may = allowed(0, sizes.rows).expand(scores.shape)
        return _chosen(scores.masked_fill(~may, -torch.inf), forced(0, sizes.rows) & may, selection)
    found = []
    for first, end in _pieces(sizes, selection):
        own_lse = None if lse is None else lse[:, :, first:end]
        scores = _unit_scores(logits(first, end), own_lse, first, sizes, selection)
        may = allowed(first, end).expand(scores.shape)
        found.append(_chosen(scores.masked_fill(~may, -torch.inf), forced(first, end) & may, selection))
    return torch.cat(found, 2)


def _pieces(shape: ScoreShape, selection: Selection) -> Iterator[tuple[int, int]]:
    """Row ranges of whole tiles, so that what a tile gets does not depend on how many are computed at once."""
    of_units = selection.lists * shape.units * _entries_of_unit(selection)
    per_row = max(1, shape.batch) * max(1, shape.heads * shape.entries, of_units)
    tiles = max(1, _SCORES_AT_ONCE // (per_row * selection.rows))
    first = 0
    while True:  # one piece even of no rows
        tile = (shape.q_origin + first) // selection.rows
        end = min((tile + tiles) * selection.rows - shape.q_origin, shape.rows)
        yield first, end
        if end == shape.rows:
            return
        first = end


def sorted_units(units: Tensor, most_units: int) -> Tensor:
    """Lists [..., n] as int32, ascending; duplicates and what is outside [0, most_units) become -1 at the end."""
    units = units.masked_fill((units < 0) | (units >= most_units), most_units).int().sort(-1).values
    kept = units < most_units
    kept[..., 1:] &= units[..., 1:] != units[..., :-1]
    width = units.shape[-1]
    place = torch.where(kept, kept.cumsum(-1) - 1, width)
    found = units.new_full((*units.shape[:-1], width + 1), -1).scatter_(-1, place, units)
    return found[..., :width].contiguous()


def _unit_scores(x: Tensor, lse: Tensor | None, first: int, shape: ScoreShape, selection: Selection) -> Tensor:
    """Logits of rows `first`.. -> scores [B, lists, row tiles, units], -inf for none."""
    x, none = _of_lists(x, lse, shape, selection)
    if selection.rows > 1:
        before = (shape.q_origin + first) % selection.rows
        x, none = _padded(x, none, (0, 0, before, -(before + x.shape[2]) % selection.rows))
        tiles = (-1, selection.rows)
        x, none = _reduced(x.unflatten(2, tiles), none.unflatten(2, tiles), selection.rows_by, 3)
    return _of_units(x, none, shape, selection)


def _of_lists(x: Tensor, lse: Tensor | None, shape: ScoreShape, selection: Selection) -> tuple[Tensor, Tensor]:
    """Logits -> scores [B, lists, rows, entries] of lists, 0 where there is none."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    none = x == -torch.inf
    if lse is not None:
        lse = lse.to(x.dtype).unsqueeze(-1)
        x = (x - lse).exp_().masked_fill_(lse == -torch.inf, 0.0)
    group = (selection.lists, shape.heads // selection.lists)
    return _reduced(x.masked_fill(none, 0.0).unflatten(1, group), none.unflatten(1, group), selection.heads_by, 2)


def _of_units(x: Tensor, none: Tensor, shape: ScoreShape, selection: Selection) -> Tensor:
    """Scores [B, lists, row tiles, entries] -> of units, -inf for none."""
    entries, weights = _entries_of_units(shape, selection, x.device)
    x, none = _padded(x, none, (0, 1))
    of_sum = weights.to(x.dtype) if selection.unit_by == "sum" else None
    x, none = _reduced(x[..., entries], none[..., entries], selection.unit_by, 4, of_sum)
    return x.masked_fill(none, -torch.inf)


def _scores_of_all(
    logits: Callable[[int, int], Tensor], lse: Tensor | None, shape: ScoreShape, selection: Selection
) -> Tensor:  # fmt: skip
    """The scores of all rows together, [B, lists, 1, units], a bounded number of rows at a time."""
    per_row = max(1, shape.batch * shape.heads * shape.entries)
    size, by_max = max(1, _SCORES_AT_ONCE // per_row), selection.rows_by == "max"
    total = count = None
    for first in range(0, max(1, shape.rows), size):
        end = min(first + size, shape.rows)
        x, none = _of_lists(logits(first, end), None if lse is None else lse[:, :, first:end], shape, selection)
        known = (~none).sum(2, keepdim=True)
        if by_max:  # one row more, of none, where there are no rows
            x, none = _padded(x, none, (0, 0, 0, 1))
            x = x.masked_fill(none, -torch.inf).amax(2, keepdim=True)
        else:
            x = x.sum(2, keepdim=True)
        count = known if count is None else count + known
        total = x if total is None else torch.maximum(total, x) if by_max else total + x
    assert total is not None
    assert count is not None
    none = count == 0
    total = total / count.clamp(min=1) if selection.rows_by == "mean" else total
    return _of_units(total.masked_fill(none, 0.0), none, shape, selection)


def _padded(x: Tensor, none: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.pad(x, sizes), torch.nn.functional.pad(none, sizes, value=True)


def _entries_of_unit(selection: Selection) -> int:
    """The most entries that overlap a unit; without a reduction an entry is a unit."""
    if selection.unit_by is None:
        return 1
    return (selection.unit + selection.cells.width - 2) // selection.cells.stride + 1


def _entries_of_units(shape: ScoreShape, selection: Selection, device: torch.device) -> tuple[Tensor, Tensor]:
    """The entries that overlap each unit and overlap / stride: [units, entries of a unit]; entry `entries` is none."""
    if selection.unit_by is None:
        entry = torch.arange(shape.units, device=device).unsqueeze(1)
        return entry.clamp(max=shape.entries), torch.ones_like(entry)
    width, stride, before, _ = selection.cells
    start = torch.arange(shape.units, device=device).unsqueeze(1) * selection.unit
    first = (start + before - width) // stride + 1  # the first whose last token is in the unit or after it
    entry = first + torch.arange(_entries_of_unit(selection), device=device)
    token = entry * stride - before
    end = torch.minimum(token + width, start + selection.unit).clamp(max=shape.tokens)
    overlap = (end - torch.maximum(token, start)).clamp(min=0)
    real = (overlap > 0) & (entry >= 0) & (entry < shape.entries)
    return entry.masked_fill(~real, shape.entries), overlap.double() / stride


def _reduced(
    x: Tensor, none: Tensor, by: str | None, axis: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One axis by `sum`, `mean` or `max`, and where `none` holds for all of it; x is 0 where `none` holds."""
    if x.shape[axis] == 1 and weights is None:
        return x.squeeze(axis), none.squeeze(axis)
    if by in ("sum", "mean"):
        x = (x if weights is None else x * weights).sum(axis)
        x = x / (~none).sum(axis).clamp(min=1) if by == "mean" else x
        return x, none.all(axis)
    none, x = none.all(axis), x.masked_fill(none, -torch.inf).amax(axis)
    return x.masked_fill(none, 0.0), none


def _chosen(scores: Tensor, forced: Tensor, selection: Selection) -> Tensor:
    """Lists of the units that are forced or have the best scores; scores [B, lists, row tiles, units]."""
    limit: int | Tensor = selection.most
    if selection.count is not None:
        limit = selection.count.clamp(max=limit) if isinstance(selection.count, Tensor) else min(selection.count, limit)
    known = forced & (forced.cumsum(-1) <= limit)
    others = scores.masked_fill(forced | scores.isnan(), -torch.inf)
    best, order = torch.sort(others + 0.0, dim=-1, descending=True, stable=True)  # + 0.0: -0.0 is no lower than 0.0
    place = known.sum(-1, keepdim=True) + torch.arange(scores.shape[-1], device=scores.device)
    taken = (place < limit) & (best > -torch.inf)
    if selection.level is not None:
        taken &= (best >= selection.level) | (place < selection.least)
    if selection.part is not None:
        held = scores.where(forced & (scores > 0), 0.0).sum(-1, keepdim=True, dtype=torch.float64)
        taken &= _of_mass(best, held, selection.part, selection.below) | (place < selection.least)
    return _ascending(known | torch.zeros_like(known).scatter_(-1, order, taken), selection.most)


def _of_mass(best: Tensor, held: Tensor, part: float | Tensor, below: bool) -> Tensor:
    """Which units of falling scores a part of the mass of all takes, where forced ones hold `held` of it."""
    own = best.clamp(min=0).double()
    upto = own.cumsum(-1) + held
    wanted = part * upto[..., -1:]
    enough = upto <= wanted if below else upto - own < wanted
    return (best > 0) & (enough | (part >= 1))


def _ascending(chosen: Tensor, most: int) -> Tensor:
    """The numbers of the true entries of the last axis, int32 [..., most], -1 at the end."""
    number = torch.arange(chosen.shape[-1], device=chosen.device, dtype=torch.int32)
    slot = (chosen.cumsum(-1) - 1).masked_fill(~chosen, most)
    lists = torch.full((*chosen.shape[:-1], most + 1), -1, dtype=torch.int32, device=chosen.device)
    return lists.scatter_(-1, slot, number.expand(chosen.shape))[..., :most].contiguous()
