"""grains: arguments that are words of their parameter (`mean`, `group`) and grains (`64`, `max(64)`, `sum(group)`)."""

from __future__ import annotations

from spdsl.diagnostics import did_you_mean
from spdsl.passes import arithmetic
from spdsl.passes.names import Names
from spdsl.primitives.word import Grain, Parameter
from spdsl.syntax import tree

REDUCTIONS = ("sum", "mean", "max")


def word(names: Names, expr: tree.Expr, parameter: Parameter) -> str | None:
    """One of the words of a parameter; None after an error."""
    if isinstance(expr, tree.Name) and expr.text in parameter.words:
        return expr.text
    if _planned(names, expr, parameter):
        return None
    allowed = ", ".join(f"`{text}`" for text in parameter.words)
    hint = did_you_mean(expr.text, parameter.words, expr.span) if isinstance(expr, tree.Name) else None
    names.report.error("E202", f"`{parameter.name}` is one of {allowed}", expr.span, "not one of them", hint=hint or "")
    return None


def grain(names: Names, expr: tree.Expr, parameter: Parameter) -> Grain | None:
    """`size` or `reduction(size)`, the size a number or a word of the parameter; None after an error."""
    by: str | None = None
    inner = expr
    if isinstance(expr, tree.Call) and expr.function.text in REDUCTIONS and _alone(expr):
        by, inner = expr.function.text, expr.arguments[0].value
    if parameter.words:
        named = word(names, inner, parameter)
        return None if named is None else Grain(named, by)
    if _planned(names, inner, parameter):
        return None
    if isinstance(inner, tree.Name) and inner.text in (sizes := dict(parameter.sizes)):
        return Grain(sizes[inner.text], by)
    size = arithmetic.size(names, inner, parameter.least, f"`{parameter.name}`", parameter.most)
    return None if size is None else Grain(size, by)


def _alone(call: tree.Call) -> bool:
    """One plain argument: `max(64)` is a grain, `max(a, b)` a number."""
    return len(call.arguments) == 1 and call.arguments[0].name is None


def _planned(names: Names, expr: tree.Expr, parameter: Parameter) -> bool:
    """Reports a word that is specified for this place and not built."""
    named = expr.function if isinstance(expr, tree.Call) else expr
    if not isinstance(named, tree.Name) or named.text not in parameter.planned:
        return False
    names.report.error(
        "E105", f"`{parameter.name} = {named.text}` is not built yet", expr.span, "specified, but not built"
    )
    return True
