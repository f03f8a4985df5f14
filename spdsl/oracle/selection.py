"""Scores of units and the sets that are chosen by them, unit by unit and query by query, as they are defined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum, inf, isnan

import sympy
import torch
from torch import Tensor

from spdsl.ir.choice import ALL_ROWS
from spdsl.ir.pattern import Choice, Grid, Pooled
from spdsl.ir.rule import Threshold, TopK, TopP
from spdsl.ir.symbols import Expr
from spdsl.oracle.sizes import Sizes

Scores = tuple[Tensor, Tensor]  # float64, bool: the score, and whether there is one (where not, the score is 0)


def overlap(grid: Grid, entry: int, unit: int, number: int, tokens: int) -> int:
    """Those of the `tokens` that entry `entry` of the grid has in common with unit `number` of `unit` tokens."""
    first = entry * grid.stride - grid.before
    covered = range(max(first, 0), min(first + grid.width, tokens))
    return sum(number * unit <= token < (number + 1) * unit for token in covered)


def pooled(scores: Scores, how: Choice | Pooled, grid: Grid, heads: int, sizes: Sizes) -> Scores:
    """[B, score heads, N, E] -> [B, heads, row tiles, units]: reduced over heads, then rows, then entries.

    What has no score takes no part, in a mean neither; what nothing takes part in has no score.
    """
    return over_entries(over_lists(scores, how, heads, sizes), how, grid, sizes)


def over_lists(scores: Scores, how: Choice | Pooled, heads: int, sizes: Sizes, step: int = 1) -> Scores:
    """[B, score heads, cells of `step` rows, E] -> [B, heads, row tiles, E]."""
    return _over_rows(_over_heads(scores, how.heads_by, heads), how, sizes, step)


def weighted_sum(weights: Sequence[float], parts: Sequence[Scores]) -> Scores:
    """Of scores of one grain; a number where all of them have one."""
    known = torch.stack([own for _, own in parts]).all(0)
    total = sum((weight * x for weight, (x, _) in zip(weights, parts, strict=True)), torch.zeros(()).double())
    return torch.where(known, total, 0.0), known


def relative(scores: Scores) -> Scores:
    """Less the greatest number of each row that is one."""
    x, known = scores
    none = x.new_full((*x.shape[:-1], 1), -inf)
    most = torch.cat([none, torch.where(known & ~x.isnan(), x, -inf)], -1).amax(-1, keepdim=True)
    return torch.where(known, x - most, 0.0), known


def smoothed(scores: Scores, width: int, by: str) -> Scores:
    """Entry by entry: of the `width` around each, those without a number are 0 for a mean and left out of a maximum."""
    x, known = scores
    found = torch.zeros_like(x)
    for entry in range(x.shape[-1]):
        around = slice(max(0, entry - width // 2), entry + width // 2 + 1)
        if by == "mean":
            found[..., entry] = torch.where(known[..., around], x[..., around], 0.0).sum(-1) / width
        else:
            found[..., entry] = torch.where(known[..., around], x[..., around], -inf).amax(-1)
    return torch.where(known, found, 0.0), known


def _over_heads(scores: Scores, by: str | None, heads: int) -> Scores:
    """List `c` takes the c-th share of the score heads; several lists may share a score head."""
    given = scores[0].shape[1]
    if given % heads and heads % given:
        raise ValueError(f"{given} score heads cannot be shared among {heads} lists")
    group = max(1, given // heads)
    first = [c * given // heads for c in range(heads)]
    return _stacked([_reduced(_cut(scores, 1, range(c, c + group)), by, 1) for c in first], scores, 1)


def _over_rows(scores: Scores, how: Choice | Pooled, sizes: Sizes, step: int) -> Scores:
    """Of the queries of a tile; of a score by cells of `step` queries those of the tile."""
    if how.rows == ALL_ROWS:
        return _stacked([_reduced(scores, how.rows_by, 2)], scores, 2)
    tiles, first = [], sizes.first_tile(step)
    for tile in range(sizes.first_tile(how.rows), sizes.first_tile(how.rows) + sizes.tiles(how.rows)):
        cells = range(tile * how.rows // step - first, (tile + 1) * how.rows // step - first)
        tiles.append(_reduced(_cut(scores, 2, [i for i in cells if 0 <= i < scores[0].shape[2]]), how.rows_by, 2))
    return _stacked(tiles, scores, 2)


def over_entries(scores: Scores, how: Choice | Pooled, grid: Grid, sizes: Sizes) -> Scores:
    """Of unit u the entries that cover a token of it; without a reduction entry u, on a grid of units."""
    count, found = scores[0].shape[3], []
    if how.unit_by is None and how.unit != grid.stride:
        raise ValueError(f"units of {how.unit} tokens need a reduction of entries at a stride of {grid.stride}")
    units = sizes.units(how.unit)
    for unit in range(max(units, count) if how.unit_by is None else units):
        shared = {entry: overlap(grid, entry, how.unit, unit, sizes.tokens) for entry in range(count)}
        if how.unit_by is None:
            members = [unit] if unit < count else []
        else:
            members = [entry for entry in range(count) if shared[entry]]
        part = _cut(scores, 3, members)
        if how.unit_by == "sum":
            of_cells = how.score is not None and how.score.grain.cells > 1  # a short last cell counts whole
            weights = torch.tensor(
                [1.0 if of_cells else shared[entry] / grid.stride for entry in members], dtype=torch.float64
            )
            part = (part[0] * weights, part[1])
        found.append(_reduced(part, how.unit_by, 3))
    return _stacked(found, scores, 3)


def _cut(scores: Scores, axis: int, at: Sequence[int]) -> Scores:
    index = torch.tensor(list(at), dtype=torch.long)
    return scores[0].index_select(axis, index), scores[1].index_select(axis, index)


def _reduced(scores: Scores, by: str | None, axis: int) -> Scores:
    """One score out of those along `axis`."""
    x, known = scores
    some = known.any(axis)
    if x.shape[axis] == 0:
        return x.sum(axis), some
    if by is None and x.shape[axis] > 1:
        raise ValueError(f"{x.shape[axis]} scores become one, but by no rule")
    if by == "max":
        return torch.where(some, torch.where(known, x, -inf).amax(axis), 0.0), some
    total = torch.where(known, x, 0.0).sum(axis)
    return (total / known.sum(axis).clamp(min=1) if by == "mean" else total), some


def _stacked(parts: list[Scores], like: Scores, axis: int) -> Scores:
    if not parts:
        return _cut(like, axis, [])
    return torch.stack([x for x, _ in parts], axis), torch.stack([known for _, known in parts], axis)


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers of a choice for each list, float64 [B or 1, heads or 1]: what the call may say of them.

    A list has no fewer than `least` units (of those with a score) and no more than `most`; others have a score of at
    least `level`, or are the best that `part` of the mass of all takes. A number that is not one is no level, no part,
    and 0 units.
    """

    least: Tensor
    most: Tensor
    level: Tensor
    part: Tensor

    @classmethod
    def of(cls, choice: Choice, number: Callable[[Expr], Tensor]) -> Limits:
        """`number` gives the value of an expression."""
        room = inf if choice.capacity is None else choice.capacity
        count = choice.rule.count.value if isinstance(choice.rule, TopK) else sympy.oo
        level = choice.rule.level if isinstance(choice.rule, Threshold) else -sympy.oo
        part = choice.rule.part if isinstance(choice.rule, TopP) else sympy.nan
        most = torch.floor(number(count).nan_to_num(0, posinf=inf)).clamp(0, room)
        least = torch.ceil(number(choice.least).nan_to_num(0, posinf=inf))
        return cls(least, most, number(level), number(part))

    def at(self, batch: int, head: int) -> tuple[float, float, float, float]:
        """Least, most, level and part of one list."""
        least, most, level, part = (
            float(x[batch if len(x) > 1 else 0, head if x.shape[1] > 1 else 0])
            for x in (self.least, self.most, self.level, self.part)
        )
        return least, most, level, part


def constant(value: Expr) -> Tensor:
    return torch.full((1, 1), float(value), dtype=torch.float64)


def chosen(choice: Choice, scores: Scores, forced: Tensor, allowed: Tensor, limits: Limits | None = None) -> Tensor:
    """The lists of a rule: int32 [B, heads, row tiles, capacity or units], ascending, -1 at the end.

    `forced` and `allowed` bool, like the scores [B, heads, row tiles, units]. `limits`: None where all is constant.
    """
    limits = Limits.of(choice, constant) if limits is None else limits
    units = forced.shape[3]
    width = units if choice.capacity is None else choice.capacity
    found = torch.full((*forced.shape[:3], width), -1, dtype=torch.int32)
    for batch in range(forced.shape[0]):
        for head in range(forced.shape[1]):
            for tile in range(forced.shape[2]):
                at = (batch, head, tile)
                values = torch.where(scores[1][at] & ~scores[0][at].isnan(), scores[0][at], -inf).tolist()
                least, most, level, part = limits.at(batch, head)
                first, rest = _ordered(values, forced[at].tolist(), allowed[at].tolist())
                if isinstance(choice.rule, TopP):
                    passing = _of_mass(values, first, rest, part, choice.rule.side)
                else:
                    passing = sum(values[unit] >= level for unit in rest)
                members = _members(first, rest, passing, least, most)
                found[batch, head, tile, : len(members)] = torch.tensor(members, dtype=torch.int32)
    return found


def _ordered(scores: list[float], forced: list[bool], allowed: list[bool]) -> tuple[list[int], list[int]]:
    """The forced units of one query, and those with a score, by falling score; ties go to the lowest index."""
    first = [unit for unit, one in enumerate(forced) if one and allowed[unit]]
    rest = [unit for unit, one in enumerate(allowed) if one and unit not in first and scores[unit] > -inf]
    return first, sorted(rest, key=lambda unit: (-scores[unit], unit))


def _of_mass(scores: list[float], first: list[int], rest: list[int], part: float, side: str) -> int:
    """How many of `rest` a part of the mass of all takes; the forced units count first."""
    positive = [unit for unit in rest if scores[unit] > 0]
    if part >= 1 or isnan(part):
        return len(positive) if part >= 1 else 0
    before = [scores[unit] for unit in first if scores[unit] > -inf]
    wanted = part * fsum([*before, *(scores[unit] for unit in positive)])
    taken = 0
    while taken < len(positive):
        own = scores[positive[taken]]
        if (fsum([*before, own]) > wanted) if side == "below" else (fsum(before) >= wanted):
            break
        before.append(own)
        taken += 1
    return taken


def _members(first: list[int], rest: list[int], passing: int, least: float, most: float) -> list[int]:
    """The units of one query: the forced ones, then those that pass, then others as long as `least` lack."""
    taken = [*first, *rest[:passing]][: int(min(most, len(first) + len(rest)))]
    for unit in rest[passing:]:
        if len(taken) < min(least, most):
            taken.append(unit)
    return sorted(taken)
