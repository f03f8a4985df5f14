"""bias_reads: a bias -> its reads of float tensors, each with the derivative of the bias by it."""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy.core.function import AppliedUndef

from spdsl.budget import spend
from spdsl.ir.bias import BiasRead
from spdsl.ir.pattern import Choice, Tensor
from spdsl.ir.symbols import Expr, lookup_name, lookups
from spdsl.ir.ties import above, sides

STEPS = 20  # of the derivative of one operation


def bias_reads(bias: Expr | None, inputs: Iterable[Tensor | Choice]) -> tuple[BiasRead, ...]:
    """Those whose elements change the bias: a floor has no derivative, and what is compared stands in no bias."""
    tensors = {one.name: one for one in inputs if isinstance(one, Tensor) and one.dtype == "float"}
    reads = [] if bias is None else [read for read in lookups(bias) if lookup_name(read) in tensors]
    found = (BiasRead(tensors[lookup_name(read)], read, derivative(bias, read)) for read in reads)
    return tuple(one for one in found if one.slope != 0)


def derivative(value: Expr, read: Expr) -> Expr:
    """The derivative of an element expression by a tensor read: at a tie both sides of min and max have a half."""
    if value == read:
        return sympy.S.One
    if isinstance(value, AppliedUndef | sympy.floor) or not value.has(read):
        return sympy.S.Zero
    spend(STEPS * len(value.args))
    if isinstance(value, sympy.Add):
        return sympy.Add(*(derivative(term, read) for term in value.args))
    if isinstance(value, sympy.Mul):
        return sympy.Add(*(_others(value, i) * derivative(factor, read) for i, factor in enumerate(value.args)))
    if isinstance(value, sympy.Pow):
        return value.exp * value.base ** (value.exp - 1) * derivative(value.base, read)
    if isinstance(value, sympy.Max | sympy.Min):
        return _of_sides(value, read)
    if isinstance(value, sympy.Abs):
        inner = value.args[0]
        return (2 * above(inner, sympy.S.Zero) - 1) * derivative(inner, read)
    assert isinstance(value, sympy.Mod), value
    number, divisor = value.args
    return derivative(number, read) - sympy.floor(number / divisor) * derivative(divisor, read)


def _others(product: sympy.Mul, i: int) -> Expr:
    return sympy.Mul(*product.args[:i], *product.args[i + 1 :])


def _of_sides(value: Expr, read: Expr) -> Expr:
    """Of max(a, max(b, c)), as it is computed."""
    one, *rest = sides(value)
    other = value.func(*rest)
    a, b = (one, other) if isinstance(value, sympy.Max) else (other, one)
    return above(a, b) * derivative(one, read) + above(b, a) * derivative(other, read)
