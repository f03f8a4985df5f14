"""evaluate: a sympy expression over positions and tensor reads, walked with torch tensors.

Rational numbers stay exact: a value is a numerator and an integer denominator until the end, so that `floor(q / 49)`
and `q / 3 < k / 2` never round. Tensors are 4-D, broadcastable to [B, Hq, N, M].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import lcm

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import Tensor

from spdsl.ir.compared import Compared
from spdsl.ir.symbols import lookup_name

Exact = tuple[Tensor, int]  # numerator, denominator > 0


@dataclass(frozen=True, slots=True)
class Table:
    """A tensor that expressions read: data [B or 1, *axes]; `grouped` axes hold one entry per group of query heads.

    `origin` is subtracted from the index of each axis.
    """

    data: Tensor
    grouped: tuple[bool, ...]
    origin: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Environment:
    """What the symbols of an expression stand for; `heads` is the number of query heads."""

    symbols: Mapping[str, Tensor]
    tables: Mapping[str, Table]
    heads: int


_RELATIONS: dict[type[Relational], Callable[[Tensor, Tensor], Tensor]] = {
    sympy.Eq: torch.eq, sympy.Ne: torch.ne, sympy.StrictLessThan: torch.lt, sympy.LessThan: torch.le,
    sympy.StrictGreaterThan: torch.gt, sympy.GreaterThan: torch.ge,
}  # fmt: skip


def evaluate(expr: sympy.Basic, environment: Environment) -> Tensor:
    """The value: bool for a Boolean, int64 for whole numbers, else float64. Raises ValueError for unknown nodes."""
    if isinstance(expr, Relational | Compared):
        (left, right), _ = _common([_exact(side, environment) for side in expr.args])
        if isinstance(expr, Compared):
            return _RELATIONS[expr.relation](left, right) == expr.holds
        return _RELATIONS[type(expr)](left, right)
    if isinstance(expr, sympy.logic.boolalg.BooleanAtom):
        return torch.tensor(expr is sympy.true).view(1, 1, 1, 1)
    if isinstance(expr, sympy.And | sympy.Or):
        parts = [evaluate(argument, environment) for argument in expr.args]
        return reduce(torch.logical_and if isinstance(expr, sympy.And) else torch.logical_or, parts)
    if isinstance(expr, sympy.Not):
        return ~evaluate(expr.args[0], environment)
    numerator, denominator = _exact(expr, environment)
    return numerator if denominator == 1 else numerator.double() / denominator


def _exact(expr: sympy.Basic, environment: Environment) -> Exact:
    if isinstance(expr, sympy.Rational):
        return torch.tensor(int(expr.p)).view(1, 1, 1, 1), int(expr.q)
    if expr.is_number:
        return torch.tensor(float(expr), dtype=torch.float64).view(1, 1, 1, 1), 1
    if isinstance(expr, sympy.Symbol):
        return environment.symbols[expr.name], 1
    if isinstance(expr, AppliedUndef):
        indices = [_floor(*_exact(index, environment)) for index in expr.args]
        return read(environment.tables[lookup_name(expr)], indices, environment.heads), 1
    return _combined(expr, [_exact(argument, environment) for argument in expr.args])


def _combined(expr: sympy.Basic, parts: list[Exact]) -> Exact:
    """The outermost operation of `expr` on the values of its arguments."""
    if isinstance(expr, sympy.Mul):
        return reduce(lambda a, b: (a[0] * b[0], a[1] * b[1]), parts)
    if isinstance(expr, sympy.floor):
        return _floor(*parts[0]), 1
    if isinstance(expr, sympy.Abs):
        return parts[0][0].abs(), parts[0][1]
    if isinstance(expr, sympy.Pow):
        values = [numerator.double() / denominator for numerator, denominator in parts]
        return values[0] ** values[1], 1
    numerators, denominator = _common(parts)
    operations: dict[type[sympy.Basic], Callable[[Tensor, Tensor], Tensor]] = {
        sympy.Add: torch.add, sympy.Min: torch.minimum, sympy.Max: torch.maximum, sympy.Mod: torch.remainder,
    }  # fmt: skip
    for kind, operation in operations.items():
        if isinstance(expr, kind):
            return reduce(operation, numerators), denominator
    raise ValueError(f"`{type(expr).__name__}` has no meaning in an element expression")


def _common(parts: list[Exact]) -> tuple[list[Tensor], int]:
    """The numerators over one denominator."""
    denominator = lcm(*(own for _, own in parts))
    numerators = [numerator * (denominator // own) for numerator, own in parts]
    if any(x.is_floating_point() for x in numerators):
        numerators = [x.double() for x in numerators]
    return numerators, denominator


def _floor(numerator: Tensor, denominator: int) -> Tensor:
    if numerator.is_floating_point():
        return torch.floor(numerator / denominator).long()
    return torch.div(numerator, denominator, rounding_mode="floor")


def read(table: Table, indices: list[Tensor], heads: int) -> Tensor:
    """The elements at 4-D indices, one per axis, as float64 or int64; 0 outside of the tensor."""
    data = table.data
    at = [torch.arange(data.shape[0]).view(-1, 1, 1, 1)]
    inside = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for index, size, grouped, origin in zip(indices, data.shape[1:], table.grouped, table.origin, strict=True):
        own = torch.div(index, heads // size, rounding_mode="floor") if grouped else index - origin
        inside = inside & (own >= 0) & (own < size)
        at.append(own.clamp(0, max(0, size - 1)))
    exact = torch.float64 if data.is_floating_point() else torch.int64
    if data.numel() == 0:
        return torch.zeros_like(inside, dtype=exact)
    return torch.where(inside, data[tuple(at)].to(exact), torch.zeros((), dtype=exact))
