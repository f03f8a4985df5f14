"""lower: the tree of a pattern as what it means, names resolved and kinds checked."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import sympy

from spdsl.diagnostics import Applicability, Hint, Report, Span, did_you_mean
from spdsl.ir.pattern import ALL_PHASES, Case, Choice, Pattern, Phase, Query, Softmax, Stream, Tensor
from spdsl.ir.symbols import Boolean, lookups
from spdsl.passes import arithmetic
from spdsl.passes.clashes import clashes
from spdsl.passes.evaluate import call, evaluate, kind_of
from spdsl.passes.names import Names, mentioned
from spdsl.primitives.planned import PLANNED
from spdsl.primitives.word import Kind, Parameter
from spdsl.syntax import tree

_PHASES: dict[str, Boolean] = {phase.value: sympy.Symbol(phase.value, bool=True) for phase in Phase}
_HEADS = ("query", "kv")
_DIMS = ("qk", "v")


def lower(pattern: tree.PatternTree, report: Report, overrides: Mapping[str, Fraction] | None = None) -> Pattern | None:
    """The meaning of a pattern; None if it has errors, all of which are in `report`.

    `overrides` replace the values of `param`s (`-D name=value`).
    """
    names = Names(report, causal=any(isinstance(item, tree.Causal) for item in pattern.items))
    _declarations(names, pattern, dict(overrides or {}))
    cases: list[Case] = []
    for before, item in zip((None, *pattern.items), pattern.items, strict=False):
        match item:
            case tree.Binding() if _missing_comma(names, before, item):
                pass
            case tree.Binding():
                _bind(names, item)
            case tree.Policy():
                _policy(names, item)
            case tree.Result():
                cases += _results(names, item, cases)
    if not any(isinstance(item, tree.Result) for item in pattern.items):
        report.error(
            "E301",
            f"pattern `{pattern.name.text}` returns nothing",
            pattern.name.span,
            "no `return`",
            hint="end it with `return attend(...)`",
        )
    _lone_extras(report, cases)
    clashes(names, _softmaxes(cases))
    if report.failed:
        return None
    _unused(names)
    _uncovered_phases(names, pattern, cases)
    return Pattern(
        pattern.name.text, pattern.comment, names.query_heads, names.kv_heads, names.qk_dim, names.v_dim,
        tuple(names.params.items()), names.causal, _ordered_inputs(names), tuple(cases),
    )  # fmt: skip


def _declarations(names: Names, pattern: tree.PatternTree, overrides: dict[str, Fraction]) -> None:
    seen: set[str] = set()
    for item in pattern.items:
        if isinstance(item, tree.Causal) and "causal" in seen:
            names.report.error("E106", "`causal` is written twice", item.span, "again here", hint="write it once")
        if isinstance(item, tree.Causal):
            seen.add("causal")
        if isinstance(item, tree.Declaration):
            for pair in item.pairs:
                _declare(names, item.keyword, pair, overrides)
    for name in overrides:
        hint = did_you_mean(name, names.params)
        names.report.error(
            "E501",
            f"pattern `{pattern.name.text}` has no parameter `{name}`",
            pattern.name.span,
            "",
            note=f"its parameters: {', '.join(names.params) or 'none'}",
            hint=hint or "",
        )
    if names.query_heads and names.kv_heads and names.query_heads % names.kv_heads:
        names.report.error(
            "E306", f"{names.kv_heads} kv heads do not divide the {names.query_heads} query heads", pattern.name.span
        )


def _declare(names: Names, keyword: str, pair: tree.Pair, overrides: dict[str, Fraction]) -> None:
    text = pair.name.text
    if keyword == "param":
        if not names.claim(pair.name):
            return
        value = arithmetic.number(names, pair.value)
        if value is not None and value.is_Rational:
            if text in overrides:
                names.overridden.add(text)
            names.params[text] = overrides.pop(text, Fraction(int(value.p), int(value.q)))
        elif value is not None:
            names.report.error("E203", f"`{text}` is not rational", pair.value.span, "roots are not exact")
        return
    allowed = _HEADS if keyword == "heads" else _DIMS
    if text not in allowed:
        names.report.error(
            "E202",
            f"`{keyword}` knows {' and '.join(f'`{word}`' for word in allowed)}",
            pair.name.span,
            "not one of them",
            hint=did_you_mean(text, allowed, pair.name.span) or "",
        )
        return
    attribute = {"query": "query_heads", "kv": "kv_heads", "qk": "qk_dim", "v": "v_dim"}[text]
    if getattr(names, attribute) is not None:
        names.report.error("E106", f"`{keyword} {text}` is declared twice", pair.name.span, "again here")
        return
    setattr(names, attribute, arithmetic.size(names, pair.value, 1, f"`{text}`"))


def _missing_comma(names: Names, before: tree.Item | None, item: tree.Binding) -> bool:
    """`heads query = 64 kv = 4`: the second pair reads as a binding. True if that was reported."""
    if not isinstance(before, tree.Declaration) or kind_of(names, item.value) is not Kind.NUMBER:
        return False
    written = {pair.name.text for pair in before.pairs}
    if item.name.text not in {"heads": _HEADS, "dim": _DIMS}.get(before.keyword, ()) or item.name.text in written:
        return False
    gap = Span(before.span.end, before.span.end)
    names.report.error(
        "E202",
        f"a comma is missing before `{item.name.text}`",
        item.name.span,
        f"reads as a binding, not as a part of `{before.keyword}`",
        hint=Hint("add `,`", Applicability.MAYBE, gap, ","),
    )
    return True


def _bind(names: Names, item: tree.Binding) -> None:
    kind = kind_of(names, item.value)
    parameter = Parameter(item.name.text, Kind.NUMBER if kind in (Kind.ELEMENT, Kind.CONDITION) else kind)
    if not names.claim(item.name):
        return
    if item.name.text == "kv" and kind is not Kind.STREAM:
        names.report.error(
            "E201", "`kv` can be rebound to a stream only", item.value.span, "not a stream", hint="choose another name"
        )
        return
    if isinstance(item.value, tree.Call) and kind is Kind.NUMBER and item.value.function.text not in arithmetic.MATH:
        call(names, item.value, item.name.text)  # reports the unknown word
        return
    value = evaluate(names, item.value, parameter, item.name.text)
    if value is not None:
        names.bound[item.name.text] = value


def _policy(names: Names, item: tree.Policy) -> None:
    word = item.call.function
    if word.text in PLANNED:
        call(names, item.call, None)
        return
    names.report.error(
        "E205",
        f"`{word.text}(...)` stands alone",
        item.span,
        "its value is lost",
        hint="bind it: `name = ...`; only `keep` and `tier` are statements",
    )


def _results(names: Names, item: tree.Result, before: list[Case]) -> list[Case]:
    """The cases of one `return`: phases settled now, what is left of the condition kept for the call."""
    branches = [evaluate(names, value, Parameter("result", Kind.BRANCH)) for value in item.values]
    if item.condition and _moves(names, item.condition):
        return []
    guard = arithmetic.condition(names, item.condition, _PHASES) if item.condition else sympy.true
    if guard is None or any(branch is None for branch in branches):
        return []
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
        Case(frozenset(phases), None if left is sympy.true else left, branches[0], tuple(branches[1:]), item.span)
        for left, phases in by_condition.items()
    ]


def _moves(names: Names, condition: tree.Expr) -> bool:
    """Reports a position in the condition of a result."""
    found = next((name for name in mentioned(condition) if name.text in ("q", "k", "h")), None)
    if found is not None:
        names.report.error(
            "E308",
            f"a result's condition cannot depend on the position `{found.text}`",
            found.span,
            "differs from query to query",
            hint="conditions are about the phase, `length` and scalars; use `where` for positions",
        )
    return found is not None


def _uncovered_phases(names: Names, pattern: tree.PatternTree, cases: list[Case]) -> None:
    covered = {phase for case in cases for phase in case.phases}
    for phase in sorted(ALL_PHASES - covered, key=lambda phase: phase.value):
        names.report.warning(
            "W401",
            f"no result covers the phase `{phase.value}`",
            pattern.name.span,
            "it is not generated",
            hint=f"add `return ... if {phase.value}`, or a result without a condition",
        )


def _lone_extras(report: Report, cases: list[Case]) -> None:
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


def _softmaxes(cases: list[Case]) -> tuple[Softmax, ...]:
    found: dict[str, Softmax] = {}
    waiting = [branch for case in cases for branch in (case.branch, *case.extras)]
    while waiting:
        branch = waiting.pop()
        if isinstance(branch, Softmax):
            found.setdefault(branch.name, branch)
        else:
            waiting += branch.branches
    return tuple(found[name] for name in sorted(found))


def _unused(names: Names) -> None:
    for name, span in names.spans.items():
        if name not in names.used and name != "kv":  # every set without a stream lies on it
            names.report.warning("W107", f"`{name}` is never used", span, "bound here")


def _ordered_inputs(names: Names) -> tuple[Query | Stream | Tensor | Choice, ...]:
    """The order of the module's arguments: q, kv, then as written."""
    first = [
        found
        for kind in (Query, Stream)
        for found in names.inputs
        if isinstance(found, kind) and found.name in ("q", "kv")
    ]
    return (*first, *(found for found in names.inputs if found not in first))
