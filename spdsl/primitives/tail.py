"""tail(q, n): the last n queries of the call, of each sequence; fewer than n are all of them.

Scores by it are reduced over their rows: `rows = sum(all)`. Vertical-slash patterns and SnapKV choose by the last 64
queries (arXiv 2407.02490, 2404.14469).
"""

from __future__ import annotations

from spdsl.ir.pattern import Query, QueryTail
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def tail(scope: Scope, query: Query, n: int) -> Query | None:
    if query.source is not None:
        scope.refuse(
            "E105", f"the last rows of `{query.name}` are not built yet", "take the last queries of the caller's"
        )
        return None
    made = Query(scope.name, query.heads, query.dim, tail=QueryTail(query.name, n), span=scope.span)
    scope.add(made)
    return made


WORD = Word(
    "tail",
    Kind.QUERY,
    (Parameter("query", Kind.QUERY), Parameter("n", Kind.SIZE, least=1)),
    tail,
    "the last n queries of a call",
    "pattern p { causal seen = softmax(dot(kv, query = tail(q, 8))) "
    "c = top_k(2, score = seen, rows = sum(all), unit = sum(16), force = last(1)) "
    "return attend(c) if prefill return attend(all) }",
)
