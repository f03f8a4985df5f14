"""cover(set, rows, unit): the set at the grain of tiles; a tile is in it whole when it may hold a pair of the set.

"May" is decided condition by condition of each intersection, so the cover can be larger than the smallest one.
`causal` still masks tokens one by one.
"""

from __future__ import annotations

import sympy

from spdsl.ir.interval import may
from spdsl.ir.symbols import K_FIRST, K_LAST, Q_FIRST, Q_LAST, K, Q, lookups
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def cover(scope: Scope, members: SetValue, rows: int, unit: int) -> SetValue | None:
    if any(read for _, test in members.parts for read in lookups(test)):
        scope.refuse(
            "E105", "a cover of a set that reads tensors or choices is not built yet", "cover static sets only"
        )
        return None
    q_first, k_first = rows * sympy.floor(Q / sympy.Integer(rows)), unit * sympy.floor(K / sympy.Integer(unit))
    corners = {Q_FIRST: q_first, Q_LAST: q_first + rows - 1, K_FIRST: k_first, K_LAST: k_first + unit - 1}
    return SetValue(tuple((stream, may(test).xreplace(corners)) for stream, test in members.parts))


WORD = Word(
    "cover",
    Kind.SET,
    (
        Parameter("members", Kind.SET),
        Parameter("rows", Kind.SIZE, least=1),
        Parameter("unit", Kind.SIZE, least=1),
    ),
    cover,
    "the set in whole tiles of rows x unit",
    "pattern p { causal return attend(cover(sliding(20), rows = 16, unit = 16)) }",
)
