"""merge(branches...): the exact log-sum-exp merge; over disjoint keys it equals one softmax over all of them."""

from __future__ import annotations

from spdsl.ir.pattern import Branch, Merge, leaves
from spdsl.limits import SOFTMAXES
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def merge(scope: Scope, branches: tuple[Branch, ...]) -> Merge | None:
    return Merge(branches, scope.span) if few(scope, "merge", branches) else None


def few(scope: Scope, word: str, branches: tuple[Branch, ...]) -> bool:
    """Whether so many branches can be checked, each against the others; an error if not."""
    found = sum(map(leaves, branches))
    if found > SOFTMAXES:
        scope.refuse("E312", f"a `{word}` of {found:,} branches, at most {SOFTMAXES}", "unite sets: `attend(a | b)`")
    return found <= SOFTMAXES


WORD = Word(
    "merge",
    Kind.BRANCH,
    (Parameter("branches", Kind.UNGATED, many=True),),
    merge,
    "the exact log-sum-exp merge of branches over disjoint keys",
    "pattern p { causal return merge(attend(sliding(16)), attend(sink(4) - sliding(16))) }",
)
