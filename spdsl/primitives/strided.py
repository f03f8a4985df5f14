"""strided(step): all tokens at distances that are multiples of step (Sparse Transformer, arXiv 1904.10509, 4.3)."""

from __future__ import annotations

import sympy

from spdsl.ir.symbols import K, Q
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def strided(scope: Scope, step: int) -> SetValue:
    return SetValue(((None, sympy.Eq(sympy.Mod(Q - K, step), 0)),))


WORD = Word(
    "strided",
    Kind.SET,
    (Parameter("step", Kind.SIZE, least=1),),
    strided,
    "all tokens whose distance to the query is a multiple of step",
    "pattern p { causal return attend(strided(16) | sliding(16)) }",
)
