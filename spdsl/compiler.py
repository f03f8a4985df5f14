"""The compiler: from a source to modules, stage by stage.

Source -> tree -> pattern -> plan -> steps -> module
          written  meant     what the GPU does, what a call starts, text
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from numbers import Rational, Real

from spdsl.budget import Budget, TooMuch, at_most
from spdsl.checks import findings
from spdsl.checks.view import NOTHING_MORE, Setting, views
from spdsl.codegen import render as rendering
from spdsl.codegen.context import context
from spdsl.codegen.spelling import Spelling
from spdsl.diagnostics import Diagnostic, Report, Severity, Source, Span, SpatError, did_you_mean
from spdsl.ir import show, show_steps
from spdsl.ir.pattern import Pattern
from spdsl.ir.plan import Plan
from spdsl.limits import CHECK_STEPS, ESTIMATE_STEPS, RENDER_STEPS
from spdsl.passes.aligned import aligned
from spdsl.passes.check import check as check_meaning
from spdsl.passes.lower import lower
from spdsl.passes.partition import partition
from spdsl.passes.schedule import schedule
from spdsl.passes.schedule import stages as scheduled
from spdsl.passes.split import split
from spdsl.syntax.overrides import divided
from spdsl.syntax.parse import parse
from spdsl.syntax.tree import FileTree, PatternTree

Params = Mapping[str, Fraction]
Number = int | float | Fraction | Decimal
NAMES_ONLY = frozenset({"E104", "E106"})  # errors of names leave the tree whole: what else is wrong can be told


@dataclass(frozen=True, slots=True)
class GeneratedModule:
    """A compiled pattern: its module as text, and what the compiler remarked."""

    name: str
    text: str
    digest: str
    diagnostics: tuple[Diagnostic, ...]


def stages(
    source: Source,
    tree: PatternTree,
    params: Params,
    report: Report,
    setting: Setting = NOTHING_MORE,
    budget: Budget | None = None,
) -> Iterator[tuple[str, object]]:
    """The pipeline of one pattern: (stage, its result) in order. Raises SpatError at the first stage with errors.

    The patterns of a file share a `budget` of CHECK_STEPS; what is rendered has one of its own.
    """
    budget = budget or Budget(CHECK_STEPS)
    steps = _stages(source, tree, params, report, setting)
    while True:
        try:
            with at_most(budget):
                step = next(steps, None)
        except TooMuch:
            _too_much(tree, report, budget)
            report.check()
        if step is None:
            return
        if step[0] == "plan":
            budget = Budget(RENDER_STEPS)
        yield step


def _too_much(tree: PatternTree, report: Report, budget: Budget) -> None:
    place = budget.place if isinstance(budget.place, Span) else tree.name.span
    report.error(
        "E312", f"pattern `{tree.name.text}` takes more work than the {budget.steps:,} steps that a file may take",
        place, "given up here", note="a step is about 10 microseconds; published patterns take a few thousand",
        hint="write shorter sets and fewer branches, or split the file",
    )  # fmt: skip


def _stages(
    source: Source, tree: PatternTree, params: Params, report: Report, setting: Setting
) -> Iterator[tuple[str, object]]:
    report.allowed |= setting.allowed
    yield "tree", tree
    meaning = lower(tree, report, params)
    report.check()
    assert meaning is not None
    report.allowed |= {*meaning.allowed}
    check_meaning(meaning, report, tree)
    report.check()
    yield "pattern", meaning
    plan = aligned(partition(split(meaning), source))
    yield "aligned", plan
    for view in views(plan, source, tree, setting):
        for diagnostic in findings(view):
            report.add(diagnostic)
    report.check()
    yield "plan", plan
    steps = tuple(schedule(plan, stage) for stage in scheduled(plan))
    yield "steps", steps
    yield (
        "module",
        rendering.render(
            context(plan, steps, Spelling(source.text)), source, source.text[tree.span.start : tree.span.end]
        ),
    )


def compile(source: Source, pattern: str | None, params: Params, setting: Setting = NOTHING_MORE) -> GeneratedModule:
    """The module of the pattern (of that name, or the file's only one). Raises SpatError."""
    report = Report(source)
    text = dict(stages(source, _chosen(source, pattern, report), params, report, setting))["module"]
    assert isinstance(text, rendering.GeneratedModule)
    return GeneratedModule(text.name, text.text, text.digest, tuple(report.told()))


def pattern_of(source: Source, pattern: str | None, params: Params) -> Pattern:
    """What the pattern means. Raises SpatError."""
    report = Report(source)
    found = dict(islice(stages(source, _chosen(source, pattern, report), params, report), 2))["pattern"]
    assert isinstance(found, Pattern)
    return found


def plan_of(source: Source, pattern: str | None, params: Params) -> Plan:
    """The plan of the pattern. Raises SpatError."""
    report = Report(source)
    plan = dict(islice(stages(source, _chosen(source, pattern, report), params, report), 4))["plan"]
    assert isinstance(plan, Plan)
    return plan


def emit(source: Source, pattern: str | None, params: Params, stage: str) -> str:
    """The printed form of one stage: tree, pattern, aligned, plan, steps or module."""
    report = Report(source)
    for name, result in stages(source, _chosen(source, pattern, report), params, report):
        if name == stage:
            if isinstance(result, rendering.GeneratedModule):
                return result.text
            if isinstance(result, tuple):
                return show_steps.steps(result)
            return show.plan(result, ranges=stage == "plan") if isinstance(result, Plan) else show.form(result)
    raise ValueError(f"unknown stage {stage!r}: tree, pattern, aligned, plan, steps or module")


def check(
    source: Source,
    params: Params,
    setting: Setting = NOTHING_MORE,
    only: str | None = None,
    budget: Budget | None = None,
) -> list[Diagnostic]:
    """Everything there is to say about a file, in source order: about all patterns, or the one of that name.

    A pattern gets the `params` that it has; one that none of them has is an error of each.
    """
    report = Report(source)
    tree = parse(source, report)
    _distinct_names(tree, report)
    budget, setting = budget or Budget(CHECK_STEPS), replace(setting, estimates=Budget(ESTIMATE_STEPS))
    if all(diagnostic.code in NAMES_ONLY for diagnostic in report.diagnostics):
        last = "pattern" if report.failed else "plan"
        patterns = [pattern for pattern in tree.patterns if only in (None, pattern.name.text)]
        for pattern, given in zip(patterns, divided(patterns, params), strict=True):
            own = Report(source)
            try:
                for stage, _ in stages(source, pattern, given, own, setting, budget):
                    if stage == last:
                        break
            except SpatError:
                pass
            for diagnostic in own.told():
                if diagnostic.severity is Severity.ERROR or last == "plan":
                    report.add(diagnostic)
    return report.told()


def _chosen(source: Source, name: str | None, report: Report) -> PatternTree:
    tree = parse(source, report)
    _distinct_names(tree, report)
    report.check()
    if name is None and len(tree.patterns) == 1:
        return tree.patterns[0]
    for pattern in tree.patterns:
        if pattern.name.text == name:
            return pattern
    known = [pattern.name.text for pattern in tree.patterns]
    if name is None:
        raise ValueError(f"{source.path} holds several patterns, choose one: {', '.join(known)}")
    hint = did_you_mean(name, known)
    told = hint.text if hint else f"it holds {', '.join(known)}"
    raise ValueError(f"{source.path} holds no pattern {name!r}; {told}")


def _distinct_names(tree: FileTree, report: Report) -> None:
    seen: dict[str, PatternTree] = {}
    for pattern in tree.patterns:
        name = pattern.name.text
        if name in seen:
            line, _ = report.source.position(seen[name].name.span.start)
            report.error(
                "E106", f"pattern `{name}` is written twice", pattern.name.span, "again here",
                note=f"first written in line {line}", hint="choose another name",
            )  # fmt: skip
        seen.setdefault(name, pattern)


def pattern_names(source: Source) -> list[str]:
    """The patterns of a file, in order. Raises SpatError."""
    report = Report(source)
    tree = parse(source, report)
    report.check()
    return [pattern.name.text for pattern in tree.patterns]


_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def as_params(values: Mapping[str, Number]) -> dict[str, Fraction]:
    """Python numbers as exact parameters: a float is the shortest decimal that Python prints for it.

    Raises TypeError or ValueError on anything else, naming the parameter.
    """
    for name in values:
        if not _OVERRIDE.fullmatch(name):
            raise ValueError(f"{name!r} is no parameter name")
    return {name: _exact(name, value) for name, value in values.items()}


def _exact(name: str, value: Number) -> Fraction:
    """Numbers of numpy are Integral and Real, too, but for its bool."""
    if isinstance(value, bool) or not isinstance(value, Decimal | Real):
        raise TypeError(f"parameter {name}: expected a number, got {type(value).__name__}")
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    if not math.isfinite(value):
        raise ValueError(f"parameter {name}: expected a finite number, got {value}")
    return Fraction(value) if isinstance(value, Decimal) else Fraction(repr(float(value)))
