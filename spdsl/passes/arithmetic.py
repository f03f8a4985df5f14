"""arithmetic: numbers, element expressions and conditions of the tree as sympy expressions, built node by node."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import sympy
from sympy.core.relational import Relational

from spdsl.budget import spend
from spdsl.diagnostics import Span
from spdsl.ir import extent
from spdsl.ir.compared import comparison
from spdsl.ir.pattern import Tensor
from spdsl.ir.symbols import LENGTH, Boolean, Expr, H, K, Q, lookup, lookups
from spdsl.limits import EXACT_DIGITS, EXPANDED_TERMS, EXPRESSION_SIZE, NESTED, NUMBER_VALUE
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
_COMPARISONS: dict[str, type[Relational]] = {
    "<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "==": sympy.Eq, "!=": sympy.Ne,
}  # fmt: skip
_FUNCTIONS: dict[str, tuple[int, Callable[..., Expr]]] = {
    "min": (2, sympy.Min), "max": (2, sympy.Max), "abs": (1, sympy.Abs), "sqrt": (1, sympy.sqrt),
}  # fmt: skip
MATH = frozenset(_FUNCTIONS)
# Steps of one operation on short operands: what sympy finds out about signs and common factors takes most of it.
STEPS, DIVISION, FUNCTION, COMPARISON, ROUNDED = 10, 40, 100, 60, 400


def number(names: Names, expr: tree.Expr, least: int | None = None, what: str = "") -> Expr | None:
    """A compile-time number: literals, parameters and arithmetic; at least `least`."""
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
    if value is not None and least is not None and value < least:
        found = f"`{_text(names, expr)}`" if any(mentioned(expr)) else what
        names.report.error(
            names.out_of_domain(expr), f"{found} is {value}, it must be at least {least}", expr.span,
            f"at least {least} is needed", note="" if isinstance(expr, tree.Name) else names.values_in(expr),
        )  # fmt: skip
        return None
    return value


def size(names: Names, expr: tree.Expr, least: int | None, what: str, most: int = NUMBER_VALUE) -> int | None:
    """A compile-time integer: the number rounded down, at least `least` and at most `most`."""
    value = number(names, expr)
    if value is None:
        return None
    whole = int(sympy.floor(value))
    if whole > most or (least is not None and whole < least):
        bound = f"at least {least}" if least is not None and whole < least else f"at most {most}"
        found = f"`{_text(names, expr)}`" if any(mentioned(expr)) else what
        names.report.error(
            names.out_of_domain(expr), f"{found} is {whole}, it must be {bound}", expr.span, f"{bound} is needed",
            note="" if isinstance(expr, tree.Name) else names.values_in(expr),
        )  # fmt: skip
        return None
    return whole


def _text(names: Names, expr: tree.Expr) -> str:
    """An expression as it is written, on one line."""
    return " ".join(names.report.source.text[expr.span.start : expr.span.end].split())


def element(names: Names, expr: tree.Expr) -> Expr | None:
    """A number per (q, k, h): positions, tensor reads, parameters and arithmetic."""
    return _value(names, expr, positions=True)


def condition(names: Names, expr: tree.Expr, phases: dict[str, Boolean] | None = None) -> Boolean | None:
    """A Boolean per (q, k, h); with `phases`, a guard of a result: over phases, length and scalars instead."""
    if isinstance(expr, tree.Binary) and expr.operator in ("&", "|"):
        left, right = condition(names, expr.left, phases), condition(names, expr.right, phases)
        if left is None or right is None:
            return None
        spend(2 * STEPS * (len(left.args) + len(right.args)))
        return sympy.And(left, right) if expr.operator == "&" else sympy.Or(left, right)
    if isinstance(expr, tree.Unary) and expr.operator == "~":
        inner = condition(names, expr.operand, phases)
        return None if inner is None else sympy.Not(inner)
    if isinstance(expr, tree.Binary) and expr.operator in _COMPARISONS:
        left_value = _value(names, expr.left, positions=phases is None)
        right_value = _value(names, expr.right, positions=phases is None)
        if left_value is None or right_value is None:
            return None
        quotients = sum(len(value.atoms(sympy.floor)) for value in (left_value, right_value))
        sizes = extent.size(left_value, EXPRESSION_SIZE) + extent.size(right_value, EXPRESSION_SIZE)
        spend(COMPARISON + ROUNDED * quotients + sizes)
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
    names.report.error(
        "E205", "an arithmetic expression is expected here", expr.span, "not a number",
        hint="`~` binds tighter than all other operators: `~(...)`" if isinstance(expr, tree.Unary) else "",
    )  # fmt: skip
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
        found = f"is {right}" if right.is_number else "may be 0 or less"
        names.report.error(
            names.out_of_domain(expr.right), f"the divisor `{_text(names, expr.right)}` {found}", expr.right.span,
            "must be positive", note="" if isinstance(expr.right, tree.Name) else names.values_in(expr.right),
        )  # fmt: skip
        return None
    if expr.operator == "*" and not _short(names, sympy.Mul(left, right, evaluate=False), expr.span):
        return None
    spend(STEPS if expr.operator in ("+", "-", "*") or (left.is_number and right.is_number) else DIVISION)
    result = _SUMS[expr.operator](left, right)
    if result.is_number and abs(result) > NUMBER_VALUE:
        names.report.error("E006", f"the value exceeds {NUMBER_VALUE}", expr.span, "too large")
        return None
    return result if _short(names, result, expr.span) else None


def _short(names: Names, value: Expr, span: Span) -> bool:
    """Whether sympy can go on with a value; an error if it is too long."""
    found = extent.size(value, EXPRESSION_SIZE)
    spend(found)
    if found > EXPRESSION_SIZE:
        names.report.error(
            "E307", f"the expression has more than {EXPRESSION_SIZE} operators and operands", span,
            "too complex, with its names written out", hint="compute it outside and pass it as a `tensor`",
        )  # fmt: skip
        return False
    found = extent.nesting(value)
    if found > NESTED:
        names.report.error(
            "E307", f"functions and reads (two each) stand {found} deep inside one another, at most {NESTED}", span,
            "nested too deeply", hint="compute it outside and pass it as a `tensor`",
        )  # fmt: skip
        return False
    spend(STEPS * found)
    found = extent.digits(value)
    if found > EXACT_DIGITS:
        names.report.error(
            "E006", f"the exact value takes {found} digits, at most {EXACT_DIGITS} are kept", span, "too many digits",
            hint="round it: `x // 1`",
        )  # fmt: skip
        return False
    found = extent.terms(value)
    if found > EXPANDED_TERMS:
        count = f"{found:,}" if found < extent.FAR else f"{extent.FAR:,} or more"
        names.report.error(
            "E307", f"the expression has {count} terms when it is multiplied out, at most {EXPANDED_TERMS}", span,
            "too complex", hint="compute it outside and pass it as a `tensor`",
        )  # fmt: skip
        return False
    return True


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
    if any(value is None for value in values):
        return None
    spend(FUNCTION * sum(1 + extent.nesting(value) for value in values if value is not None))
    result = function(*values)
    if result.is_number and not result.is_real:
        names.report.error(
            "E203", f"`{_text(names, call)}` is no number", call.span, "a root of a number below 0",
            hint="`sqrt` needs 0 or more",
        )  # fmt: skip
        return None
    return result if _short(names, result, call.span) else None


def _declared(indices: list[tree.Expr]) -> str:
    """The declaration of a tensor that is read at such places."""
    axes = [_axis(index) for index in indices]
    return f"tensor({', '.join([*axes, *(['int'] if 'token' in axes else [])])})"


def _axis(index: tree.Expr) -> str:
    if isinstance(index, tree.Number):
        return str(int(index.value) + 1)
    positions = {name.text for name in mentioned(index)}
    return "head" if "h" in positions else "token" if positions & {"q", "k"} else "n"


def _read(names: Names, expr: tree.Restrict, positions: bool) -> Expr | None:
    """`tensor[index]`, one index per axis: `table[h][k]`."""
    indices: list[tree.Expr] = []
    base: tree.Expr = expr
    while isinstance(base, tree.Restrict):
        indices.insert(0, base.index)
        base = base.base
    found = names.find(base, Tensor, _declared(indices)) if isinstance(base, tree.Name) else base
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
    read = lookup(found.name, *values, integer=found.dtype != "float")
    return read if _short(names, read, expr.span) else None
