"""gate(branches...): the plain sum of separately normalised branches times the caller's gates [B, Hq, N, branches]."""

from __future__ import annotations

from spdsl.ir.pattern import Branch, Gate
from spdsl.primitives.merge import few
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def gate(scope: Scope, branches: tuple[Branch, ...]) -> Gate | None:
    return Gate(branches, scope.span) if few(scope, "gate", branches) else None


WORD = Word(
    "gate",
    Kind.BRANCH,
    (Parameter("branches", Kind.UNGATED, many=True),),
    gate,
    "the sum of branches times the caller's gates",
    "pattern p { causal return gate(attend(sliding(16)), attend(sink(4))) }",
)
