"""values: numbers of the tree as sympy expressions, built node by node: literals, names, arithmetic, tensor reads."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import sympy

from spdsl.budget import spend
from spdsl.ir import extent
from spdsl.ir.pattern import Tensor
from spdsl.ir.symbols import LENGTH, Expr, H, K, Q, lookup
from spdsl.limits import NUMBER_VALUE
from spdsl.passes.expression_limits import within_limits
from spdsl.passes.names import Names, mentioned
from spdsl.syntax import tree

POSITIONS = {"q": Q, "k": K, "h": H, "length": LENGTH}

_SUMS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: sympy.floor(a / b),
    "%": lambda a, b: sympy.Mod(a, b),
}
_FUNCTIONS: dict[str, tuple[int, Callable[..., Expr]]] = {
    "min": (2, sympy.Min), "max": (2, sympy.Max), "abs": (1, sympy.Abs), "sqrt": (1, sympy.sqrt),
}  # fmt: skip
MATH = frozenset(_FUNCTIONS)
_SOME = sympy.Symbol("length", integer=True, positive=True)  # of a sequence that has tokens
# Steps of one operation on short operands: what sympy finds out about signs and common factors takes most of it.
STEPS, DIVISION, FUNCTION = 10, 40, 100


def value_of(names: Names, expr: tree.Expr, positions: bool) -> Expr | None:
    match expr:
        case tree.Number():
            return sympy.Rational(expr.value.numerator, expr.value.denominator)
        case tree.Name():
            return _named(names, expr, positions)
        case tree.Unary(operator="-"):
            inner = value_of(names, expr.operand, positions)
            return None if inner is None else -inner
        case tree.Binary() if expr.operator in _SUMS:
            return _sum(names, expr, positions)
        case tree.Call() if expr.function.text in _FUNCTIONS:
            return _function(names, expr, positions)
        case tree.Restrict():
            return _read(names, expr, positions)
    hint = "a condition is bound as a set: `where(...)`" if isinstance(expr, tree.Binary) else ""
    if isinstance(expr, tree.Unary):
        hint = "`~` binds tighter than all other operators: `~(...)`"
    names.report.error(
        "E205", "an arithmetic expression is expected here", expr.span, "not a number", hint=hint
    )  # fmt: skip
    return None


def _named(names: Names, name: tree.Name, positions: bool) -> Expr | None:
    if positions and name.text in POSITIONS:
        return POSITIONS[name.text]
    if name.text in ("k", "h"):
        _misplaced(names, name, f"the position `{name.text}`")
        return None
    bound = names.find(name)
    if bound is None:
        return None
    if isinstance(bound, Fraction):
        return sympy.Rational(bound.numerator, bound.denominator)
    if isinstance(bound, sympy.Expr):
        if positions or not bound.free_symbols & {Q, K, H}:
            return bound
        _misplaced(names, name, f"`{name.text}`, a number for each pair,")
        return None
    if isinstance(bound, Tensor) and not bound.axes:
        return lookup(bound.name, integer=bound.dtype != "float")
    hint = f"read one element: `{name.text}[k]`" if isinstance(bound, Tensor) else ""
    names.report.error("E201", f"`{name.text}` is not a number", name.span, "a number is expected here", hint=hint)
    return None


def _misplaced(names: Names, name: tree.Name, what: str) -> None:
    names.report.error(
        "E205", f"{what} has no meaning here", name.span, "outside an element expression",
        hint="positions are known inside `where(...)` and `bias = ...`",
    )  # fmt: skip


def _sum(names: Names, expr: tree.Binary, positions: bool) -> Expr | None:
    left, right = value_of(names, expr.left, positions), value_of(names, expr.right, positions)
    if left is None or right is None:
        return None
    divisor = right.xreplace({LENGTH: _SOME}) if names.of_tokens else right
    if expr.operator in ("/", "//", "%") and divisor.is_positive is not True:
        what = f"is {right}" if right.is_number else "may be 0 or less"
        names.report.error(
            names.out_of_domain(expr.right), f"the divisor `{source_text(names, expr.right)}` {what}", expr.right.span,
            "must be positive", note="" if isinstance(expr.right, tree.Name) else names.values_in(expr.right),
        )  # fmt: skip
        return None
    if expr.operator == "*" and not within_limits(names, sympy.Mul(left, right, evaluate=False), expr.span):
        return None
    spend(STEPS if expr.operator in ("+", "-", "*") or (left.is_number and right.is_number) else DIVISION)
    result = _SUMS[expr.operator](left, right)
    if result.is_number and abs(result) > NUMBER_VALUE:
        names.report.error("E006", f"the value exceeds {NUMBER_VALUE}", expr.span, "too large")
        return None
    return result if within_limits(names, result, expr.span) else None


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
    values = [value_of(names, argument.value, positions) for argument in call.arguments]
    if any(value is None for value in values):
        return None
    spend(FUNCTION * sum(1 + extent.nesting(value) for value in values if value is not None))
    result = function(*values)
    if result.is_number and not result.is_real:
        names.report.error(
            "E203", f"`{source_text(names, call)}` is no number", call.span, "a root of a number below 0",
            hint="`sqrt` needs 0 or more",
        )  # fmt: skip
        return None
    return result if within_limits(names, result, call.span) else None


def _read(names: Names, expr: tree.Restrict, positions: bool) -> Expr | None:
    """`tensor[index]`, one index per axis: `table[h][k]`."""
    indices: list[tree.Expr] = []
    base: tree.Expr = expr
    while isinstance(base, tree.Restrict):
        indices.insert(0, base.index)
        base = base.base
    tensor = names.find(base, Tensor, _declared(indices)) if isinstance(base, tree.Name) else base
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        names.report.error("E201", "only a tensor can be read by an index", base.span, "is not a tensor")
        return None
    if len(indices) != len(tensor.axes):
        axes = ", ".join(str(axis) for axis in tensor.axes) or "none"
        names.report.error(
            "E204",
            f"`{tensor.name}` has {len(tensor.axes)} axes, {len(indices)} indices are written",
            expr.span,
            f"axes: {axes}",
            hint="write one index in brackets per axis",
        )
        return None
    values = [value_of(names, index, positions) for index in indices]
    if any(value is None for value in values):
        return None
    for axis, index, value in zip(tensor.axes, indices, values, strict=True):
        if value is not None and not _in_place(axis, value):
            _report_place(names, tensor, axis, index)
            return None
    read = lookup(tensor.name, *values, integer=tensor.dtype != "float", of_row=tensor.by_row)
    return read if within_limits(names, read, expr.span) else None


def _in_place(axis: str | int, value: Expr) -> bool:
    """Whether an axis may be read there: one of rows at the query's own alone, others not at a position of another."""
    if axis == "query":
        return bool(value == Q)
    strangers = {"head": {Q, K}, "kv_head": {Q, K}, "token": {H}}.get(str(axis), set())
    return not value.free_symbols & strangers


def _report_place(names: Names, tensor: Tensor, axis: str | int, index: tree.Expr) -> None:
    position = {"head": "h", "kv_head": "h", "query": "q"}.get(str(axis), "q` or `k")
    of_row = axis == "query"
    names.report.error(
        "E204", f"the axis `{axis}` of `{tensor.name}` is read at another position", index.span,
        "not the row of the query" if of_row else "wrong kind of position",
        note="a `query` axis holds the rows of one call, so that only the query's own row is known" if of_row else "",
        hint=f"index it by `{position}`" + (" alone; a `token` axis can be read at any position" if of_row else ""),
    )  # fmt: skip


def _declared(indices: list[tree.Expr]) -> str:
    """The declaration of a tensor that is read at such places."""
    axes = [_axis(index) for index in indices]
    return f"tensor({', '.join([*axes, *(['int'] if 'token' in axes else [])])})"


def _axis(index: tree.Expr) -> str:
    if isinstance(index, tree.Number):
        return str(int(index.value) + 1)
    positions = {name.text for name in mentioned(index)}
    return "head" if "h" in positions else "token" if positions & {"q", "k"} else "n"


def source_text(names: Names, expr: tree.Expr) -> str:
    """An expression as it is written, on one line."""
    return " ".join(names.report.source.text[expr.span.start : expr.span.end].split())
