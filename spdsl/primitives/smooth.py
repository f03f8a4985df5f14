"""smooth(score, width, by): the mean, or the maximum, of a window of entries around each, so that units are runs.

For a mean an entry without a number is 0, as where a pooling pads with zeros; a maximum passes it by.
"""

from __future__ import annotations

from spdsl.diagnostics import Applicability
from spdsl.ir.pattern import Score, Smoothed
from spdsl.primitives.combined import refusal
from spdsl.primitives.word import Kind, Parameter, Scope, Word

WAYS = ("mean", "max")


def smooth(scope: Scope, score: Score, width: int, by: str) -> Smoothed | None:
    if width % 2 == 0:
        hint = scope.instead("width", width, width + 1, Applicability.MAYBE)
        scope.refuse("E203", f"a window of {width} entries has no middle, it must be odd", hint)
        return None
    if reason := refusal(score, scope.stream(score.grain.stream)):
        scope.refuse(*reason, "")
        return None
    return Smoothed(score, width, by)


WORD = Word(
    "smooth",
    Kind.SCORE,
    (
        Parameter("score", Kind.SCORE),
        Parameter("width", Kind.SIZE, least=1, most=1 << 12),
        Parameter("by", Kind.CHOICE, default="mean", words=WAYS),
    ),
    smooth,
    "a score averaged over neighbouring entries",
    "pattern p { causal rank = smooth(softmax(dot(compress(16))), 3, by = max) "
    "return attend(top_k(4, score = rank, share = sum(group), force = last(1))) }",
)
