"""sliding(n, ahead = m): the n most recent tokens, the query's own included, and m tokens ahead."""

from __future__ import annotations

import sympy

from spdsl.ir.symbols import K, Q
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def sliding(scope: Scope, n: int, ahead: int) -> SetValue:
    return SetValue(((None, sympy.And(Q - K < n, K - Q <= ahead if ahead else K <= Q)),))


WORD = Word(
    "sliding",
    Kind.SET,
    (Parameter("n", Kind.SIZE, least=1), Parameter("ahead", Kind.SIZE, default=0, least=0)),
    sliding,
    "the n most recent tokens, the query's own included: 0 <= q - k < n; with ahead: -ahead <= q - k < n",
    "pattern p { param window = 64 allow(W404) return attend(sliding(window, ahead = 8)) }",
)
