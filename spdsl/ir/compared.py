"""Comparisons of numbers that may be NaN: what compares with NaN is false, and `!=` is true.

A relation of sympy is one of real numbers: it takes `~(a <= b)` for `a > b`, `a == a` for true and `a - b <= 0` for
`a <= b`. With a NaN, or two infinities, none of these holds, so such a comparison stays as it is written.
"""

from __future__ import annotations

import sympy
from sympy.core.relational import Relational

from spdsl.ir.symbols import Boolean, Expr, lookups


class Compared(Boolean):  # type: ignore[misc]
    """left <relation> right, by the rules of IEEE 754."""

    relation: type[Relational]

    @property
    def sides(self) -> tuple[Expr, Expr]:
        left, right = self.args
        return left, right


_KINDS = {
    relation: type(f"Compared{relation.__name__}", (Compared,), {"relation": relation, "__slots__": ()})
    for relation in (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne)
}


def compared(relation: type[Relational], left: Expr, right: Expr) -> Boolean:
    """The comparison as written."""
    found: Boolean = _KINDS[relation](left, right)
    return found


def comparison(relation: type[Relational], left: Expr, right: Expr) -> Boolean:
    """The same, as a relation of sympy where no number can be NaN."""
    exact = all(read.is_integer for side in (left, right) for read in lookups(side))
    return relation(left, right) if exact else compared(relation, left, right)
