"""results: the `return` lines of a pattern as cases: phases settled, the rest of each condition kept for the call."""

from __future__ import annotations

import sympy

from spdsl.diagnostics import Report
from spdsl.ir.pattern import ALL_PHASES, Case, Extra, Gate, Merge, Phase, Pooled, Score, Softmax
from spdsl.ir.symbols import Boolean, lookups
from spdsl.passes import arithmetic
from spdsl.passes.evaluate import evaluate, scope_of
from spdsl.passes.names import Names, mentioned
from spdsl.primitives.pool import as_it_is
from spdsl.primitives.word import Kind, Parameter
from spdsl.syntax import tree

_PHASES: dict[str, Boolean] = {phase.value: sympy.Symbol(phase.value, bool=True) for phase in Phase}


def results(names: Names, item: tree.Result, before: list[Case]) -> list[Case]:
    """The cases of one `return`: phases settled now, what is left of the condition kept for the call."""
    branch = _value(names, item.values[0], Kind.BRANCH)
    extras = [_value(names, value, Kind.RESULT) for value in item.values[1:]]
    if item.condition and _moves(names, item.condition):
        return []
    guard = arithmetic.condition(names, item.condition, _PHASES) if item.condition else sympy.true
    if guard is None or not isinstance(branch, Softmax | Gate | Merge) or None in extras:
        return []
    others = tuple(extra for extra in extras if extra is not None)
    if any(read.args for read in lookups(guard)):
        names.report.error(
            "E308",
            "a result's condition may read scalars only",
            item.span,
            "reads an element of a tensor",
            hint="declare it as `tensor()`",
        )
        return []
    by_condition: dict[Boolean, set[Phase]] = {}
    settled = {phase for case in before if case.condition is None for phase in case.phases}
    for phase in Phase:
        left = guard.xreplace(
            {symbol: sympy.true if phase.value == name else sympy.false for name, symbol in _PHASES.items()}
        )
        if left is not sympy.false and phase not in settled:
            by_condition.setdefault(left, set()).add(phase)
    if not by_condition:
        names.report.error(
            "E302", "this result is never reached", item.span, "", note="earlier results cover all of its phases"
        )
    return [
        Case(frozenset(phases), None if left is sympy.true else left, branch, others, item.span)
        for left, phases in by_condition.items()
    ]


def _value(names: Names, expr: tree.Expr, kind: Kind) -> Extra | None:
    """One value of a `return`: the first is a branch, others may be scores and losses."""
    value: Extra | Score | None = evaluate(names, expr, Parameter("result", kind))
    if not isinstance(value, Score):
        return value
    pooled: Pooled | None = as_it_is(scope_of(names, "score", expr), value)
    return pooled


def _moves(names: Names, condition: tree.Expr) -> bool:
    """Reports a position in the condition of a result."""
    position = next((name for name in mentioned(condition) if name.text in ("q", "k", "h")), None)
    if position is not None:
        names.report.error(
            "E308",
            f"a result's condition cannot depend on the position `{position.text}`",
            position.span,
            "differs from query to query",
            hint="conditions are about the phase, `length` and scalars; use `where` for positions",
        )
    return position is not None


def uncovered_phases(names: Names, pattern: tree.PatternTree, cases: list[Case]) -> None:
    covered = {phase for case in cases for phase in case.phases}
    for phase in sorted(ALL_PHASES - covered, key=lambda phase: phase.value):
        names.report.warning(
            "W401",
            f"no result covers the phase `{phase.value}`",
            pattern.name.span,
            "it is not generated",
            hint=f"add `return ... if {phase.value}`, or a result without a condition",
        )


def lone_extras(report: Report, cases: list[Case]) -> None:
    """Further values are returned where one result answers a phase alone."""
    for case in cases:
        shared = any(other is not case and other.phases & case.phases for other in cases)
        if case.extras and (shared or case.condition is not None):
            report.error(
                "E105",
                "further values of a result are not built yet where a phase has several results or a condition",
                case.span,
                "returns more than one value",
                hint="return one value, or let one result without a condition answer the phase",
            )
