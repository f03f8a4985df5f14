"""Interval arithmetic on element tests: can any pair of a tile be visible, must every pair be?

The answers are Booleans over the tile's corners. A tensor read on one position, `doc(k)`, becomes its least and
greatest value over the tile, written `doc.low(k)` and `doc.high(k)`; a read at any other place that moves with q or k
becomes the bounds of the whole tensor and the 0 beyond its ends, `doc.low()`. Of a tensor with a `query` axis it
becomes the bounds over the pairs of the tile, wherever it is read: `pair.low(q, k)`.
"""

from __future__ import annotations

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Equality, GreaterThan, Relational, StrictGreaterThan, StrictLessThan, Unequality

from spdsl.budget import spend
from spdsl.ir import extent
from spdsl.ir.compared import Compared, compared
from spdsl.ir.symbols import (
    K_FIRST,
    K_LAST,
    Q_FIRST,
    Q_LAST,
    Boolean,
    Expr,
    K,
    OfRow,
    Q,
    is_membership,
    lookup_name,
)
from spdsl.limits import EXPRESSION_SIZE

LOW, HIGH = ".low", ".high"

STEPS, PART = 30, 2  # of a relation or a product, and of any other part


class Unbounded(Exception):
    """The expression has a shape whose bounds are not known."""


def may(test: Boolean) -> Boolean:
    """True wherever some pair of the tile may pass the test (never wrong when false)."""
    return _settle(test, certain=False)


def must(test: Boolean) -> Boolean:
    """True only where every pair of the tile passes the test (never wrong when true)."""
    return _settle(test, certain=True)


def _settle(test: Boolean, certain: bool) -> Boolean:
    if isinstance(test, sympy.And | sympy.Or):
        return test.func(*(_settle(argument, certain) for argument in test.args))
    if isinstance(test, sympy.Not):
        return sympy.Not(_settle(test.args[0], not certain))
    if not isinstance(test, Relational | Compared) or not _moves(test):
        return test
    spend(STEPS)
    if isinstance(test, Compared):
        relation = test.relation if certain == test.holds else _OPPOSITE[test.relation]
        found = _always(relation, *test.sides)
        return found if certain else sympy.Not(found)
    try:
        low, high = bounds(sympy.expand(test.lhs - test.rhs))
    except Unbounded:
        return sympy.false if certain else sympy.true
    return _relation(test, low, high, certain)


def _relation(test: Relational, low: Expr, high: Expr, certain: bool) -> Boolean:
    """`difference <relation> 0` for some (every) difference in [low, high]."""
    if isinstance(test, Equality):
        return sympy.And(low >= 0, high <= 0) if certain else sympy.And(low <= 0, high >= 0)
    if isinstance(test, Unequality):
        return sympy.Or(low > 0, high < 0) if certain else sympy.Or(low < 0, high > 0)
    rising = isinstance(test, GreaterThan | StrictGreaterThan)
    worst = low if rising == certain else high
    strict = isinstance(test, StrictGreaterThan | StrictLessThan)
    if rising:
        return worst > 0 if strict else worst >= 0
    return worst < 0 if strict else worst <= 0


_OPPOSITE = {sympy.Lt: sympy.Ge, sympy.Ge: sympy.Lt, sympy.Gt: sympy.Le, sympy.Le: sympy.Gt,
             sympy.Eq: sympy.Ne, sympy.Ne: sympy.Eq}  # fmt: skip
_FINITE = sympy.Float("1e300")  # as a float32 it is inf


def _always(relation: type[Relational], left: Expr, right: Expr) -> Boolean:
    """True only where every pair of the tile compares so, and no number in it is NaN: bounds with NaN never do."""
    try:
        (low, high), (other_low, other_high) = bounds(sympy.expand(left)), bounds(sympy.expand(right))
    except Unbounded:
        return sympy.false
    below, above = compared(sympy.Lt, high, other_low), compared(sympy.Gt, low, other_high)
    at_most, at_least = compared(sympy.Le, high, other_low), compared(sympy.Ge, low, other_high)
    found = {
        sympy.Lt: below, sympy.Gt: above, sympy.Le: at_most, sympy.Ge: at_least,
        sympy.Eq: sympy.And(at_most, at_least), sympy.Ne: sympy.Or(below, above),
    }[relation]  # fmt: skip
    # Of infinite numbers within the bounds a sum, difference or product may be NaN.
    made = [
        end for side, ends in ((left, (low, high)), (right, (other_low, other_high))) for end in ends if _adds(side)
    ]
    return sympy.And(found, *(compared(sympy.Lt, sympy.Abs(end), _FINITE) for end in made))


def _adds(side: Expr) -> bool:
    return bool(side.atoms(AppliedUndef)) and not isinstance(side, AppliedUndef)


def _moves(expression: sympy.Basic) -> bool:
    return bool(expression.free_symbols & {Q, K})


def bounds(expression: Expr) -> tuple[Expr, Expr]:
    """Least and greatest value over the tile. Raises Unbounded."""
    spend(PART)
    if not _moves(expression):
        return expression, expression
    if expression == Q:
        return Q_FIRST, Q_LAST
    if expression == K:
        return K_FIRST, K_LAST
    if isinstance(expression, AppliedUndef):
        return _read_bounds(expression)
    if isinstance(expression, sympy.Mod):
        period = expression.args[1]
        if not period.is_positive or (not expression.is_integer and expression.atoms(AppliedUndef)):  # NaN % 3 is NaN
            raise Unbounded
        return sympy.S.Zero, period - 1 if expression.is_integer else period
    parts = [bounds(argument) for argument in expression.args]
    if isinstance(expression, sympy.Add):
        return sympy.Add(*(low for low, _ in parts)), sympy.Add(*(high for _, high in parts))
    if isinstance(expression, sympy.Mul):
        return _product(parts)
    if isinstance(expression, sympy.floor | sympy.Max | sympy.Min):
        return expression.func(*(low for low, _ in parts)), expression.func(*(high for _, high in parts))
    if isinstance(expression, sympy.Abs):
        ((low, high),) = parts
        return sympy.Max(0, low, -high), sympy.Max(-low, high)
    raise Unbounded


def _product(parts: list[tuple[Expr, Expr]]) -> tuple[Expr, Expr]:
    spend(STEPS * len(parts))
    low, high = parts[0]
    for other_low, other_high in parts[1:]:
        if low == high and low.is_number:
            products = [low * other_low, low * other_high]
            low, high = products if low >= 0 else products[::-1]
            continue
        corners = [a * b for a in (low, high) for b in (other_low, other_high)]
        if max(extent.size(corner, EXPRESSION_SIZE) for corner in corners) > EXPRESSION_SIZE:
            raise Unbounded
        low, high = sympy.Min(*corners), sympy.Max(*corners)
    return low, high


def _read_bounds(read: AppliedUndef) -> tuple[Expr, Expr]:
    name = lookup_name(read)
    moving = [index for index in read.args if _moves(index)]
    # Whoever prints the extremes knows tensors along one axis of positions, and the rectangles of a choice.
    plain = len(moving) == 1 and moving[0] in (Q, K)
    if isinstance(read, OfRow):  # it has numbers for pairs: those of a tile are looked at
        indices = read.args
    elif is_membership(read) or plain:
        indices = tuple(index if not _moves(index) else min(index.free_symbols, key=str) for index in read.args)
    else:
        indices = ()
    kind = {"integer": True} if read.is_integer else {"real": True}
    return sympy.Function(name + LOW, **kind)(*indices), sympy.Function(name + HIGH, **kind)(*indices)
