"""name = stream(heads, qk, v, value, lanes): keys and values of their own, arguments `k_name` and `v_name`."""

from __future__ import annotations

from spdsl.ir.pattern import Stream, Values
from spdsl.limits import HEAD_DIM, HEADS
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def stream(scope: Scope, heads: int | None, qk: int | None, v: int | None, value: str, lanes: int) -> Stream | None:
    if lanes != 1:
        scope.refuse("E105", "streams of several lanes are not built yet", "use one stream per lane")
        return None
    kv_heads = heads if heads is not None else scope.kv_heads
    if scope.query_heads and kv_heads and scope.query_heads % kv_heads:
        scope.refuse("E306", f"{kv_heads} heads do not divide the {scope.query_heads} query heads", "")
        return None
    made = Stream(scope.name, heads, qk, v, Values(value), lanes, span=scope.span)
    scope.add(made)
    return made


WORD = Word(
    "stream",
    Kind.STREAM,
    (
        Parameter("heads", Kind.SIZE, default=None, least=1, most=HEADS),
        Parameter("qk", Kind.SIZE, default=None, least=1, most=HEAD_DIM),
        Parameter("v", Kind.SIZE, default=None, least=1, most=HEAD_DIM),
        Parameter("value", Kind.CHOICE, default="own", words=("own", "key", "none")),
        Parameter("lanes", Kind.SIZE, default=1, least=1),
    ),
    stream,
    "keys and values of their own",
    "pattern p { causal other = stream() return attend(other[sliding(64)]) }",
)
