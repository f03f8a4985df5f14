"""first(n, unit = u): the first n units of u tokens."""

from __future__ import annotations

from spdsl.ir.symbols import K
from spdsl.primitives.word import UNIT_OF_CHOICE, Kind, Parameter, Scope, SetValue, Word


def first(scope: Scope, n: int, unit: int) -> SetValue:
    return SetValue(((None, n * unit > K),))


WORD = Word(
    "first",
    Kind.SET,
    (Parameter("n", Kind.SIZE, least=1), Parameter("unit", Kind.SIZE, default=UNIT_OF_CHOICE, least=1)),
    first,
    "the first n units of `unit` tokens",
    "pattern p { causal return attend(first(1, unit = 16) | last(2, unit = 16)) }",
)
