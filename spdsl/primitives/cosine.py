"""cosine(stream, query): q . k / (|q| |k|) for each entry that is visible, a score of logits; 0 where a length is 0."""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Logits, Query, Stream
from spdsl.ir.product import Product
from spdsl.primitives.dot import scored
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def cosine(scope: Scope, stream: Stream, query: Query | None) -> Logits | None:
    return scored(scope, stream, query, sympy.S.One, Product("cosine"))


WORD = Word(
    "cosine",
    Kind.SCORE,
    (Parameter("stream", Kind.STREAM), Parameter("query", Kind.QUERY, default=None)),
    cosine,
    "the cosines of a query and a stream's visible entries as a score",
    "pattern p { causal return attend(top_k(2, score = cosine(compress(16)), share = max(group), force = last(1))) }",
    unnamed="ranking",
)
