"""dot(stream, query, scale): scale * q . k for each entry that is visible, a score of logits."""

from __future__ import annotations

from spdsl.ir.pattern import Logits, Query, Softmax, Stream, Term
from spdsl.ir.product import DOT, Product
from spdsl.ir.symbols import Boolean, Expr
from spdsl.primitives.attend import closed
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def dot(scope: Scope, stream: Stream, query: Query | None, scale: Expr | None) -> Logits | None:
    return scored(scope, stream, query, scale, DOT)


def scored(
    scope: Scope, stream: Stream, query: Query | None, scale: Expr | None, product: Product, seen: Boolean | None = None
) -> Logits | None:
    """scale * product of the query and each entry that is `seen`, or that is closed; None after an error."""
    asks = query or scope.main_query()
    heads, entries = asks.heads or scope.query_heads, stream.heads or scope.kv_heads
    if heads and entries and heads % entries:
        scope.refuse("E306", f"{entries} heads of `{stream.name}` do not divide the {heads} of `{asks.name}`", "")
        return None
    visible = Term(stream.name, closed(stream, scope.causal) if seen is None else seen, scope.span)
    return Logits(Softmax(scope.name, asks.name, (visible,), scale, span=scope.span, product=product, rows=asks.width))


WORD = Word(
    "dot",
    Kind.SCORE,
    (
        Parameter("stream", Kind.STREAM),
        Parameter("query", Kind.QUERY, default=None),
        Parameter("scale", Kind.NUMBER, default=None),
    ),
    dot,
    "the logits of a stream's visible entries as a score",
    "pattern p { causal return attend(top_k(2, score = dot(compress(16)), share = head, force = last(1))) }",
    unnamed="ranking",
)
