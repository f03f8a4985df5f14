"""attend(set, query, scale, softcap, bias, sink_logit): one softmax over a set of entries of one or several streams."""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Query, Softmax, Stream, Tensor, Term, Values
from spdsl.ir.symbols import Expr, K, Q
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def attend(
    scope: Scope,
    keys: SetValue,
    query: Query | None,
    scale: Expr | None,
    softcap: Expr | None,
    bias: Expr | None,
    sink_logit: Tensor | None,
) -> Softmax | None:
    if sink_logit is not None and sink_logit.axes != ("head",):
        scope.refuse("E204", f"sink_logit needs one logit per head, `{sink_logit.name}` has other axes", "tensor(head)")
        return None
    placed: dict[str, sympy.Basic] = {}
    for stream, test in keys.parts:
        name = stream or scope.main_stream().name
        placed[name] = sympy.Or(placed.get(name, sympy.false), test)
    for known in scope.inputs:
        if isinstance(known, Stream) and known.name in placed and known.value is Values.NONE:
            hint = "declare it with `value = own` or `value = key`"
            scope.refuse("E201", f"`{known.name}` has no values to attend to", hint)
            return None
    causal = K <= Q if scope.causal else sympy.true
    terms = []
    for name, test in placed.items():
        visible = sympy.And(test, causal)
        if visible is sympy.false:
            scope.refuse("E305", "no query can ever see a key of this set", "")
            return None
        terms.append(Term(name, visible, scope.span))
    asks = (query or scope.main_query()).name
    cap = float(softcap) if softcap is not None else None
    sink = sink_logit.name if sink_logit else None
    return Softmax(scope.name, asks, tuple(terms), scale, bias, cap, sink, scope.span)


def on_stream(stream: Stream, members: SetValue) -> SetValue:
    """`stream[set]`: the set placed on a stream."""
    return SetValue(tuple((stream.name, test) for _, test in members.parts))


WORD = Word(
    "attend",
    Kind.BRANCH,
    (
        Parameter("keys", Kind.SET),
        Parameter("query", Kind.QUERY, default=None),
        Parameter("scale", Kind.NUMBER, default=None),
        Parameter("softcap", Kind.NUMBER, default=None, least=0),
        Parameter("bias", Kind.ELEMENT, default=None),
        Parameter("sink_logit", Kind.TENSOR, default=None),
    ),
    attend,
    "one softmax over a set of entries",
    "pattern p { causal slope = tensor(head) return attend(sliding(64), bias = -slope[h] * (q - k)) }",
)
