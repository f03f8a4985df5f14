"""dilated(n, step): n tokens at distances 0, step, 2 step, ... behind the query (Longformer, arXiv 2004.05150, 3.1)."""

from __future__ import annotations

import sympy

from spdsl.ir.symbols import K, Q
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def dilated(scope: Scope, n: int, step: int) -> SetValue:
    return SetValue(((None, sympy.And(K <= Q, Q - K < n * step, sympy.Eq(sympy.Mod(Q - K, step), 0))),))


WORD = Word(
    "dilated",
    Kind.SET,
    (Parameter("n", Kind.SIZE, least=1), Parameter("step", Kind.SIZE, least=1)),
    dilated,
    "n tokens at distances 0, step, 2 step, ... behind the query",
    "pattern p { causal return attend(dilated(16, 4)) }",
)
