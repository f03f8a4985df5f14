"""Comparisons of numbers that may be NaN: what compares with NaN is false, and `!=` is true.

A relation of sympy is one of real numbers: it takes `~(a <= b)` for `a > b`, `a == a` for true and `a - b <= 0` for
`a <= b`. With a NaN, or two infinities, none of these holds, so such a comparison stays as it is written. So does one
of a root: that of a number below 0 is NaN.
"""

from __future__ import annotations

import sympy
from sympy.core.relational import Relational

from spdsl.ir.symbols import Boolean, Expr, lookups


class Compared(Boolean):  # type: ignore[misc]
    """left <relation> right by the rules of IEEE 754, or its negation."""

    relation: type[Relational]
    holds: bool  # False: the negation
    is_Relational = True  # so sympy asks for the next two

    @property
    def sides(self) -> tuple[Expr, Expr]:
        left, right = self.args
        return left, right

    @property
    def negated(self) -> Compared:
        return compared(self.relation, *self.sides, not self.holds)

    @property
    def canonical(self) -> Compared:
        return self


def _kind(relation: type[Relational], holds: bool) -> type[Compared]:
    name = f"{'Compared' if holds else 'NotCompared'}{relation.__name__}"
    return type(name, (Compared,), {"relation": relation, "holds": holds})


_KINDS = {
    (relation, holds): _kind(relation, holds)
    for relation in (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne)
    for holds in (True, False)
}


def compared(relation: type[Relational], left: Expr, right: Expr, holds: bool = True) -> Compared:
    """The comparison as written."""
    found: Compared = _KINDS[relation, holds](left, right)
    return found


def comparison(relation: type[Relational], left: Expr, right: Expr) -> Boolean:
    """The same, as a relation of sympy where no number can be NaN."""
    sides = (left, right)
    exact = all(read.is_integer for side in sides for read in lookups(side))
    return relation(left, right) if exact and not any(map(rooted, sides)) else compared(relation, left, right)


def rooted(expression: sympy.Basic) -> bool:
    """Whether it holds a root of what the call decides."""
    return any(power.free_symbols and not power.exp.is_integer for power in expression.atoms(sympy.Pow))
