"""The symbols of element tests and range bounds.

All expressions are sympy expressions that our own lowering builds node by node; text never reaches sympy.
A tensor read `doc[k]` is an undefined function applied to its indices: `doc(k)`.
"""

from __future__ import annotations

from functools import lru_cache

import sympy
from sympy import Expr
from sympy.core.function import AppliedUndef, UndefinedFunction
from sympy.logic.boolalg import Boolean

__all__ = [
    "K_FIRST",
    "K_LAST",
    "LENGTH",
    "Q_BEGIN",
    "Q_END",
    "Q_FIRST",
    "Q_LAST",
    "Boolean",
    "Expr",
    "H",
    "K",
    "OfRow",
    "Q",
    "is_membership",
    "lookup",
    "lookup_name",
    "lookups",
    "membership",
]  # fmt: skip

# Positions. A query row before the first key has a negative position (more queries than keys), so q has no sign.
Q = sympy.Symbol("q", integer=True)
K = sympy.Symbol("k", integer=True, nonnegative=True)
H = sympy.Symbol("h", integer=True, nonnegative=True)  # query head
LENGTH = sympy.Symbol("length", integer=True, nonnegative=True)  # keys of the request at this call

# The corners of a tile, both ends inclusive.
Q_FIRST = sympy.Symbol("q_first", integer=True)
Q_LAST = sympy.Symbol("q_last", integer=True)
K_FIRST = sympy.Symbol("k_first", integer=True, nonnegative=True)
K_LAST = sympy.Symbol("k_last", integer=True, nonnegative=True)
# The rows of this call: positions [q_begin, q_end).
Q_BEGIN = sympy.Symbol("q_begin", integer=True)
Q_END = sympy.Symbol("q_end", integer=True)


class OfRow(AppliedUndef):  # type: ignore[misc]
    """The read of a tensor with a `query` axis, whose index `q` means the row of the call at position q."""


def lookup(name: str, *indices: Expr, integer: bool = True, of_row: bool = False) -> Expr:
    """The element of the tensor `name` at `indices`; of_row: one of its axes holds the rows of the call."""
    kind = {"integer": True} if integer else {"real": True}
    function = UndefinedFunction(name, bases=(OfRow if of_row else AppliedUndef,), **kind)
    applied: Expr = function(*indices)
    return applied


def membership(name: str, *indices: Expr) -> Expr:
    """0 or 1: whether a choice holds (head, row tile, unit). Its sign tells it from the read of a tensor."""
    applied: Expr = sympy.Function(name, integer=True, nonnegative=True)(*indices)
    return applied


def is_membership(read: AppliedUndef) -> bool:
    return bool(read.is_nonnegative)


def lookups(expression: sympy.Basic) -> list[AppliedUndef]:
    """All tensor reads of an expression, in a stable order."""
    return list(_lookups(expression))


@lru_cache(maxsize=4096)
def _lookups(expression: sympy.Basic) -> tuple[AppliedUndef, ...]:
    """Every stage asks for those of the same tests."""
    return tuple(sorted(expression.atoms(AppliedUndef), key=str))


def lookup_name(read: AppliedUndef) -> str:
    return str(read.func.__name__)
