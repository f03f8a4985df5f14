"""merge(branches...): the exact log-sum-exp merge; over disjoint keys it equals one softmax over all of them."""

from __future__ import annotations

from spdsl.ir.pattern import Branch, Merge
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def merge(scope: Scope, branches: tuple[Branch, ...]) -> Merge:
    return Merge(branches, scope.span)


WORD = Word(
    "merge",
    Kind.BRANCH,
    (Parameter("branches", Kind.UNGATED, many=True),),
    merge,
    "the exact log-sum-exp merge of branches over disjoint keys",
    "pattern p { causal return merge(attend(sliding(16)), attend(sink(4) - sliding(16))) }",
)
