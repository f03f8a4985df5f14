"""affine: ends of ranges as sums of corners and rounded quotients, so that comparing two of them is adding numbers.

A corner is q_first, k_first, length or another symbol; a rounded quotient is a floor of a sum of corners.

>>> begin = 16 * sympy.floor(Q_FIRST / 16)  # of the block of 16 that holds the first row
>>> sorted(map(str, parts(begin - 3)))
['1', 'floor(q_first/16)']
>>> nonnegative(Q_FIRST, begin), nonnegative(begin + 15, Q_FIRST), nonnegative(begin + 14, Q_FIRST)
(True, True, False)
>>> nonnegative(LENGTH - 1, Q_LAST), nonnegative(Q_FIRST, K_FIRST)
(True, False)
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import TypeAlias

import sympy

from spdsl.budget import spend
from spdsl.ir.symbols import K_FIRST, K_LAST, LENGTH, Q_FIRST, Q_LAST, Expr

COMPARISON, PART = 3, 2  # steps, and those for each part of a sum

# Parts of a sum: a symbol, a floor, or 1 for the constant. What is not negative by itself has a name of its own.
Part: TypeAlias = sympy.Basic
Parts: TypeAlias = Mapping[Part, Fraction]
ONE = sympy.S.One
_LENGTH_OF_ROWS, _LENGTH_OF_KEYS, _REST_OF_ROWS, _REST_OF_KEYS = sympy.symbols("d1:5", nonnegative=True)


class NotAffine(Exception):
    """A product of corners, or a function of another kind."""


def nonnegative(expression: Expr, less: Expr) -> bool:
    """Proves expression - less >= 0 from q_first <= q_last < length, k_first <= k_last < length and the bounds of
    floors.
    """
    spend(COMPARISON)
    try:
        difference = dict(parts(expression))
        _add(difference, parts(less), Fraction(-1))
        spend(PART * sum(_weight(part) for part in difference))
        return any(_is_nonnegative(difference, corners) for corners in _CORNERS)
    except NotAffine:
        return False


@lru_cache(maxsize=4096)
def parts(expression: Expr) -> Parts:
    """Raises NotAffine."""
    coefficients: dict[Part, Fraction] = {}
    for part, times in sympy.expand(expression).as_coefficients_dict().items():
        if not times.is_Rational or not (part is ONE or part.is_Symbol or isinstance(part, sympy.floor)):
            raise NotAffine
        coefficients[part] = Fraction(int(times.p), int(times.q))
    return coefficients


def _weight(part: Part) -> int:
    return 1 + len(parts(part.args[0])) if isinstance(part, sympy.floor) else 1


def _add(total: dict[Part, Fraction], other: Parts, times: Fraction) -> None:
    for part, own in other.items():
        total[part] = total.get(part, Fraction(0)) + times * own


def _is_nonnegative(difference: Parts, corners: Mapping[Part, Parts]) -> bool:
    """With floors at the worse of their bounds, and each corner as what it is at least, and a rest."""
    plain: dict[Part, Fraction] = {}
    for part, times in difference.items():
        if times and isinstance(part, sympy.floor):
            inner = parts(part.args[0])
            _add(plain, inner, times)
            if times > 0:  # floor(x / unit) >= x / unit - 1 + 1 / unit
                plain[ONE] = plain.get(ONE, Fraction(0)) - times * (1 - Fraction(1, _unit(inner)))
        else:
            _add(plain, {part: times}, Fraction(1))
    at: dict[Part, Fraction] = {}
    for part, times in plain.items():
        _add(at, corners.get(part, {part: Fraction(1)}), times)
    return all(times == 0 or (times > 0 and part.is_nonnegative) for part, times in at.items() if part is not ONE) and (
        at.get(ONE, 0) >= 0
    )


def _unit(inner: Parts) -> int:
    return lcm(1, *(times.denominator for times in inner.values()))


def _corners(length: Parts) -> Mapping[Part, Parts]:
    one = Fraction(1)
    return {
        Q_LAST: {Q_FIRST: one, _LENGTH_OF_ROWS: one},
        K_LAST: {K_FIRST: one, _LENGTH_OF_KEYS: one},
        LENGTH: length,
    }


_CORNERS = tuple(
    _corners({part: Fraction(1) for part in (ONE, *parts_of_length)})
    for parts_of_length in ((Q_FIRST, _LENGTH_OF_ROWS, _REST_OF_ROWS), (K_FIRST, _LENGTH_OF_KEYS, _REST_OF_KEYS))
)
