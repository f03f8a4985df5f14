"""kl(target, score, share): KL(target || score) per (head, row) as a further result; it trains the score alone.

Both scores are reduced to the heads of `share`, then taken as distributions over the entries that the target sees
(the indexer's loss of DeepSeek-V3.2, arXiv 2512.02556, and of MiniMax Sparse Attention, arXiv 2606.13392).
"""

from __future__ import annotations

from spdsl.ir.pattern import Kl, Score
from spdsl.primitives.grains import BARE
from spdsl.primitives.pool import SHARE_OF_RESULT, pool
from spdsl.primitives.word import Grain, Kind, Parameter, Scope, Word


def kl(scope: Scope, target: Score, score: Score, share: Grain) -> Kl | None:
    if not target.probability:
        scope.refuse("E201", "the target of `kl` is a probability", "take `mass(branch)` or `softmax(score)`")
        return None
    if scope.stream(target.grain.stream).grid != scope.stream(score.grain.stream).grid:
        message = f"`{target.grain.stream}` and `{score.grain.stream}` have different entries"
        scope.refuse("E201", message, "compare scores over the same cells")
        return None
    wanted, found = pool(scope, target, share, BARE, None), pool(scope, score, share, BARE, None)
    return Kl(wanted, found, scope.span) if wanted and found else None


WORD = Word(
    "kl",
    Kind.RESULT,
    (Parameter("target", Kind.SCORE), Parameter("score", Kind.SCORE), SHARE_OF_RESULT),
    kl,
    "a distillation loss: how far a score is from the probabilities of a branch",
    "pattern p { causal index = stream(value = none) full = attend(all) "
    "return full, kl(mass(full), dot(index), share = mean(group)) }",
)
