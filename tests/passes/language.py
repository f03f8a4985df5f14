"""What the passes from the tree to the pattern make of a body, line by line: what it means, or what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import spdsl
from spdsl.diagnostics import Hint, Report, Severity, Source
from spdsl.ir.pattern import Branch, Case, Combined, Gate, Merge, Pattern, Relative, Score, Smoothed, Softmax
from spdsl.passes.arguments import arguments as arguments_of
from spdsl.passes.choices import check_choices
from spdsl.passes.later_keys import later_key
from tests.passes.lowered import lowered

Made = Callable[[str], Iterator[str]]


def or_wrong(made: Callable[[Pattern], Iterator[str]]) -> Made:
    """What is made of a pattern; of a wrong body its errors, with the way out."""

    def lines(body: str) -> Iterator[str]:
        wrong = [found for found in spdsl.check(f"pattern p {{ {body} }}") if found.severity is Severity.ERROR]
        for found in wrong:
            yield "; ".join([f"{found.code} {found.message}", *found.notes, *(hint.text for hint in found.hints)])
        if not wrong:
            yield from made(lowered(body))

    return lines


def tests(softmax: Softmax) -> Iterator[str]:
    return (f"{softmax.name} {term.stream}: {term.test}" for term in softmax.terms)


def branch(found: Branch) -> str:
    if isinstance(found, Merge | Gate):
        return f"{type(found).__name__.lower()}({', '.join(map(branch, found.branches))})"
    return found.name


@or_wrong
def lower(pattern: Pattern) -> Iterator[str]:
    for softmax in pattern.softmaxes():
        yield from tests(softmax)


@or_wrong
def arithmetic(pattern: Pattern) -> Iterator[str]:
    """Tests and biases, in which numbers and positions come together."""
    for softmax in pattern.softmaxes():
        yield from tests(softmax)
        if softmax.bias is not None:
            yield f"{softmax.name} bias: {softmax.bias}"


@or_wrong
def evaluate(pattern: Pattern) -> Iterator[str]:
    """What is returned, and the streams of each softmax."""
    for case in pattern.cases:
        yield ", ".join([branch(case.branch), *(type(extra).__name__.lower() for extra in case.extras)])
    for softmax in pattern.softmaxes():
        yield from tests(softmax)


@or_wrong
def names(pattern: Pattern) -> Iterator[str]:
    yield ", ".join(f"{found.name} is a {type(found).__name__.lower()}" for found in pattern.inputs)
    yield ", ".join(f"{found.name} is a softmax" for found in pattern.softmaxes())


@or_wrong
def arguments(pattern: Pattern) -> Iterator[str]:
    return (f"{found.name}: {', '.join(arguments_of(found)) or 'none'}" for found in pattern.inputs)


@or_wrong
def codes(pattern: Pattern) -> Iterator[str]:
    yield f"not told: {', '.join(pattern.allowed)}"


@or_wrong
def grains(pattern: Pattern) -> Iterator[str]:
    """Size and reduction of heads, rows and units of each choice."""
    for found in (found for name in pattern.inputs if (found := pattern.choice(name.name))):
        heads, rows, units = ((by or "as they are") for by in (found.heads_by, found.rows_by, found.unit_by))
        yield f"{found.name}: a list for each {found.share} ({heads}), {found.rows} rows ({rows})"
        yield f"    units of {found.unit} ({units})"


@or_wrong
def scores(pattern: Pattern) -> Iterator[str]:
    """The score of each choice, and whether it is a probability."""
    for found in (found for name in pattern.inputs if (found := pattern.choice(name.name))):
        if found.score is not None:
            yield f"{found.name}: {score(found.score)}{', a probability' if found.score.probability else ''}"


def score(found: Score) -> str:
    match found:
        case Combined():
            terms = zip(found.weights, found.parts, strict=True)
            return f"({' + '.join(f'{weight:g} {score(part)}' for weight, part in terms)})"
        case Relative():
            return f"relative {score(found.score)}"
        case Smoothed():
            return f"{found.by} of {found.width} of {score(found.score)}"
    return f"{type(found).__name__.lower()} of {found.softmax.product.name} on {found.softmax.terms[0].stream}"


@or_wrong
def results(pattern: Pattern) -> Iterator[str]:
    for case in pattern.cases:
        phases = ", ".join(sorted(phase.value for phase in case.phases))
        yield f"{phases}{'' if case.condition is None else f' if {case.condition}'}: {branch(case.branch)}"


@or_wrong
def skips(pattern: Pattern) -> Iterator[str]:
    """Each skip by case: a softmax may have one in some results and not in others."""
    for case in pattern.cases:
        phases = ", ".join(sorted(phase.value for phase in case.phases))
        found = [step for step in pattern.steps(case) if isinstance(step, Softmax)]
        for skip in (softmax.skip for softmax in found if softmax.skip is not None):
            yield f"{phases}: below {skip.level} in all of {skip.rows} rows of a {skip.share}, {skip.unit} keys"


def choices(body: str) -> Iterator[str]:
    report = Report(Source(f"pattern p {{ {body} }}"))
    check_choices(lowered(body), report)
    return (f"{found.code} {found.message}" for found in report.diagnostics)


def later_keys(body: str) -> Iterator[str]:
    pattern = lowered(body)
    return (_later(pattern, case) for case in pattern.cases)


def _later(pattern: Pattern, case: Case) -> str:
    seen = later_key(pattern, case)
    if seen is None:
        return "no later key is sure to be seen"
    return f"{seen.softmax.name}: query {seen.place.q} sees {seen.stream.name} {seen.place.k} of {seen.place.length}"


def source_numbers(body: str) -> Iterator[str]:
    """What each finding would replace: the number where it is written, in a `param` perhaps."""
    text = f"pattern p {{ {body} }}"
    for found in spdsl.check(text):
        yield f"{found.code} {found.message}"
        yield from (f"    {hint.text}: {_change(text, hint)}" for hint in found.hints)


def _change(text: str, hint: Hint) -> str:
    if hint.span is None or hint.replacement is None:
        return "in words alone"
    return f"`{text[hint.span.start : hint.span.end]}` becomes `{hint.replacement}`, {hint.applicability.value}"
