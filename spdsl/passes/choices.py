"""choices: what a selected set may still get wrong when all of its words are well formed."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from spdsl.diagnostics import Report
from spdsl.ir.pattern import Choice, Kl, Pattern, Phase, Pooled, Score, Softmax, softmaxes_of
from spdsl.ir.symbols import LENGTH, Q_FIRST, Q_LAST, lookup_name, lookups
from spdsl.passes.disjuncts import TooComplex, disjuncts
from spdsl.passes.listed import listed
from spdsl.passes.ranges import key_range
from spdsl.passes.selection import NotOfUnits, by_token, of_units
from spdsl.passes.series import Trace
from spdsl.passes.spans import Spans, size, touched, union
from spdsl.passes.split import parts, split

FAR = 4096  # units before a query that is far enough from the first key to see all that is forced


def check_choices(pattern: Pattern, report: Report) -> None:
    """Adds what is wrong with the selected choices of `pattern` to `report`."""
    choices = [found for found in pattern.inputs if isinstance(found, Choice) and found.selected]
    for choice in choices:
        _room_for_forced(choice, report)
        _whole_units(choice, report)
    for case in pattern.cases:
        used = [step for step in pattern.steps(case) if isinstance(step, Choice) and step.selected]
        if pattern.causal and Phase.TRAIN in case.phases:
            for choice in used:
                _no_later_queries(choice, report)
    for score in _scores(pattern, choices):
        _whole_softmax(pattern, score, report)
    for softmax in () if report.failed else split(pattern).softmaxes():
        _walked(pattern, softmax, report)


def _room_for_forced(choice: Choice, report: Report) -> None:
    capacity, forced = choice.capacity, _forced(choice)
    if capacity is not None and forced > capacity:
        report.error(
            "E203",
            f"{forced} units are forced for some queries, `{choice.name}` has room for {capacity}",
            choice.span,
            "forced units count towards the number",
            hint="force fewer units, or unite the set with them: `attend(name | first(1, unit = n))`",
        )


def _whole_units(choice: Choice, report: Report) -> None:
    if by_token(choice):
        return
    for name, test in (("force", choice.force), ("within", choice.within)):
        try:
            of_units(test, choice.unit)
        except NotOfUnits:
            report.error(
                "E105",
                f"`{name}` of `{choice.name}` does not follow from the ends of its units of {choice.unit} tokens",
                choice.span,
                "not built yet",
                hint=f"use comparisons of `q` and `k`, or `k // {choice.unit}` in place of `k`",
            )


def _walked(pattern: Pattern, softmax: Softmax, report: Report) -> None:
    """Every set that a call has as lists must be one that a kernel walks."""
    for term in softmax.terms:
        reads = [pattern.choice(lookup_name(read)) for read in lookups(term.test)]
        chosen = dict.fromkeys(found for found in reads if found is not None and found.listed)
        if not chosen or (len(chosen) == 1 and listed(pattern, term)):
            continue
        report.error(
            "E105",
            f"this use of {' and '.join(f'`{found.name}`' for found in chosen)} is not built yet",
            softmax.span,
            "it is read as a list of units for each query",
            hint="unite the set with others, or intersect it with sets of positions, only",
        )


def _forced(choice: Choice) -> int:
    """How many units are certainly forced for one query far from the first key, and not outside of `within`."""
    try:
        conjuncts = disjuncts(sympy.And(choice.force, choice.within))
    except TooComplex:
        return 0
    ranges = [key_range(conjunct) for conjunct in conjuncts if not conjunct.residual and not conjunct.uniform]
    most = 0
    for q in (FAR * choice.unit, FAR * choice.unit + choice.unit - 1):
        at = {Q_FIRST: sympy.Integer(q), Q_LAST: sympy.Integer(q), LENGTH: sympy.Integer(q + 1)}
        units: Spans = []
        for found in ranges:
            if found.condition.xreplace(at) is sympy.true:
                first, end = int(found.first.xreplace(at)), int(found.end.xreplace(at))
                units += touched([(first, end)] if first < end else [], choice.unit, Trace())
        most = max(most, size(union(units, Trace())))
    return most


def _no_later_queries(choice: Choice, report: Report) -> None:
    """One list for several queries depends on the last of them, which the first must not know."""
    if choice.rows > 1:
        queries = "all queries" if choice.for_all else f"{choice.rows} queries at once"
        report.error(
            "E310",
            f"`{choice.name}` is chosen for {queries}, and a result for training uses it",
            choice.span,
            "depends on later queries",
            hint="leave `rows` out, or give training another result: `return ... if prefill`",
        )


def _scores(pattern: Pattern, choices: list[Choice]) -> Iterator[Score]:
    """Every score that something is made of."""
    for choice in choices:
        if choice.score is not None:
            yield choice.score
    for case in pattern.cases:
        for extra in case.extras:
            if isinstance(extra, Pooled):
                yield extra.score
            elif isinstance(extra, Kl):
                yield from (extra.target.score, extra.score.score)


def _whole_softmax(pattern: Pattern, score: Score, report: Report) -> None:
    for softmax in softmaxes_of(score):
        if parts(pattern, softmax) == (softmax,):
            continue
        report.error(
            "E105",
            f"the mass of `{softmax.name}`, over selected units and other keys, is not built yet",
            softmax.span,
            "is computed in parts",
            hint="take the mass of a branch over one kind of set",
        )
