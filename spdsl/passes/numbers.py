"""numbers: expressions over positions as plain functions of whole numbers, with traced comparisons and floors.

>>> q, k = sympy.symbols("q k", integer=True)
>>> near, trace = compiled(q - 4 * sympy.floor(k / 4) < 8), Trace()
>>> near({q: 12, k: 9}, trace), near({q: 16, k: 9}, Trace())
(True, False)
>>> trace.notes  # of the first: 9 was divided by 4, and 12 - 8 - 8 was below 0
[(9, 4), (1, 0)]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import sympy
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from spdsl.passes.series import Trace

Values = Mapping[sympy.Symbol, int]
Evaluate = Callable[[Values, Trace], int]  # a Boolean gives 0 or 1


class NotWhole(Exception):
    """An expression that whole numbers and their floors do not make up."""


def compiled(expression: sympy.Basic) -> Evaluate:
    """Raises NotWhole."""
    match expression:
        case sympy.Integer():
            number = int(expression)
            return lambda values, trace: number
        case BooleanTrue() | BooleanFalse():
            truth = int(bool(expression))
            return lambda values, trace: truth
        case sympy.Symbol():
            return lambda values, trace: values[expression]
        case sympy.Add():
            terms = [compiled(part) for part in expression.args]
            return lambda values, trace: sum(term(values, trace) for term in terms)
        case sympy.Mul():
            return _product(expression)
        case sympy.floor():
            return _floor(expression.args[0])
        case sympy.Mod():
            a, b = expression.args
            if b.is_Integer and b > 0:
                inner, unit = compiled(a), int(b)
                return lambda values, trace: trace.remainder(inner(values, trace), unit)
        case sympy.Max() | sympy.Min():
            parts = [compiled(part) for part in expression.args]
            if isinstance(expression, sympy.Max):
                return lambda values, trace: reduce(trace.most, (part(values, trace) for part in parts))
            return lambda values, trace: reduce(trace.least, (part(values, trace) for part in parts))
        case sympy.core.relational.Relational():
            return _relation(expression)
        case sympy.And() | sympy.Or() | sympy.Not():
            return _logic(expression)
    raise NotWhole(str(expression))


def _product(expression: sympy.Mul) -> Evaluate:
    factor, rest = expression.as_coeff_Mul()
    if not factor.is_Integer:
        raise NotWhole(str(expression))
    number, parts = int(factor), [compiled(part) for part in sympy.Mul.make_args(rest)]
    if len(parts) == 1:
        inner = parts[0]
        return lambda values, trace: number * inner(values, trace)

    def product(values: Values, trace: Trace) -> int:
        whole_product = number
        for part in parts:
            whole_product *= trace.constant(part(values, trace))
        return whole_product

    return product


def _floor(inner: sympy.Expr) -> Evaluate:
    top, bottom = sympy.fraction(sympy.together(inner))
    if not bottom.is_Integer:
        raise NotWhole(str(inner))
    whole, unit = compiled(sympy.expand(top)), int(bottom)
    return lambda values, trace: trace.floor(whole(values, trace), unit)


def _relation(expression: sympy.core.relational.Relational) -> Evaluate:
    top, bottom = sympy.fraction(sympy.together(expression.lhs - expression.rhs))
    if not (bottom.is_Integer and bottom > 0):
        raise NotWhole(str(expression))
    rest = compiled(sympy.expand(top))
    tests: dict[str, Evaluate] = {
        ">=": lambda values, trace: not trace.less(rest(values, trace), 0),
        "<": lambda values, trace: trace.less(rest(values, trace), 0),
        ">": lambda values, trace: trace.less(0, rest(values, trace)),
        "<=": lambda values, trace: not trace.less(0, rest(values, trace)),
        "==": lambda values, trace: trace.equal(rest(values, trace), 0),
        "!=": lambda values, trace: not trace.equal(rest(values, trace), 0),
    }
    return tests[expression.rel_op]


def _logic(expression: sympy.Basic) -> Evaluate:
    parts = [compiled(part) for part in expression.args]
    if isinstance(expression, sympy.And):
        return lambda values, trace: int(all(part(values, trace) for part in parts))
    if isinstance(expression, sympy.Or):
        return lambda values, trace: int(any(part(values, trace) for part in parts))
    inner = parts[0]
    return lambda values, trace: int(not inner(values, trace))
