"""fixed(stride, summary): the query's own block, and the last `summary` tokens of every block.

The fixed form of the Sparse Transformer (arXiv 1904.10509, 4.3).
"""

from __future__ import annotations

import sympy

from spdsl.ir.symbols import K, Q
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def fixed(scope: Scope, stride: int, summary: int) -> SetValue | None:
    if summary > stride:
        scope.refuse(
            "E203", f"a block of {stride} tokens has no last {summary}", f"use at most fixed({stride}, {stride})"
        )
        return None
    own = sympy.floor(Q / stride)
    own_block = sympy.And(stride * own <= K, stride * (own + 1) > K)
    return SetValue(((None, sympy.Or(own_block, sympy.Mod(K, stride) >= stride - summary)),))


WORD = Word(
    "fixed",
    Kind.SET,
    (Parameter("stride", Kind.SIZE, least=1), Parameter("summary", Kind.SIZE, least=1)),
    fixed,
    "the query's own block of `stride` tokens, and the last `summary` tokens of every block",
    "pattern p { causal return attend(fixed(32, 4)) }",
)
