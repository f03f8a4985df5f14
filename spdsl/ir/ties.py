"""Maxima and minima that are differentiated: which side a gradient goes to, and in which order sides are taken."""

from __future__ import annotations

import sympy

from spdsl.ir.symbols import Expr


class Above(sympy.Function):  # type: ignore[misc]
    """1 where a > b, 1/2 where they are equal, else 0: the derivative of max(a, b) by a."""

    nargs = 2
    is_real = True


def above(a: Expr, b: Expr) -> Expr:
    found: Expr = Above(a, b)
    return found


def sides(value: Expr) -> list[Expr]:
    """Those of a maximum or minimum: it is that of the first one and of the rest."""
    return sorted(value.args, key=lambda side: (not side.is_number, str(side)))
