"""formulas: counts as exact expressions of the length N.

A count of affine and periodic sets is a polynomial of degree two of N and of the remainders of N by the units, once N
is past every window. Its coefficients follow from exact counts at some lengths; further lengths have to agree, or the
formula is given for multiples of the whole period only, or not at all. Below `start` the exact count
itself is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import sympy

N = sympy.Symbol("N", integer=True, positive=True)
STARTS = (256, 1024, 4096, 16384, 65536, 262144)
_CHECKS = 5  # further lengths that have to agree
FAR = 1 << 20  # as does this one

Count = Callable[[int], int]
Point = tuple[int, ...]  # a value for each symbol


@dataclass(frozen=True, slots=True)
class Formula:
    """`expression` of N for every N >= start, or (modulus > 1) for its multiples."""

    expression: sympy.Expr
    start: int
    modulus: int = 1

    def at(self, length: int) -> int:
        """ValueError where the formula does not hold."""
        if length < self.start or length % self.modulus:
            raise ValueError(f"holds for multiples of {self.modulus} from {self.start} on")
        return int(self.expression.xreplace({N: sympy.Integer(length)}))


def formula(count: Count, units: Sequence[int] = (), whole: int = 1, least: int = 1) -> Formula | None:
    """The formula of a count with the given units, or of its multiples of `whole`; None if there is none."""
    count = cache(count)
    small = sorted({unit for unit in units if unit > 1})[:2]
    for start in (length for length in STARTS if length >= least):
        fitted = _fitted(count, _basis(small), start, 1)
        fitted = fitted or (
            _fitted(count, [sympy.S.One, N, N**2], -(-start // whole) * whole, whole) if whole > 1 else None
        )
        if fitted is not None:
            return fitted
    return None


def _basis(units: Sequence[int]) -> list[sympy.Expr]:
    rests = [sympy.Mod(N, unit) for unit in units]
    terms = [sympy.S.One, N, N**2, *rests, *(N * rest for rest in rests)]
    return terms + [a * b for i, a in enumerate(rests) for b in rests[i:]]


def _fitted(count: Count, basis: list[sympy.Expr], start: int, modulus: int) -> Formula | None:
    places = [start + modulus * i * (1 if modulus > 1 else 1 + 12 * i) for i in range(len(basis) + _CHECKS)]
    far = [length // modulus * modulus + (37 if modulus == 1 else 0) for length in (8 * start, FAR)]
    used, further = places[: len(basis)], [*places[len(basis) :], *far]
    expression = through(count, (N,), basis, [(length,) for length in used], [(length,) for length in further])
    return None if expression is None else Formula(expression, start, modulus)


def through(
    count: Callable[..., int | None],
    symbols: Sequence[sympy.Symbol],
    basis: Sequence[sympy.Expr],
    used: Sequence[Point],
    further: Sequence[Point],
) -> sympy.Expr | None:
    """The sum of multiples of `basis` that is `count` at the points used, if it is so at the further ones, too."""
    rows = [[_value(term, symbols, point) for term in basis] for point in used]
    right = [Fraction(value) for point in used if (value := count(*point)) is not None]
    factors = _solved(rows, right) if len(right) == len(rows) else None
    if factors is None:
        return None
    for point in further:
        terms = (factor * _value(term, symbols, point) for factor, term in zip(factors, basis, strict=True) if factor)
        if sum(terms) != count(*point):
            return None
    parts = (sympy.Rational(own.numerator, own.denominator) * term for own, term in zip(factors, basis, strict=True))
    return sympy.Add(*parts)


def _value(term: sympy.Expr, symbols: Sequence[sympy.Symbol], point: Point) -> Fraction:
    return Fraction(int(term.xreplace({x: sympy.Integer(value) for x, value in zip(symbols, point, strict=True)})))


def _solved(rows: list[list[Fraction]], right: list[Fraction]) -> list[Fraction] | None:
    """Gauss and Jordan, exactly; None for a singular system."""
    table = [[*row, value] for row, value in zip(rows, right, strict=True)]
    size = len(table)
    for i in range(size):
        pivot = next((j for j in range(i, size) if table[j][i]), None)
        if pivot is None:
            return None
        table[i], table[pivot] = table[pivot], table[i]
        table[i] = [value / table[i][i] for value in table[i]]
        for j in range(size):
            if j != i and table[j][i]:
                table[j] = [a - table[j][i] * b for a, b in zip(table[j], table[i], strict=True)]
    return [row[-1] for row in table]
