"""relative(score): less the greatest number that the row has among the candidates of the choice, so at most 0."""

from __future__ import annotations

from spdsl.ir.pattern import Relative, Score
from spdsl.primitives.combined import refusal
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def relative(scope: Scope, score: Score) -> Relative | None:
    if reason := refusal(score, scope.stream(score.grain.stream)):
        scope.refuse(*reason, "")
        return None
    return Relative(score)


WORD = Word(
    "relative",
    Kind.SCORE,
    (Parameter("score", Kind.SCORE),),
    relative,
    "a score less the greatest of its row",
    "pattern p { causal near_best = relative(dot(compress(16))) "
    "return attend(threshold(-2, score = near_best, share = max(group), force = last(1), most = 8)) }",
)
