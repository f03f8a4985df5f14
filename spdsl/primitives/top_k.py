"""name = top_k(k, score, ...): for each list the k units of highest score, the forced ones first.

Ties go to the lowest index; NaN counts as no score. Every unit is chosen once, and only one that begins at or before
the query. Argument `name` (optional): int [B, heads, N, k], taken in place of what would be computed.
"""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Score
from spdsl.ir.rule import Size, TopK
from spdsl.ir.symbols import Expr
from spdsl.primitives.grains import unit_of
from spdsl.primitives.selection import PARAMETERS, PLANNED, choose, ordered
from spdsl.primitives.word import Grain, Kind, Parameter, Scope, SetValue, Word


def top_k(
    scope: Scope, k: Expr, score: Score, share: Grain, rows: Grain, unit: Grain | None,
    force: SetValue | None, within: SetValue | None, least: Expr | None, most: int | None,
) -> SetValue | None:  # fmt: skip
    if not ordered(scope, least, most):
        return None
    count = k if least is None else sympy.Max(sympy.floor(k), -sympy.floor(-least))
    if count.is_number:
        size = Size(count if most is None else min(count, sympy.Integer(most)))
    elif most is not None:
        size = Size(count, most)
    else:
        message = "`least` is not known when compiling, and lists need a greatest length"
        scope.refuse("E309", message, "say how many there are at most: `most = ...`")
        return None
    return choose(scope, TopK(size), score, share, rows, unit, force, within)


WORD = Word(
    "top_k",
    Kind.SET,
    (Parameter("k", Kind.COUNT, least=1, bound="most"), *PARAMETERS),
    top_k,
    "the k units of highest score",
    "pattern p { causal blocks = compress(16) "
    "return attend(top_k(3, score = dot(blocks), share = max(group), force = first(1) | last(1))) }",
    planned=PLANNED,
    unit=unit_of,
)
