"""name = top_p(p, score, ...): for each list the fewest units of highest score whose sum is at least p of that of all.

The sum is over all candidates of the list, forced units too: these come first and count. `side = below` takes the most
units whose sum is no more than p of it. A sum of 0 gives the forced units and `least`; p = 1 every unit with a score
above 0. `least` and `most` as in `threshold`; ties, NaN and the argument `name` as in `top_k`.
"""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Score
from spdsl.ir.rule import TopP
from spdsl.ir.symbols import Expr
from spdsl.primitives.grains import unit_of
from spdsl.primitives.selection import PARAMETERS, PLANNED, choose, ordered
from spdsl.primitives.word import Grain, Kind, Parameter, Scope, SetValue, Word

SIDES = ("above", "below")


def top_p(
    scope: Scope, p: Expr, score: Score, share: Grain, rows: Grain, unit: Grain | None,
    force: SetValue | None, within: SetValue | None, least: Expr | None, most: int | None, side: str,
) -> SetValue | None:  # fmt: skip
    if not score.probability:
        scope.refuse("E206", "a part of the mass needs probabilities, the score is logits", "write `softmax(...)`")
        return None
    if p.is_number and not 0 < p <= 1:
        scope.refuse("E203", f"`p` is {p}, it must be above 0 and at most 1", "it is a part of all mass: `0.9`")
        return None
    if not ordered(scope, least, most):
        return None
    return choose(scope, TopP(p, side), score, share, rows, unit, force, within, least or sympy.S.Zero, most)


WORD = Word(
    "top_p",
    Kind.SET,
    (Parameter("p", Kind.LEVEL), *PARAMETERS, Parameter("side", Kind.CHOICE, default="above", words=SIDES)),
    top_p,
    "the units of highest score that hold p of all mass",
    "pattern p { causal rank = softmax(dot(compress(16))) "
    "return attend(top_p(0.9, score = rank, share = head, force = last(1), most = 4)) }",
    planned=PLANNED,
    unit=unit_of,
)
