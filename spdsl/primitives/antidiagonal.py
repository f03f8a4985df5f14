"""antidiagonal(step, stream, query, scale): sums of q . k along antidiagonals of tiles of `step` x `step` pairs.

For cells i of `step` queries and j of `step` keys, each counted from position 0 of the sequence, it is scale / step
times the sum over s of q[i step + step - 1 - s] . k[j step + s] (XAttention, arXiv 2503.16428: of every antidiagonal
the one through the corners). A cell that is there in part counts what is there.
"""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Logits, Query, Stream
from spdsl.ir.product import Product
from spdsl.ir.symbols import Expr, K, Q
from spdsl.primitives.dot import scored
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def antidiagonal(
    scope: Scope, step: int, stream: Stream | None, query: Query | None, scale: Expr | None
) -> Logits | None:
    keys = stream or scope.main_stream()
    if not keys.grid.is_tokens:
        scope.refuse("E201", f"`{keys.name}` has entries, antidiagonals are of tokens", "name a stream of tokens")
        return None
    begins = step * sympy.floor(K / step) <= step * sympy.floor(Q / step) + step - 1
    visible = begins if scope.causal else sympy.true
    return scored(scope, keys, query, scale, Product("antidiagonal", step=step), visible)


WORD = Word(
    "antidiagonal",
    Kind.SCORE,
    (
        Parameter("step", Kind.SIZE, least=2),
        Parameter("stream", Kind.STREAM, default=None),
        Parameter("query", Kind.QUERY, default=None),
        Parameter("scale", Kind.NUMBER, default=None),
    ),
    antidiagonal,
    "sums of products along antidiagonals as a score of cells",
    "pattern p { causal rank = softmax(antidiagonal(8)) chosen = top_p(0.9, score = rank, share = head, "
    "rows = sum(64), unit = sum(64), force = first(1) | last(1), most = 32) "
    "return attend(chosen) if prefill return attend(all) }",
    unnamed="ranking",
)
