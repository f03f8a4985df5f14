"""set_algebra: sets put together, stream by stream, and a set that the analyses can go on with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import sympy

from spdsl.budget import spend
from spdsl.diagnostics import Span
from spdsl.ir import extent
from spdsl.limits import NESTED, SET_SIZE
from spdsl.passes.names import Names
from spdsl.primitives.word import SetValue
from spdsl.syntax import tree

STEPS = 10  # of an argument of And and Or


def united(sets: Iterable[SetValue]) -> SetValue:
    """All unions of a chain at once, since each step looks at all that is there. Streams stay apart."""
    together: dict[str | None, list[sympy.Basic]] = {}
    for members in sets:
        for stream, test in members.parts:
            together.setdefault(stream, []).append(test)
    spend(sum(_joined(tests) for tests in together.values()))
    return SetValue(tuple((stream, sympy.Or(*tests)) for stream, tests in together.items()))


def combined(names: Names, expr: tree.Binary, left: SetValue, right: SetValue) -> SetValue | None:
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


def _joined(tests: Sequence[sympy.Basic]) -> int:
    """Steps of an And or Or, which compares each argument's forms with those of the others."""
    return STEPS * sum(len(test.args) if isinstance(test, sympy.And | sympy.Or) else 1 for test in tests)


def within_limits(names: Names, members: SetValue, span: Span) -> bool:
    """Whether a set is short enough; an error if it is not."""
    long = max(extent.size(test, SET_SIZE) for _, test in members.parts)
    spend(long // 8)
    deep = max(extent.nesting(test) for _, test in members.parts) if long <= SET_SIZE else 0
    if long <= SET_SIZE and deep <= NESTED:
        return True
    names.report.error(
        "E307",
        f"the set has more than {SET_SIZE:,} operators and operands" if long > SET_SIZE else
        f"roundings and remainders stand {deep} deep inside one another in this set, at most {NESTED}",
        span, "too complex, with its names written out", hint="split it over several branches with `merge`",
    )  # fmt: skip
    return False
