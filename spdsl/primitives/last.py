"""last(n, unit = u, ahead = m, rows = r): the query's own unit, the n - 1 before it and the m after it.

With `rows`, a tile of r queries sees what its last query sees (a unit is chosen per tile; `causal` still masks tokens).
"""

from __future__ import annotations

import sympy

from spdsl.ir.symbols import K, Q
from spdsl.primitives.word import UNIT_OF_CHOICE, Kind, Parameter, Scope, SetValue, Word


def last(scope: Scope, n: int, unit: int, ahead: int, rows: int) -> SetValue | None:
    if rows % unit == 0:
        own = (rows // unit) * sympy.floor(Q / rows) + (rows - 1) // unit
    elif unit % rows == 0:
        own = sympy.floor(Q / unit)
    else:
        scope.refuse(
            "E203",
            f"rows = {rows} and unit = {unit} do not divide one another",
            "choose one as a multiple of the other",
        )
        return None
    return SetValue(((None, sympy.And(unit * (own - n + 1) <= K, unit * (own + ahead + 1) > K)),))


WORD = Word(
    "last",
    Kind.SET,
    (
        Parameter("n", Kind.SIZE, least=1),
        Parameter("unit", Kind.SIZE, default=UNIT_OF_CHOICE, least=1),
        Parameter("ahead", Kind.SIZE, default=0, least=0),
        Parameter("rows", Kind.SIZE, default=1, least=1),
    ),
    last,
    "the query's own unit, the n - 1 units before it and `ahead` units after it",
    "pattern p { allow(W404) return attend(last(2, unit = 16, ahead = 1)) }",
)
