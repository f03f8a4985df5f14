"""mass(branch): the probabilities of a softmax as a score, exp(logit - lse) for each (head, query, entry)."""

from __future__ import annotations

from spdsl.ir.pattern import Branch, Mass, Softmax
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def mass(scope: Scope, branch: Branch) -> Mass | None:
    if not isinstance(branch, Softmax):
        scope.refuse("E201", "only one softmax has a mass, not a sum of branches", "take the mass of one `attend`")
        return None
    if len(branch.terms) > 1:
        scope.refuse("E105", "the mass of a softmax over several streams is not built yet", "attend to one stream")
        return None
    if branch.skip is not None:
        scope.refuse("E105", "the mass of a softmax that skips tiles is not built yet", "take it of one without `skip`")
        return None
    return Mass(branch)


WORD = Word(
    "mass",
    Kind.SCORE,
    (Parameter("branch", Kind.BRANCH),),
    mass,
    "the probabilities of a branch as a score",
    "pattern p { causal coarse = attend(compress(8)) "
    "return gate(coarse, attend(top_k(3, score = mass(coarse), unit = 16, force = last(1)))) }",
)
