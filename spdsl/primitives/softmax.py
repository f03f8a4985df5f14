"""softmax(score): logits as probabilities over the entries that the query sees.

`by = softmax(stream)` of `compress` is another thing of the same name: the weights of the tokens of a cell.
"""

from __future__ import annotations

from spdsl.ir.pattern import Logits, Mass, Score
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def softmax(scope: Scope, score: Score) -> Mass | None:
    if score.probability:
        scope.refuse("E201", "the score holds probabilities already", "leave `softmax` out")
        return None
    if not isinstance(score, Logits):
        scope.refuse(
            "E105", "the softmax of a score that is made of others is not built yet", "take `softmax` of its parts"
        )
        return None
    return Mass(score.softmax)


WORD = Word(
    "softmax",
    Kind.SCORE,
    (Parameter("score", Kind.SCORE),),
    softmax,
    "logits as probabilities over the visible entries",
    "pattern p { causal rank = softmax(dot(compress(8, 4))) "
    "return attend(top_k(2, score = rank, unit = max(16), share = sum(group), force = last(1))) }",
)
