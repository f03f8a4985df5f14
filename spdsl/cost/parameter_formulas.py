"""parameter_formulas: counts as exact expressions of the length N and one parameter of the pattern.

As in `formulas`: a polynomial of degree two in each, through exact counts at some lengths and values, with which
further ones have to agree. Counts of tiles keep one form between multiples of a block, so values a step apart are
tried, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import sympy

from spdsl.cost.formulas import FAR, STARTS, N, through

_STEPS = (1, 16, 64, 128)  # between values of the parameter; the last one tried is its own value
_USED, _FURTHER = (0, 1, 2), (3, 7, 41)  # steps from the parameter's value; periods from the first length

Count = Callable[[int, int], int | None]
"""Of a length and a value; None for a value that the pattern refuses."""


@dataclass(frozen=True, slots=True)
class ParameterFormula:
    """`expression` of N and the parameter, for lengths `modulus` apart from `start` and values `step` from `first`."""

    expression: sympy.Expr
    start: int
    modulus: int
    first: int
    step: int


def parameter_formula(count: Count, parameter: sympy.Symbol, value: int, whole: int) -> ParameterFormula | None:
    """The formula around `value` for lengths that are multiples of `whole`; None if there is none."""
    basis = [N**i * parameter**j for i in range(3) for j in range(3)]
    for step in dict.fromkeys((*_STEPS, value)):
        values = [value + step * i for i in _USED + _FURTHER]
        if any(count(STARTS[2], other) is None for other in values):
            continue
        for start in (length for length in STARTS if length >= 4 * values[-1]):
            first = -(-start // whole) * whole
            used, further = _grid(first, whole, values)
            expression = through(count, (N, parameter), basis, list(used), list(further))
            if expression is not None:
                return ParameterFormula(expression, first, whole, value, step)
    return None


def _grid(first: int, whole: int, values: list[int]) -> tuple[Iterator[tuple[int, int]], Iterator[tuple[int, int]]]:
    """The points that the polynomial goes through, and the others."""
    used = [first + whole * i for i in _USED]
    far = [first + whole * (length // whole) for length in (8 * first, FAR)]
    further = [*far, *(first + whole * i for i in _FURTHER)]
    known = values[: len(_USED)]
    return product(used, known), iter([*product(further, values), *product(used, values[len(_USED) :])])
