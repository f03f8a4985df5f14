"""What of a score can be part of one that is made of others."""

from __future__ import annotations

from spdsl.ir.pattern import Score, Stream, softmaxes_of


def refusal(score: Score, stream: Stream) -> str:
    """Why it cannot be yet; empty if it can."""
    if stream.grid.partial:
        return f"a score made of one over `{stream.name}`, whose last cell may be short, is not built yet"
    if any(softmax.bias is not None or softmax.softcap or softmax.sink for softmax in softmaxes_of(score)):
        return "a score made of the mass of a branch with a bias, a cap or a sink is not built yet"
    return ""
