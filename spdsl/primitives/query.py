"""name = query(heads, dim): vectors that ask in place of q, argument `name` [B, heads, N, dim]."""

from __future__ import annotations

from spdsl.ir.pattern import Query
from spdsl.limits import HEAD_DIM, HEADS
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def query(scope: Scope, heads: int | None, dim: int | None) -> Query:
    made = Query(scope.name, heads, dim, span=scope.span)
    scope.add(made)
    return made


WORD = Word(
    "query",
    Kind.QUERY,
    (
        Parameter("heads", Kind.SIZE, default=None, least=1, most=HEADS),
        Parameter("dim", Kind.SIZE, default=None, least=1, most=HEAD_DIM),
    ),
    query,
    "query vectors of their own",
    "pattern p { causal q_far = query() return merge(attend(sliding(16)), attend(all - sliding(16), query = q_far)) }",
)
