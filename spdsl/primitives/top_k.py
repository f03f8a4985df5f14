"""name = top_k(k, score, ...): for each list the k units of highest score, the forced ones first.

Ties go to the lowest index; NaN counts as no score. Every unit is chosen once, and only one that begins at or before
the query. Argument `name` (optional): int [B, heads, N, k], taken in place of what would be computed.
"""

from __future__ import annotations

from spdsl.ir.pattern import Score
from spdsl.ir.rule import Size, TopK
from spdsl.primitives.grains import unit_of
from spdsl.primitives.selection import PARAMETERS, PLANNED, choose, ordered
from spdsl.primitives.word import Grain, Kind, Parameter, Scope, SetValue, Word


def top_k(
    scope: Scope, k: int, score: Score, share: Grain, rows: Grain, unit: Grain | None,
    force: SetValue | None, within: SetValue | None, least: int | None, most: int | None,
) -> SetValue | None:  # fmt: skip
    if not ordered(scope, least, most):
        return None
    count = min(max(k, least or k), most or max(k, least or k))
    return choose(scope, TopK(Size.of(count)), score, share, rows, unit, force, within)


WORD = Word(
    "top_k",
    Kind.SET,
    (Parameter("k", Kind.SIZE, least=1), *PARAMETERS),
    top_k,
    "the k units of highest score",
    "pattern p { causal blocks = compress(16) "
    "return attend(top_k(3, score = dot(blocks), share = max(group), force = first(1) | last(1))) }",
    planned=PLANNED,
    unit=unit_of,
)
