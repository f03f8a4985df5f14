"""arithmetic: numbers, element expressions and conditions of the tree as sympy expressions, built node by node."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import sympy
from sympy.core.relational import Relational

from spdsl.ir.compared import comparison
from spdsl.ir.pattern import Tensor
from spdsl.ir.symbols import LENGTH, Boolean, Expr, H, K, Q, lookup, lookups
from spdsl.passes.names import Names
from spdsl.syntax import tree

LARGEST = 2**31 - 1  # positions are int32 in the kernels
POSITIONS = {"q": Q, "k": K, "h": H, "length": LENGTH}

_SUMS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: sympy.floor(a / b),
    "%": lambda a, b: sympy.Mod(a, b),
}
_COMPARISONS: dict[str, type[Relational]] = {
    "<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "==": sympy.Eq, "!=": sympy.Ne,
}  # fmt: skip
_FUNCTIONS: dict[str, tuple[int, Callable[..., Expr]]] = {
    "min": (2, sympy.Min), "max": (2, sympy.Max), "abs": (1, sympy.Abs), "sqrt": (1, sympy.sqrt),
}  # fmt: skip
MATH = frozenset(_FUNCTIONS)


def number(names: Names, expr: tree.Expr) -> Expr | None:
    """A compile-time number: literals, parameters and arithmetic."""
    value = _value(names, expr, positions=False)
    if value is not None and not value.is_number:
        names.report.error(
            "E309",
            "this size is not known when compiling",
            expr.span,
            "depends on the call",
            hint="use numbers and `param`s; conditions on `length` go to `return ... if`",
        )
        return None
    return value


def size(names: Names, expr: tree.Expr, least: int | None, what: str) -> int | None:
    """A compile-time integer: the number rounded down, at least `least`."""
    value = number(names, expr)
    if value is None:
        return None
    whole = int(sympy.floor(value))
    if whole > LARGEST or (least is not None and whole < least):
        bound = f"at least {least}" if least is not None and whole < least else f"at most {LARGEST}"
        names.report.error(
            names.out_of_domain(expr), f"{what} is {whole}, it must be {bound}", expr.span, f"{bound} is needed"
        )
        return None
    return whole


def element(names: Names, expr: tree.Expr) -> Expr | None:
    """A number per (q, k, h): positions, tensor reads, parameters and arithmetic."""
    return _value(names, expr, positions=True)


def condition(names: Names, expr: tree.Expr, phases: dict[str, Boolean] | None = None) -> Boolean | None:
    """A Boolean per (q, k, h); with `phases`, a guard of a result: over phases, length and scalars instead."""
    if isinstance(expr, tree.Binary) and expr.operator in ("&", "|"):
        left, right = condition(names, expr.left, phases), condition(names, expr.right, phases)
        if left is None or right is None:
            return None
        return sympy.And(left, right) if expr.operator == "&" else sympy.Or(left, right)
    if isinstance(expr, tree.Unary) and expr.operator == "~":
        inner = condition(names, expr.operand, phases)
        return None if inner is None else sympy.Not(inner)
    if isinstance(expr, tree.Binary) and expr.operator in _COMPARISONS:
        left_value = _value(names, expr.left, positions=phases is None)
        right_value = _value(names, expr.right, positions=phases is None)
        if left_value is None or right_value is None:
            return None
        return comparison(_COMPARISONS[expr.operator], left_value, right_value)
    if phases is not None and isinstance(expr, tree.Name) and expr.text in phases:
        return phases[expr.text]
    value = _value(names, expr, positions=phases is None)
    if value is None:
        return None
    if not lookups(value):
        names.report.error(
            "E205", "a condition is expected here", expr.span, "is a number", hint="compare it: `... < ...`"
        )
        return None
    return comparison(sympy.Ne, value, sympy.S.Zero)


def _value(names: Names, expr: tree.Expr, positions: bool) -> Expr | None:
    match expr:
        case tree.Number():
            return sympy.Rational(expr.value.numerator, expr.value.denominator)
        case tree.Name():
            return _named(names, expr, positions)
        case tree.Unary(operator="-"):
            inner = _value(names, expr.operand, positions)
            return None if inner is None else -inner
        case tree.Binary() if expr.operator in _SUMS:
            return _sum(names, expr, positions)
        case tree.Call() if expr.function.text in _FUNCTIONS:
            return _function(names, expr, positions)
        case tree.Restrict():
            return _read(names, expr, positions)
    names.report.error("E205", "an arithmetic expression is expected here", expr.span, "not a number")
    return None


def _named(names: Names, name: tree.Name, positions: bool) -> Expr | None:
    if positions and name.text in POSITIONS:
        return POSITIONS[name.text]
    if name.text in ("k", "h"):
        names.report.error(
            "E205",
            f"the position `{name.text}` has no meaning here",
            name.span,
            "outside an element expression",
            hint="positions are known inside `where(...)` and `bias = ...`",
        )
        return None
    found = names.find(name)
    if found is None:
        return None
    if isinstance(found, Fraction):
        return sympy.Rational(found.numerator, found.denominator)
    if isinstance(found, sympy.Expr):
        return found
    if isinstance(found, Tensor) and not found.axes:
        return lookup(found.name, integer=found.dtype != "float")
    hint = f"read one element: `{name.text}[k]`" if isinstance(found, Tensor) else ""
    names.report.error("E201", f"`{name.text}` is not a number", name.span, "a number is expected here", hint=hint)
    return None


def _sum(names: Names, expr: tree.Binary, positions: bool) -> Expr | None:
    left, right = _value(names, expr.left, positions), _value(names, expr.right, positions)
    if left is None or right is None:
        return None
    if expr.operator in ("/", "//", "%") and right.is_positive is not True:
        names.report.error(
            names.out_of_domain(expr.right), "the divisor is not a positive number", expr.right.span, "must be positive"
        )
        return None
    result = _SUMS[expr.operator](left, right)
    if result.is_number and abs(result) > LARGEST:
        names.report.error("E006", f"the value exceeds {LARGEST}", expr.span, "too large")
        return None
    return result


def _function(names: Names, call: tree.Call, positions: bool) -> Expr | None:
    count, function = _FUNCTIONS[call.function.text]
    if len(call.arguments) != count or any(argument.name for argument in call.arguments):
        names.report.error(
            "E202",
            f"`{call.function.text}` takes {count} plain argument{'s' * (count > 1)}",
            call.span,
            "wrong arguments",
        )
        return None
    values = [_value(names, argument.value, positions) for argument in call.arguments]
    return None if any(value is None for value in values) else function(*values)


def _read(names: Names, expr: tree.Restrict, positions: bool) -> Expr | None:
    """`tensor[index]`, one index per axis: `table[h][k]`."""
    indices: list[tree.Expr] = []
    base: tree.Expr = expr
    while isinstance(base, tree.Restrict):
        indices.insert(0, base.index)
        base = base.base
    found = names.find(base) if isinstance(base, tree.Name) else None
    if found is None:
        return None
    if not isinstance(found, Tensor):
        names.report.error("E201", "only a tensor can be read by an index", base.span, "is not a tensor")
        return None
    if len(indices) != len(found.axes):
        axes = ", ".join(str(axis) for axis in found.axes) or "none"
        names.report.error(
            "E204",
            f"`{found.name}` has {len(found.axes)} axes, {len(indices)} indices are written",
            expr.span,
            f"axes: {axes}",
            hint="write one index in brackets per axis",
        )
        return None
    if "query" in found.axes:
        names.report.error(
            "E105", "reads along the axis `query` are not built yet", expr.span, "no element test reads them",
            hint="use a `token` axis: it is read at positions, the query's too",
        )  # fmt: skip
        return None
    values = [_value(names, index, positions) for index in indices]
    if any(value is None for value in values):
        return None
    for axis, index, value in zip(found.axes, indices, values, strict=True):
        strangers = {"head": {Q, K}, "kv_head": {Q, K}, "query": {K, H}, "token": {H}}.get(str(axis), set())
        if value is not None and value.free_symbols & strangers:
            position = {"head": "h", "kv_head": "h", "query": "q"}.get(str(axis), "q` or `k")
            names.report.error(
                "E204", f"the axis `{axis}` of `{found.name}` is read at another position", index.span,
                "wrong kind of position", hint=f"index it by `{position}`",
            )  # fmt: skip
            return None
    return lookup(found.name, *values, integer=found.dtype != "float")
