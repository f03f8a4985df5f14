"""How large an expression is, so that it can be refused before sympy works on it: without walking more than allowed."""

from __future__ import annotations

from math import prod

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

FAR = 10**9  # as many terms as nothing may have


def size(value: sympy.Basic, most: int) -> int:
    """Its operators, symbols and numbers, repetitions counted; `most` + 1 if there are more."""
    found, waiting = 0, [value]
    while waiting and found <= most:
        found += 1
        waiting.extend(waiting.pop().args)
    return found


def terms(value: sympy.Basic) -> int:
    """A bound on the terms of an expression that is multiplied out, or of the largest part inside a function."""
    return _terms(value)[1]


def _terms(value: sympy.Basic) -> tuple[int, int]:
    """(its own, those of its largest part)"""
    if not value.args:
        return 1, 1
    parts = [_terms(part) for part in value.args]
    if isinstance(value, sympy.Add):
        own = sum(part for part, _ in parts)
    elif isinstance(value, sympy.Mul):
        own = prod(part for part, _ in parts)
    elif isinstance(value, sympy.Pow) and value.exp.is_Integer and value.exp > 0:
        own = min(FAR, parts[0][0] ** min(int(value.exp), 64))
    else:
        own = 1
    own = min(own, FAR)
    return own, max(own, *(largest for _, largest in parts))


def nesting(value: sympy.Basic) -> int:
    """How deep functions other than sums, products and logic stand inside one another. A read counts as two: what is
    printed for it holds its index several times.
    """
    inner = max((nesting(part) for part in value.args), default=0)
    plain = sympy.Add | sympy.Mul | sympy.And | sympy.Or | sympy.Not | Relational
    if isinstance(value, AppliedUndef):
        return inner + 2 if value.args else 0
    return inner if not value.args or isinstance(value, plain) else inner + 1


def digits(value: sympy.Basic) -> int:
    """Digits of the longest numerator or denominator in it."""
    numbers = value.atoms(sympy.Rational)
    return max((len(str(abs(part))) for number in numbers for part in (int(number.p), int(number.q))), default=0)
