"""What of a score can be part of one that is made of others."""

from __future__ import annotations

from spdsl.ir.pattern import Combined, Relative, Score, Smoothed, Stream, softmaxes_of
from spdsl.limits import SCORE_PARTS


def refusal(score: Score, stream: Stream) -> tuple[str, str] | None:
    """The code and the message of why it cannot be; None if it can. `stream` is that of its grain."""
    if parts_of(score) >= SCORE_PARTS:
        return "E312", f"a score is made of more than {SCORE_PARTS} parts"
    if stream.grid.partial:
        return "E105", f"a score made of one over `{stream.name}`, whose last cell may be short, is not built yet"
    if any(softmax.bias is not None or softmax.softcap or softmax.sink for softmax in softmaxes_of(score)):
        return "E105", "a score made of the mass of a branch with a bias, a cap or a sink is not built yet"
    return None


def parts_of(score: Score) -> int:
    """Scores in it, itself among them."""
    match score:
        case Combined():
            return 1 + sum(map(parts_of, score.parts))
        case Relative() | Smoothed():
            return 1 + parts_of(score.score)
    return 1
