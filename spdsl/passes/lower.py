"""lower: the tree of a pattern as what it means, names resolved and kinds checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction

from spdsl.budget import working_on
from spdsl.diagnostics import Applicability, Hint, Report, Span, did_you_mean
from spdsl.ir.pattern import Case, Choice, Input, Pattern, Query, Stream, Weight
from spdsl.limits import HEAD_DIM, HEADS, INPUTS, RESULTS, SOFTMAXES
from spdsl.passes import arithmetic
from spdsl.passes.arguments import check_arguments
from spdsl.passes.evaluate import call, evaluate
from spdsl.passes.kinds import kind_of
from spdsl.passes.names import Names
from spdsl.passes.results import lone_extras, results, uncovered_phases
from spdsl.passes.values import MATH
from spdsl.primitives.registry import WORDS
from spdsl.primitives.word import Kind, Parameter
from spdsl.syntax import tree

_HEADS = ("query", "kv")
_DIMS = ("qk", "v")


def lower(pattern: tree.PatternTree, report: Report, overrides: Mapping[str, Fraction] | None = None) -> Pattern | None:
    """The meaning of a pattern; None if it has errors, all of which are in `report`.

    `overrides` replace the values of `param`s (`-D name=value`).
    """
    names = Names(report, pattern, causal=any(isinstance(item, tree.Causal) for item in pattern.items))
    _declarations(names, pattern, dict(overrides or {}))
    cases: list[Case] = []
    statements: dict[str, tree.Policy] = {}
    for before, item in zip((None, *pattern.items), pattern.items, strict=False):
        working_on(item.span)
        names.open = ""
        match item:
            case tree.Binding() if _missing_comma(names, before, item):
                pass
            case tree.Binding():
                _bind(names, item)
            case tree.Policy():
                _statement(names, item, statements)
            case tree.Result():
                cases += results(names, item, cases)
    names.open = ""
    if not any(isinstance(item, tree.Result) for item in pattern.items):
        report.error(
            "E301",
            f"pattern `{pattern.name.text}` returns nothing",
            pattern.name.span,
            "no `return`",
            hint="end it with `return attend(...)`",
        )
    meaning = Pattern(
        pattern.name.text, pattern.comment, names.query_heads, names.kv_heads, names.qk_dim, names.v_dim,
        tuple(names.params.items()), names.causal, _ordered_inputs(names), tuple(cases),
    )  # fmt: skip
    if not _few(names, pattern, meaning):
        return None
    lone_extras(report, cases)
    check_arguments(names)
    if report.failed:
        return None
    _unused(names)
    uncovered_phases(names, pattern, cases)
    streams = {term.stream for softmax in meaning.softmaxes() for term in softmax.terms}
    streams |= {softmax.query for softmax in meaning.softmaxes()}
    needed = tuple(an_input for an_input in meaning.inputs if _needed(meaning, an_input, streams))
    return replace(meaning, inputs=needed, **names.stated)


def _few(names: Names, pattern: tree.PatternTree, meaning: Pattern) -> bool:
    """Whether the analyses can look at all of its parts, pair by pair; an error if not."""
    counts: tuple[tuple[str, Callable[[], int], int], ...] = (
        ("inputs", lambda: len(meaning.inputs), INPUTS),
        ("results", lambda: len(meaning.cases), RESULTS),
        ("softmaxes", lambda: len(meaning.softmaxes()), SOFTMAXES),
    )
    for what, count, most in counts:
        number = count()
        if number > most:
            message = f"pattern `{pattern.name.text}` has {number:,} {what}, at most {most}"
            names.report.error("E312", message, pattern.name.span, "too many", hint="split it into several patterns")
            return False
    return True


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
        free = names.claim(pair.name)
        value = arithmetic.number(names, pair.value)
        if not free:
            overrides.pop(text, None)
        elif value is not None and value.is_Rational:
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
    most = HEADS if keyword == "heads" else HEAD_DIM
    setattr(names, attribute, arithmetic.size(names, pair.value, 1, f"`{text}`", most))


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
    numeric = kind in (Kind.NUMBER, Kind.CONDITION)
    parameter = Parameter(item.name.text, Kind.ELEMENT if numeric else kind)
    free = names.claim(item.name)
    if kind is Kind.STATEMENT:
        names.report.error(
            "E205", "a statement has no value", item.value.span, "stands alone", hint="leave `name =` out"
        )
        return
    if item.name.text == "kv" and kind is not Kind.STREAM:
        names.report.error(
            "E201", "`kv` can be rebound to a stream only", item.value.span, "not a stream", hint="choose another name"
        )
        return
    if isinstance(item.value, tree.Call) and kind is Kind.NUMBER and item.value.function.text not in MATH:
        call(names, item.value, item.name.text)  # reports the unknown word
        return
    value = evaluate(names, item.value, parameter, item.name.text)
    if value is not None and free:
        names.bound[item.name.text] = value


def _statement(names: Names, item: tree.Policy, before: dict[str, tree.Policy]) -> None:
    """A call that stands alone: what it states about the pattern. `before` are the statements by their word."""
    text = item.call.function.text
    word = WORDS.get(text)
    if text in MATH or (word is not None and word.states is None):
        statements = [f"`{known.name}`" for known in WORDS.values() if known.states]
        names.report.error(
            "E205",
            f"`{text}(...)` stands alone",
            item.span,
            "its value is lost",
            hint=f"bind it: `name = ...`; only {' and '.join(statements)} are statements",
        )
        return
    if text in before:
        line, _ = names.report.source.position(before[text].span.start)
        names.report.error(
            "E106", f"`{text}` is written twice", item.span, "again here", note=f"first written in line {line}",
            hint="write it once, with all of its arguments",
        )  # fmt: skip
        return
    before[text] = item
    value = call(names, item.call, None)  # reports a word that is unknown or not built
    if value is not None and word is not None and word.states is not None:
        names.stated[word.states] = value


def _needed(pattern: Pattern, an_input: Input, streams: set[str]) -> bool:
    """Whether an input is read, or comes from the caller and is read by no result; nothing is computed in vain.

    `streams` are those that softmaxes read, and the queries.
    """
    if isinstance(an_input, Query) and an_input.source is not None:
        return an_input.name in streams
    if isinstance(an_input, Stream) and an_input.compress:
        return an_input.name in streams
    if isinstance(an_input, Weight):
        return an_input.stream in streams
    if isinstance(an_input, Choice) and an_input.selected:
        return any(an_input in pattern.steps(case) for case in pattern.cases)
    return True


def _unused(names: Names) -> None:
    for name, span in names.spans.items():
        if name not in names.used and name != "kv":  # every set without a stream lies on it
            names.report.warning("W107", f"`{name}` is never used", span, "bound here")


def _ordered_inputs(names: Names) -> tuple[Input, ...]:
    """The order of the module's arguments: q, kv, then as written."""
    first = [
        an_input
        for kind in (Query, Stream)
        for an_input in names.inputs
        if isinstance(an_input, kind) and an_input.name in ("q", "kv")
    ]
    return (*first, *(an_input for an_input in names.inputs if an_input not in first))
