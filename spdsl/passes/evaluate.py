"""evaluate: an expression of the tree as the kind of value that its place asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy

from spdsl.budget import spend
from spdsl.diagnostics import did_you_mean
from spdsl.ir import extent
from spdsl.ir.pattern import Gate, Kl, Logits, Mass, Merge, Pooled, Query, Softmax, Stream, Tensor
from spdsl.limits import NESTED, SET_SIZE
from spdsl.passes import arithmetic, codes, grains, written
from spdsl.passes.names import Names
from spdsl.primitives.attend import on_stream
from spdsl.primitives.planned import PLANNED
from spdsl.primitives.pools import POOLS
from spdsl.primitives.registry import WORDS
from spdsl.primitives.word import REQUIRED, UNIT_OF_CHOICE, Cells, Kind, Parameter, Scope, SetValue, Word
from spdsl.syntax import tree

STEPS, CALL = 10, 80  # of an argument of And and Or, and of what a word builds
_INPUTS: dict[Kind, tuple[type, str]] = {
    Kind.STREAM: (Stream, "stream()"), Kind.QUERY: (Query, "query()"), Kind.TENSOR: (Tensor, "tensor(head)"),
}  # fmt: skip
AXES = ("head", "kv_head", "query", "token", "float", "int", "bool")
_TYPES: dict[Kind, type | tuple[type, ...]] = {
    Kind.SET: SetValue, Kind.STREAM: Stream, Kind.QUERY: Query, Kind.TENSOR: Tensor,
    Kind.BRANCH: (Softmax, Gate, Merge), Kind.SCORE: (Logits, Mass), Kind.VECTORS: (Stream, Query),
    Kind.RESULT: (Softmax, Gate, Merge, Logits, Mass, Pooled, Kl), Kind.UNGATED: (Softmax, Merge),
}  # fmt: skip


def kind_of(names: Names, expr: tree.Expr) -> Kind:
    """What kind of value an expression makes, read off its outermost word."""
    match expr:
        case tree.Call() if expr.function.text in WORDS:
            return WORDS[expr.function.text].makes
        case tree.Call() if expr.function.text in arithmetic.MATH:
            return Kind.NUMBER
        case tree.Name(text="all"):
            return Kind.SET
        case tree.Name():
            bound = names.bound.get(expr.text)
            return next((kind for kind, types in _TYPES.items() if isinstance(bound, types)), Kind.NUMBER)
        case tree.Restrict():
            base = names.bound.get(expr.base.text) if isinstance(expr.base, tree.Name) else None
            return Kind.SET if isinstance(base, Stream) or _is_kv(expr.base) else Kind.ELEMENT
        case tree.Unary():
            return kind_of(names, expr.operand)
        case tree.Binary():
            left = kind_of(names, expr.left)  # once: expressions nest
            if left is Kind.NUMBER and (right := kind_of(names, expr.right)) in (Kind.SCORE, Kind.BRANCH, Kind.SET):
                return right
            if left is Kind.STREAM:
                return Kind.SET
            return (
                left if left in (Kind.SCORE, Kind.BRANCH, Kind.SET) or expr.operator in ("|", "&", "-") else Kind.NUMBER
            )
    return Kind.NUMBER


def _is_kv(expr: tree.Expr) -> bool:
    return isinstance(expr, tree.Name) and expr.text == "kv"


def evaluate(names: Names, expr: tree.Expr, parameter: Parameter, binding: str | None = None) -> Any:
    """The value of `expr` as `parameter.kind`; None after an error. `binding` is the name that it will get."""
    match parameter.kind:
        case Kind.SIZE:
            return arithmetic.size(names, expr, parameter.least, f"`{parameter.name}`", parameter.most)
        case Kind.NUMBER:
            return arithmetic.number(names, expr, parameter.least, f"`{parameter.name}`")
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
        found: Any = names.find(expr, *_INPUTS.get(kind, ()))
    elif isinstance(expr, tree.Call):
        found = call(names, expr, binding)
    elif kind in (Kind.SCORE, Kind.RESULT) and kind_of(names, expr) is Kind.SCORE:
        names.report.error("E105", "arithmetic of scores is not built yet", expr.span, "specified, but not built")
        return None
    else:
        names.report.error(
            "E201", f"{kind.value} is expected here", expr.span, f"not {kind.value}", hint=_how_joined(names, expr)
        )
        return None
    return _of_kind(names, found, kind, expr)


def _how_joined(names: Names, expr: tree.Expr) -> str:
    """How branches, or sets, are put together, where that was tried by an operator that they do not have."""
    if not isinstance(expr, tree.Binary):
        return "attend to the set: `attend(...)`" if kind_of(names, expr) is Kind.SET else ""
    kinds = {kind_of(names, expr.left), kind_of(names, expr.right)}
    if kinds & {Kind.BRANCH}:
        return (
            "`gate(a, b)` adds branches by the caller's weights, `merge(a, b)` is one softmax over disjoint keys, "
            "`attend(x | y)` one over both sets"
        )
    if kinds & {Kind.SET, Kind.STREAM}:
        return "sets are put together by `|` (in either), `&` (in both) and `-` (in the first only)"
    return "make a condition a set with `where(...)`"


def _of_kind(names: Names, found: Any, kind: Kind, expr: tree.Expr) -> Any:
    if found is None or isinstance(found, _TYPES[kind]):
        return found
    hint = ""
    if kind in (Kind.BRANCH, Kind.UNGATED, Kind.RESULT) and isinstance(found, SetValue):
        hint = "attend to the set: `attend(...)`"
    elif kind in (Kind.SET, Kind.UNITS) and isinstance(found, Softmax | Gate | Merge):
        hint = "put sets together inside of one `attend`, branches with `merge(...)` or `gate(...)`"
    elif kind is Kind.UNGATED and isinstance(found, Gate):
        hint = "gate all branches together: `gate(a, b, c)`"
    elif kind is Kind.SCORE and isinstance(found, Softmax):
        hint = "take its probabilities: `mass(...)`"
    elif kind is Kind.SCORE and isinstance(found, Stream):
        hint = "take its logits: `dot(...)`"
    names.report.error("E201", f"{kind.value} is expected here", expr.span, f"not {kind.value}", hint=hint)
    return None


def _set(names: Names, expr: tree.Expr, binding: str | None) -> SetValue | None:
    """A set that the analyses can go on with."""
    found = _set_as_written(names, expr, binding)
    if found is None:
        return None
    long = max(extent.size(test, SET_SIZE) for _, test in found.parts)
    spend(long // 8)
    deep = max(extent.nesting(test) for _, test in found.parts) if long <= SET_SIZE else 0
    if long <= SET_SIZE and deep <= NESTED:
        return found
    names.report.error(
        "E307",
        f"the set has more than {SET_SIZE:,} operators and operands" if long > SET_SIZE else
        f"roundings and remainders stand {deep} deep inside one another in this set, at most {NESTED}",
        expr.span, "too complex, with its names written out", hint="split it over several branches with `merge`",
    )  # fmt: skip
    return None


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
            return _combine(names, expr, left, right) if left and right else None
    if isinstance(expr, tree.Name | tree.Call):
        if kind_of(names, expr) is Kind.STREAM or _is_kv(expr):
            stream = _bound_value(names, expr, Kind.STREAM, None)
            return stream and SetValue(((stream.name, sympy.true),))
        found: SetValue | None = _bound_value(names, expr, Kind.SET, binding)
        return found
    names.report.error(
        "E201",
        "a set is expected here",
        expr.span,
        "not a set",
        hint=_how_joined(names, expr),
    )
    return None


def _united(names: Names, expr: tree.Binary) -> SetValue | None:
    """A chain of unions at once, since each step looks at all that is there. Streams stay apart."""
    operands: list[tree.Expr] = []
    left: tree.Expr = expr
    while isinstance(left, tree.Binary) and left.operator == "|":
        operands.insert(0, left.right)
        left = left.left
    together: dict[str | None, list[sympy.Basic]] = {}
    sets = [_set(names, operand, None) for operand in (left, *operands)]
    for found in sets:
        for stream, test in found.parts if found else ():
            together.setdefault(stream, []).append(test)
    if None in sets:
        return None
    spend(sum(_joined(tests) for tests in together.values()))
    return SetValue(tuple((stream, sympy.Or(*tests)) for stream, tests in together.items()))


def _joined(tests: Sequence[sympy.Basic]) -> int:
    """Steps of an And or Or, which compares each argument's forms with those of the others."""
    return STEPS * sum(len(test.args) if isinstance(test, sympy.And | sympy.Or) else 1 for test in tests)


def _combine(names: Names, expr: tree.Binary, left: SetValue, right: SetValue) -> SetValue | None:
    """Intersection and difference apply an unplaced right side to every stream."""
    spend(_joined([test for members in (left, right) for _, test in members.parts]))
    apply: Callable[[sympy.Basic, sympy.Basic], sympy.Basic] = (
        sympy.And if expr.operator == "&" else lambda a, b: sympy.And(a, sympy.Not(b))
    )
    if [stream for stream, _ in right.parts] == [None]:
        ((_, test),) = right.parts
        return SetValue(tuple((stream, apply(own, test)) for stream, own in left.parts))
    tests = dict(right.parts)
    if {stream for stream, _ in left.parts} != set(tests):
        names.report.error(
            "E201",
            "the two sets lie on different streams",
            expr.span,
            "cannot be intersected or subtracted",
            note="entries of different streams are different even where they cover the same tokens",
        )
        return None
    return SetValue(tuple((stream, apply(own, tests[stream])) for stream, own in left.parts))


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
        lambda name, actual, wanted, applicability: written.instead(
            names.pattern, expr.span, name, actual, wanted, applicability
        ),
        lambda name, value, applicability, more: written.given_as(
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
    placed, failed = _placed(names, word, expr)
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
    return None if failed else values


def _placed(names: Names, word: Word, expr: tree.Call) -> tuple[list[tuple[Parameter, tree.Expr]], bool]:
    """Which parameter each argument is for, and whether one is for none."""
    parameters = {parameter.name: parameter for parameter in word.parameters}
    places = list(word.parameters)
    placed: list[tuple[Parameter, tree.Expr]] = []
    failed = False
    for argument in expr.arguments:
        parameter = parameters.get(argument.name.text) if argument.name else (places[0] if places else None)
        if parameter is None or (parameter not in places and not parameter.many):
            _wrong_argument(names, word, argument, list(parameters))
            failed = True
            continue
        placed.append((parameter, argument.value))
        if not parameter.many:
            places.remove(parameter)
    return placed, failed


def _argument(names: Names, word: Word, parameter: Parameter, value: tree.Expr, before: dict[str, Any]) -> Any:
    """One argument. A set of units stands last, when the unit is known that it counts."""
    if parameter.kind is not Kind.UNITS or word.unit is None:
        return evaluate(names, value, parameter)
    outer, names.unit = names.unit, word.unit(names.inputs, before)
    try:
        return evaluate(names, value, parameter)
    finally:
        names.unit = outer


def _wrong_argument(names: Names, word: Word, argument: tree.Argument, known: list[str]) -> None:
    if argument.name is None:
        names.report.error(
            "E202",
            f"`{word.name}` takes fewer arguments",
            argument.value.span,
            "one too many",
            note=f"its parameters: {', '.join(known) or 'none'}",
        )
        return
    text = argument.name.text
    if text in word.planned:
        names.report.error(
            "E105", f"`{text}` of `{word.name}` is not built yet", argument.name.span, "specified, but not built"
        )
        return
    message = f"`{text}` is given twice" if text in known else f"`{word.name}` has no parameter `{text}`"
    names.report.error(
        "E202",
        message,
        argument.name.span,
        "unknown here",
        note=f"its parameters: {', '.join(known) or 'none'}",
        hint=did_you_mean(text, known, argument.name.span) or "",
    )
