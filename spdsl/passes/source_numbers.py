"""source_numbers: where a number of the plan stands in the source, for a finding to point at and a fix to replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from spdsl.diagnostics import Applicability, Hint, Span
from spdsl.passes.grains import REDUCTIONS
from spdsl.passes.names import mentioned
from spdsl.primitives.registry import WORDS
from spdsl.syntax import tree


@dataclass(frozen=True, slots=True)
class Written:
    """`place` is the expression in its call; `literal` its digits, in a `param` or binding perhaps, if it has some;
    `shared` if something else is made of them, too.
    """

    place: Span
    literal: tree.Number | None = None
    shared: bool = False

    def hint(self, text: str, actual: int, wanted: int, applicability: Applicability) -> Hint:
        """A way out that replaces the digits. Where the number comes from elsewhere (arithmetic, `-D`) only words."""
        if self.literal is None or self.literal.value != actual:
            return Hint(text)
        return Hint(text, Applicability.MAYBE if self.shared else applicability, self.literal.span, str(wanted))


def argument(pattern: tree.PatternTree | None, call: Span | None, name: str) -> Written | None:
    """The argument `name` of the call that stands at a place; None where it is left out."""
    own_call = next((written_call for written_call in calls(pattern) if written_call.span == call), None)
    if pattern is None or own_call is None or own_call.function.text not in WORDS:
        return None
    places = [parameter.name for parameter in WORDS[own_call.function.text].parameters]
    for i, given in enumerate(own_call.arguments):
        if (given.name.text if given.name else places[min(i, len(places) - 1)]) == name:
            return Written(given.value.span, *_literal(pattern, _inner(given.value)))
    return None


def instead(
    pattern: tree.PatternTree | None, call: Span, name: str, actual: int, wanted: int, applicability: Applicability
) -> Hint:
    """The hint to write `wanted` for an argument that is `actual`."""
    place, text = argument(pattern, call, name), f"use `{name} = {wanted}`"
    return place.hint(text, actual, wanted, applicability) if place else Hint(text)


def given_as(
    pattern: tree.PatternTree | None, call: Span, name: str, value: str, applicability: Applicability, more: str
) -> Hint:
    """The hint to pass `value` for an argument, which may be left out; `more` is said behind it."""
    text, place = f"write `{name} = {value}`{more}", argument(pattern, call, name)
    if place is not None:
        return Hint(text, applicability, place.place, value)
    last = next(
        (
            written_call.arguments[-1].value.span.end
            for written_call in calls(pattern)
            if written_call.span == call and written_call.arguments
        ),
        None,
    )
    return Hint(text) if last is None else Hint(text, applicability, Span(last, last), f", {name} = {value}")


def declared(pattern: tree.PatternTree | None, keyword: str, name: str) -> Written | None:
    """The value of `name` in `heads`, `dim` or `param`."""
    value = dict(_pairs(pattern, keyword)).get(name) if pattern is not None else None
    return Written(value.span, *_literal(pattern, value)) if pattern is not None and value is not None else None


def statement(pattern: tree.PatternTree | None, word: str) -> Span | None:
    """Where the statement of that word stands."""
    items = () if pattern is None else pattern.items
    return next(
        (item.span for item in items if isinstance(item, tree.Policy) and item.call.function.text == word), None
    )


def new_item(pattern: tree.PatternTree | None, source: str, item: str, text: str) -> Hint:
    """The hint to write an item in front of all others, on a line of its own if the first one has one."""
    if pattern is None or not pattern.items:
        return Hint(text)
    at = pattern.items[0].span.start
    indent = source[source.rfind("\n", 0, at) + 1 : at]
    gap = " " if indent.strip() else f"\n{indent}"
    return Hint(text, Applicability.MAYBE, Span(at, at), f"{item}{gap}")


def calls(pattern: tree.PatternTree | None) -> Iterator[tree.Call]:
    """Every call of a pattern."""
    for item in () if pattern is None else pattern.items:
        match item:
            case tree.Binding():
                yield from _calls(item.value)
            case tree.Policy():
                yield from _calls(item.call)
            case tree.Result():
                for value in item.values:
                    yield from _calls(value)


def _calls(expr: tree.Expr) -> Iterator[tree.Call]:
    match expr:
        case tree.Call():
            yield expr
            for given in expr.arguments:
                yield from _calls(given.value)
        case tree.Unary():
            yield from _calls(expr.operand)
        case tree.Binary():
            yield from _calls(expr.left)
            yield from _calls(expr.right)
        case tree.Restrict():
            yield from _calls(expr.base)
            yield from _calls(expr.index)


def _inner(expr: tree.Expr) -> tree.Expr:
    """The size inside of a grain: of `max(64)` the 64."""
    if isinstance(expr, tree.Call) and expr.function.text in REDUCTIONS and len(expr.arguments) == 1:
        return expr.arguments[0].value
    return expr


def _literal(pattern: tree.PatternTree, expr: tree.Expr) -> tuple[tree.Number | None, bool]:
    """The digits of a number, through the names that stand for it, and whether one of these stands elsewhere, too; a
    wrong pattern may name them in a circle.
    """
    values = dict(_pairs(pattern, "param")) | dict(_bindings(pattern))
    seen: set[str] = set()
    while isinstance(expr, tree.Name) and expr.text in values and expr.text not in seen:
        seen.add(expr.text)
        expr = values[expr.text]
    uses = Counter(name.text for value in _expressions(pattern) for name in mentioned(value))
    return expr if isinstance(expr, tree.Number) else None, any(uses[name] > 1 for name in seen)


def _expressions(pattern: tree.PatternTree) -> Iterator[tree.Expr]:
    """Every expression of a pattern."""
    for item in pattern.items:
        match item:
            case tree.Binding():
                yield item.value
            case tree.Policy():
                yield item.call
            case tree.Declaration():
                yield from (pair.value for pair in item.pairs)
            case tree.Result():
                yield from item.values
                yield from () if item.condition is None else (item.condition,)


def _pairs(pattern: tree.PatternTree | None, keyword: str) -> Iterator[tuple[str, tree.Expr]]:
    for item in () if pattern is None else pattern.items:
        if isinstance(item, tree.Declaration) and item.keyword == keyword:
            yield from ((pair.name.text, pair.value) for pair in item.pairs)


def _bindings(pattern: tree.PatternTree) -> Iterator[tuple[str, tree.Expr]]:
    for item in pattern.items:
        if isinstance(item, tree.Binding):
            yield item.name.text, item.value
