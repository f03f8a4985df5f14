"""attend(set, query, scale, softcap, bias, sink_logit, skip): one softmax over a set of entries of streams."""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Query, Softmax, Stream, Tensor, Term, Values
from spdsl.ir.skip import Skip
from spdsl.ir.symbols import LENGTH, Boolean, Expr, K, Q, lookups
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def attend(
    scope: Scope,
    keys: SetValue,
    query: Query | None,
    scale: Expr | None,
    softcap: Expr | None,
    bias: Expr | None,
    sink_logit: Tensor | None,
    skip: Skip | None,
) -> Softmax | None:
    if sink_logit is not None and sink_logit.axes != ("head",):
        scope.refuse("E204", f"sink_logit needs one logit per head, `{sink_logit.name}` has other axes", "tensor(head)")
        return None
    placed: dict[str, sympy.Basic] = {}
    for place, test in keys.parts:
        name = place or scope.main_stream().name
        placed[name] = sympy.Or(placed.get(name, sympy.false), test)
    terms = []
    for name, test in placed.items():
        stream = scope.stream(name)
        if not _fits(scope, stream, test):
            return None
        visible = sympy.And(test, closed(stream, scope.causal))
        if visible is sympy.false:
            scope.refuse("E305", "no query can ever see a key of this set", "")
            return None
        terms.append(Term(name, visible, scope.span))
    asks = (query or scope.main_query()).name
    cap = float(softcap) if softcap is not None else None
    sink = sink_logit.name if sink_logit else None
    return Softmax(scope.name, asks, tuple(terms), scale, bias, cap, sink, scope.span, skip=skip)


def _fits(scope: Scope, stream: Stream, test: Boolean) -> bool:
    """Whether a softmax can see this set of the stream."""
    if stream.value is Values.NONE:
        hint = "declare it with `value = own` or `value = key`"
        scope.refuse("E201", f"`{stream.name}` has no values to attend to", hint)
    elif stream.grid.is_tokens or test is sympy.true:
        return True
    elif lookups(test):
        hint = "put the set on a stream of tokens"
        scope.refuse("E201", f"the set counts tokens, `{stream.name}` holds cells of tokens", hint)
    else:
        hint = "attend to all of them"
        scope.refuse("E105", f"sets of the entries of `{stream.name}` other than all are not built yet", hint)
    return False


def closed(stream: Stream, causal: bool) -> Boolean:
    """Which entries a query may see: with `causal` those of which it has seen the last token.

    The last token of the sequence closes a cell that is not whole.
    """
    grid = stream.grid
    whole = grid.stride * K + grid.width - 1 - grid.before <= Q
    ended = LENGTH - 1 <= Q if grid.partial else sympy.false
    return sympy.Or(whole, ended) if causal else sympy.true


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
        Parameter("skip", Kind.SKIP, default=None),
    ),
    attend,
    "one softmax over a set of entries",
    "pattern p { causal slope = tensor(head) return attend(sliding(64), bias = -slope[h] * (q - k)) }",
)
