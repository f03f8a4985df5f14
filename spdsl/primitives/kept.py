"""kept(branch): how many tiles a softmax with a skip kept, and how many it saw, as a further result."""

from __future__ import annotations

from spdsl.ir.pattern import Branch, Kept, Softmax
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def kept(scope: Scope, branch: Branch) -> Kept | None:
    if not isinstance(branch, Softmax) or branch.skip is None:
        hint = "name a branch `attend(.., skip = below(..))`"
        scope.refuse("E201", "only a softmax that skips tiles keeps some of them", hint)
        return None
    return Kept(branch, scope.span)


WORD = Word(
    "kept",
    Kind.RESULT,
    (Parameter("branch", Kind.BRANCH),),
    kept,
    "the tiles that a skip keeps, and those that it sees",
    "pattern p { causal step = attend(all, skip = below(1 / 8)) return step, kept(step) if decode "
    "long = attend(all, skip = below(1 / 8, rows = 16, unit = 16)) return long, kept(long) }",
)
