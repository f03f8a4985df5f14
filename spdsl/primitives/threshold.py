"""name = threshold(x, score, ...): for each list the units of a score of at least x, and the forced ones.

With `most` only that many, the forced first, then the best; with `least` so many of the best even below x, the forced
ones among them. Ties, NaN and the argument `name` as in `top_k`.
"""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Score
from spdsl.ir.rule import Threshold
from spdsl.ir.symbols import Expr
from spdsl.primitives.grains import unit_of
from spdsl.primitives.selection import PARAMETERS, PLANNED, choose, ordered
from spdsl.primitives.word import Grain, Kind, Parameter, Scope, SetValue, Word


def threshold(
    scope: Scope, x: Expr, score: Score, share: Grain, rows: Grain, unit: Grain | None,
    force: SetValue | None, within: SetValue | None, least: Expr | None, most: int | None,
) -> SetValue | None:  # fmt: skip
    if not ordered(scope, least, most):
        return None
    return choose(scope, Threshold(x), score, share, rows, unit, force, within, least or sympy.S.Zero, most)


WORD = Word(
    "threshold",
    Kind.SET,
    (Parameter("x", Kind.LEVEL), *PARAMETERS),
    threshold,
    "the units of a score of at least x",
    "pattern p { causal rank = softmax(dot(compress(16))) "
    "return attend(threshold(0.2, score = rank, share = head, force = last(1), most = 4)) }",
    planned=PLANNED,
    unit=unit_of,
)
