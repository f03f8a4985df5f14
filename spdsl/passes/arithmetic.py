"""arithmetic: expressions of the tree as the numbers and conditions that a place asks for: known when compiling and
within bounds, or one for each query and key.
"""

from __future__ import annotations

import sympy
from sympy.core.relational import Relational

from spdsl.budget import spend
from spdsl.ir import extent
from spdsl.ir.compared import comparison
from spdsl.ir.symbols import Boolean, Expr, K, Q, lookups
from spdsl.limits import EXPRESSION_SIZE, NUMBER_VALUE
from spdsl.passes.names import Names, mentioned
from spdsl.passes.values import source_text, value_of
from spdsl.syntax import tree

_COMPARISONS: dict[str, type[Relational]] = {
    "<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "==": sympy.Eq, "!=": sympy.Ne,
}  # fmt: skip
# Steps of sympy: of what And and Or compare, of a comparison, of each rounded quotient in it.
STEPS, COMPARISON, ROUNDED = 10, 60, 400


def number(names: Names, expr: tree.Expr, least: int | None = None, what: str = "") -> Expr | None:
    """A compile-time number: literals, parameters and arithmetic; at least `least`."""
    value = value_of(names, expr, positions=False)
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
        found = f"`{source_text(names, expr)}`" if any(mentioned(expr)) else what
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
        found = f"`{source_text(names, expr)}`" if any(mentioned(expr)) else what
        names.report.error(
            names.out_of_domain(expr), f"{found} is {whole}, it must be {bound}", expr.span, f"{bound} is needed",
            note="" if isinstance(expr, tree.Name) else names.values_in(expr),
        )  # fmt: skip
        return None
    return whole


def count(names: Names, expr: tree.Expr, least: int | None, what: str, most: int = NUMBER_VALUE) -> Expr | None:
    """A compile-time integer as of `size`, or what `of_call` allows."""
    value = of_call(names, expr)
    if value is None or not value.is_number:
        return value
    whole = size(names, expr, least, what, most)
    return None if whole is None else sympy.Integer(whole)


def of_call(names: Names, expr: tree.Expr, of_tokens: bool = False) -> Expr | None:
    """A number for each list: parameters and arithmetic, `h`, `length`, tensor reads without positions.

    of_tokens: `length` is 1 at the least, and may divide.
    """
    names.of_tokens = of_tokens
    value = value_of(names, expr, positions=True)
    names.of_tokens = False
    if value is not None and value.free_symbols & {Q, K}:
        names.report.error(
            "E205", "a number of a choice is one for all queries and keys", expr.span, "depends on a position",
            hint="use numbers, `length`, `h`, and tensors without a `token` axis",
        )  # fmt: skip
        return None
    return value


def element(names: Names, expr: tree.Expr) -> Expr | None:
    """A number per (q, k, h): positions, tensor reads, parameters and arithmetic."""
    return value_of(names, expr, positions=True)


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
        left_value = value_of(names, expr.left, positions=phases is None)
        right_value = value_of(names, expr.right, positions=phases is None)
        if left_value is None or right_value is None:
            return None
        quotients = sum(len(value.atoms(sympy.floor)) for value in (left_value, right_value))
        sizes = extent.size(left_value, EXPRESSION_SIZE) + extent.size(right_value, EXPRESSION_SIZE)
        spend(COMPARISON + ROUNDED * quotients + sizes)
        return comparison(_COMPARISONS[expr.operator], left_value, right_value)
    if phases is not None and isinstance(expr, tree.Name) and expr.text in phases:
        return phases[expr.text]
    value = value_of(names, expr, positions=phases is None)
    if value is None:
        return None
    if not lookups(value):
        names.report.error(
            "E205", "a condition is expected here", expr.span, "is a number", hint="compare it: `... < ...`"
        )
        return None
    return comparison(sympy.Ne, value, sympy.S.Zero)
