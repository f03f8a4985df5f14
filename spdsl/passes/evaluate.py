"""evaluate: an expression of the tree as the kind of value that its place asks for."""

from __future__ import annotations

from typing import Any

import sympy

from spdsl.budget import spend
from spdsl.passes import arithmetic, codes, grains, source_numbers
from spdsl.passes.kinds import INPUTS, how_joined, is_main_stream, kind_of, of_kind
from spdsl.passes.names import Names
from spdsl.passes.placed_arguments import placed_arguments
from spdsl.passes.set_algebra import combined, united, within_limits
from spdsl.primitives.attend import on_stream
from spdsl.primitives.planned import PLANNED
from spdsl.primitives.pools import POOLS
from spdsl.primitives.registry import WORDS
from spdsl.primitives.word import REQUIRED, UNIT_OF_CHOICE, Cells, Kind, Parameter, Scope, SetValue, Word
from spdsl.syntax import tree

CALL = 80  # steps of what a word builds
AXES = ("head", "kv_head", "query", "token", "float", "int", "bool")


def evaluate(names: Names, expr: tree.Expr, parameter: Parameter, binding: str | None = None) -> Any:
    """The value of `expr` as `parameter.kind`; None after an error. `binding` is the name that it will get."""
    match parameter.kind:
        case Kind.SIZE:
            return arithmetic.size(names, expr, parameter.least, f"`{parameter.name}`", parameter.most)
        case Kind.NUMBER:
            return arithmetic.number(names, expr, parameter.least, f"`{parameter.name}`")
        case Kind.COUNT:
            return arithmetic.count(names, expr, parameter.least, f"`{parameter.name}`", parameter.most)
        case Kind.LEVEL:
            return arithmetic.of_call(names, expr, parameter.of_tokens)
        case Kind.ELEMENT:
            return arithmetic.element(names, expr)
        case Kind.CONDITION:
            return arithmetic.condition(names, expr)
        case Kind.CHOICE:
            return grains.word(names, expr, parameter)
        case Kind.AXIS:
            if isinstance(expr, tree.Name) and expr.text in AXES:
                return expr.text
            return arithmetic.size(names, expr, 1, "an axis")
        case Kind.SET | Kind.UNITS:
            return _set(names, expr, binding)
        case Kind.CELLS:
            return _cells(names, expr, parameter)
        case Kind.GRAIN:
            return grains.grain(names, expr, parameter)
        case Kind.CODE:
            return codes.code(names, expr)
    return _bound_value(names, expr, parameter.kind, binding)


def _cells(names: Names, expr: tree.Expr, parameter: Parameter) -> Cells | None:
    """`mean` and its like, or `softmax(stream)`: another thing than the score of that name."""
    pool = POOLS.get(expr.function.text) if isinstance(expr, tree.Call) else None
    if isinstance(expr, tree.Call) and pool is not None and pool.weighs and len(expr.arguments) == 1:
        logits = _bound_value(names, expr.arguments[0].value, Kind.STREAM, None)
        return logits and Cells(pool.name, logits.name)
    if isinstance(expr, tree.Call) and expr.function.text not in WORDS:
        _unknown_word(names, expr)
        return None
    named = grains.word(names, expr, parameter)
    return None if named is None else Cells(named)


def _bound_value(names: Names, expr: tree.Expr, kind: Kind, binding: str | None) -> Any:
    """A stream, query, tensor or branch: a name bound to one, or a call that makes one."""
    if isinstance(expr, tree.Name) and expr.text != "all":
        found: Any = names.find(expr, *INPUTS.get(kind, ()))
    elif isinstance(expr, tree.Call):
        found = call(names, expr, binding)
    elif kind in (Kind.SCORE, Kind.RESULT) and kind_of(names, expr) is Kind.SCORE:
        names.report.error("E105", "arithmetic of scores is not built yet", expr.span, "specified, but not built")
        return None
    else:
        names.report.error(
            "E201", f"{kind.value} is expected here", expr.span, f"not {kind.value}", hint=how_joined(names, expr)
        )
        return None
    return of_kind(names, found, kind, expr)


def _set(names: Names, expr: tree.Expr, binding: str | None) -> SetValue | None:
    """A set that the analyses can go on with."""
    members = _set_as_written(names, expr, binding)
    return members if members is not None and within_limits(names, members, expr.span) else None


def _set_as_written(names: Names, expr: tree.Expr, binding: str | None) -> SetValue | None:
    match expr:
        case tree.Name(text="all"):
            return SetValue(((None, sympy.true),))
        case tree.Restrict():
            stream = _bound_value(names, expr.base, Kind.STREAM, None)
            members = _set(names, expr.index, binding)
            return on_stream(stream, members) if stream and members else None
        case tree.Unary(operator="~"):
            inner = _set(names, expr.operand, None)
            return inner and SetValue(tuple((stream, sympy.Not(test)) for stream, test in inner.parts))
        case tree.Binary(operator="|"):
            return _united(names, expr)
        case tree.Binary(operator="&" | "-"):
            left, right = _set(names, expr.left, None), _set(names, expr.right, None)
            return combined(names, expr, left, right) if left and right else None
    if isinstance(expr, tree.Name | tree.Call):
        if kind_of(names, expr) is Kind.STREAM or is_main_stream(expr):
            stream = _bound_value(names, expr, Kind.STREAM, None)
            return stream and SetValue(((stream.name, sympy.true),))
        found: SetValue | None = _bound_value(names, expr, Kind.SET, binding)
        return found
    names.report.error(
        "E201",
        "a set is expected here",
        expr.span,
        "not a set",
        hint=how_joined(names, expr),
    )
    return None


def _united(names: Names, expr: tree.Binary) -> SetValue | None:
    """A chain of unions, from left to right."""
    operands: list[tree.Expr] = []
    left: tree.Expr = expr
    while isinstance(left, tree.Binary) and left.operator == "|":
        operands.insert(0, left.right)
        left = left.left
    sets = [_set(names, operand, None) for operand in (left, *operands)]
    known = [members for members in sets if members is not None]
    return united(known) if len(known) == len(sets) else None


def call(names: Names, expr: tree.Call, binding: str | None) -> Any:
    """A call of a word: its arguments by kind, then its `build`. None after an error."""
    word = WORDS.get(expr.function.text)
    if word is None:
        _unknown_word(names, expr)
        return None
    spend(CALL)
    arguments = _arguments(names, word, expr)
    if arguments is None:
        return None
    return word.build(scope_of(names, binding or names.fresh(word.unnamed or word.name), expr), **arguments)


def scope_of(names: Names, name: str, expr: tree.Expr) -> Scope:
    """What the build of a value called `name` may ask for; its errors lie at `expr`."""
    return Scope(
        name, expr.span, names.inputs, names.query_heads, names.kv_heads, names.causal,
        lambda code, message, hint: names.report.error(
            names.out_of_domain(expr) if code == "E203" else code, message, expr.span, hint=hint,
            note=names.values_in(expr) if code == "E203" else "",
        ),
        lambda name, actual, wanted, applicability: source_numbers.instead(
            names.pattern, expr.span, name, actual, wanted, applicability
        ),
        lambda name, value, applicability, more: source_numbers.given_as(
            names.pattern, expr.span, name, value, applicability, more
        ),
    )  # fmt: skip


def _unknown_word(names: Names, expr: tree.Call) -> None:
    text, span = expr.function.text, expr.function.span
    if text in PLANNED:
        names.report.error(
            "E105",
            f"`{text}` is not built yet",
            span,
            PLANNED[text],
            note="the language specifies it; docs/language.md says what is built",
        )
        return
    hint = names.meant(expr.function, {*WORDS, *PLANNED})
    names.report.error("E102", f"unknown word `{text}`", span, "no such word", hint=hint or "see docs/language.md")
    meant = WORDS.get(hint.replacement or "") if hint else None
    if meant is not None:
        _arguments(names, meant, expr)  # for their own errors
        return
    for argument in expr.arguments:
        if isinstance(argument.value, tree.Call):
            call(names, argument.value, None)


def _arguments(names: Names, word: Word, expr: tree.Call) -> dict[str, Any] | None:
    """Each parameter's value; None after an error."""
    values: dict[str, Any] = {}
    placed, failed = placed_arguments(names, word, expr)
    for parameter, value in sorted(placed, key=lambda pair: pair[0].kind is Kind.UNITS):
        found = _argument(names, word, parameter, value, values)
        failed |= found is None
        values[parameter.name] = (*values.get(parameter.name, ()), found) if parameter.many else found
    for parameter in word.parameters:
        if parameter.name in values:
            continue
        if parameter.default is REQUIRED and not failed:
            names.report.error(
                "E202",
                f"`{word.name}` needs `{parameter.name}`",
                expr.span,
                f"{parameter.kind.value} is missing",
                note=f"{word.name}: {word.summary}",
            )
            failed = True
        values[parameter.name] = names.unit if parameter.default is UNIT_OF_CHOICE else parameter.default
    for parameter, value in placed:
        failed |= bool(parameter.bound) and _unbounded(names, parameter, value, values)
    return None if failed else values


def _unbounded(names: Names, parameter: Parameter, value: tree.Expr, values: dict[str, Any]) -> bool:
    """Whether a count is known at the call only, and the parameter that bounds it is left out; then an error."""
    found = values[parameter.name]
    if found is None or found.is_number or values[parameter.bound] is not None:
        return False
    names.report.error(
        "E309",
        "this size is not known when compiling, and lists need a greatest length",
        value.span,
        "depends on the call",
        hint=f"say how many there are at most: `{parameter.bound} = ...`",
    )
    return True


def _argument(names: Names, word: Word, parameter: Parameter, value: tree.Expr, before: dict[str, Any]) -> Any:
    """One argument. A set of units stands last, when the unit is known that it counts."""
    if parameter.kind is not Kind.UNITS or word.unit is None:
        return evaluate(names, value, parameter)
    outer, names.unit = names.unit, word.unit(names.inputs, before)
    try:
        return evaluate(names, value, parameter)
    finally:
        names.unit = outer
