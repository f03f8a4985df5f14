"""formulas: counts as exact expressions of the length N and the batch B.

A count of affine and periodic sets is a polynomial of degree two of N and of the remainders of N by the units, once N
is past every window. Its coefficients follow from exact counts at some lengths; further lengths have to agree, or the
formula is given for multiples of the whole period only, or not at all. Below `start` the exact count
itself is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import sympy

from spdsl.cost.between import period
from spdsl.cost.kernels import Kernel, Options
from spdsl.cost.machine import machine_of
from spdsl.cost.phases import Stage, kernels
from spdsl.ir.plan import Plan
from spdsl.passes.count import Shape
from spdsl.targets import Target

N = sympy.Symbol("N", integer=True, positive=True)
B = sympy.Symbol("B", integer=True, positive=True)
_STARTS = (256, 1024, 4096, 16384, 65536, 262144)
_CHECKS = 5  # further lengths that have to agree
_FAR = 1 << 20  # as does this one

Count = Callable[[int], int]


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
    for start in (one for one in _STARTS if one >= least):
        found = _fitted(count, _basis(small), start, 1)
        found = found or (
            _fitted(count, [sympy.S.One, N, N**2], -(-start // whole) * whole, whole) if whole > 1 else None
        )
        if found is not None:
            return found
    return None


def _basis(units: Sequence[int]) -> list[sympy.Expr]:
    rests = [sympy.Mod(N, unit) for unit in units]
    found = [sympy.S.One, N, N**2, *rests, *(N * rest for rest in rests)]
    return found + [a * b for i, a in enumerate(rests) for b in rests[i:]]


def _fitted(count: Count, basis: list[sympy.Expr], start: int, modulus: int) -> Formula | None:
    places = [start + modulus * i * (1 if modulus > 1 else 1 + 12 * i) for i in range(len(basis) + _CHECKS)]
    far = [one // modulus * modulus + (37 if modulus == 1 else 0) for one in (8 * start, _FAR)]
    used, further = places[: len(basis)], [*places[len(basis) :], *far]
    rows = [[_value(term, place) for term in basis] for place in used]
    factors = _solved(rows, [Fraction(count(place)) for place in used])
    if factors is None:
        return None
    for place in further:
        if sum(factor * _value(term, place) for factor, term in zip(factors, basis, strict=True)) != count(place):
            return None
    terms = (sympy.Rational(one.numerator, one.denominator) * term for one, term in zip(factors, basis, strict=True))
    return Formula(sympy.Add(*terms), start, modulus)


def _value(term: sympy.Expr, place: int) -> Fraction:
    return Fraction(int(term.xreplace({N: sympy.Integer(place)})))


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


# ---- of the kernels of a stage


def printed(plan: Plan, stage: Stage, shape: Shape, target: Target, options: Options) -> Iterator[str]:
    """Lines for people: each kernel with its launches, FLOPs, FLOPs of the machine and bytes."""
    units = sorted({one.choice.unit for one in plan.choices} | {_stride(plan)})
    whole = period(plan, shape, target)

    @cache
    def known(length: int, batch: int = 1) -> list[Kernel]:
        return kernels(plan, stage, length, replace(shape, batch=batch), machine_of(target), options)

    usual = _STARTS[2]
    sizes = f"heads {shape.heads} and {shape.kv_heads}, dims {shape.qk} and {shape.v}"
    yield f"{plan.pattern.name}, {stage.value} on {target.name}, {sizes}; batch B of N tokens"
    for i, own in enumerate(known(usual)):
        yield f"  {own.name}: {own.launches} launches, {own.steps} operators of torch"
        for field in ("flops", "machine", "moved"):
            twice = getattr(known(usual, 2)[i], field).value == 2 * getattr(own, field).value
            found = formula(_counted(known, own.name, i, field), units, whole, 1024)
            if found is None:
                yield f"    {_LABELS[field]} = no polynomial of N"
            elif found.expression != 0:
                sign = "=" if getattr(own, field).exact else "<="
                expression = sympy.sstr(B * found.expression if twice else found.expression)
                yield f"    {_LABELS[field]} {sign} {expression}    ({_holds(found)}{'' if twice else ', B = 1'})"


def _holds(found: Formula) -> str:
    return f"multiples of {found.modulus:,} from {found.start:,}" if found.modulus > 1 else f"N >= {found.start:,}"


_LABELS = {"flops": "FLOPs", "machine": "FLOPs of the machine", "moved": "bytes"}


def _counted(known: Callable[[int], list[Kernel]], name: str, i: int, field: str) -> Count:
    def count(length: int) -> int:
        own = next((one for one in known(length)[i:] if one.name == name), None)
        return int(getattr(own, field).value) if own is not None else -1

    return count


def _stride(plan: Plan) -> int:
    return max([sweep.stream.grid.stride for one in plan.softmaxes for sweep in one.sweeps], default=1)
