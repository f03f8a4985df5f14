"""open(unit): the tokens of units that have not closed yet: from the last full unit's end up to the query."""

from __future__ import annotations

import sympy

from spdsl.ir.symbols import K, Q
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def open_(scope: Scope, unit: int) -> SetValue:
    return SetValue(((None, sympy.And(unit * sympy.floor((Q + 1) / sympy.Integer(unit)) <= K, K <= Q)),))


WORD = Word(
    "open",
    Kind.SET,
    (Parameter("unit", Kind.SIZE, least=1),),
    open_,
    "the tokens of the unit that has not closed yet; none right when a unit closes",
    "pattern p { causal return attend(sink(4) | open(16)) }",
)
