"""name = given(unit, rows, share, most): a set that the caller passes as lists of unit indices.

Argument `name`: int [B, heads, row tiles, most], padded with -1; order and repetition do not matter. With `share = all`
there is one head, for all of the pattern's.
"""

from __future__ import annotations

from spdsl.ir.pattern import Choice
from spdsl.ir.rule import Given
from spdsl.primitives.random import member
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def given(scope: Scope, unit: int, rows: int, share: str, most: int | None) -> SetValue:
    scope.add(Choice(scope.name, Given(), unit, rows, share, most=most, span=scope.span))
    return member(scope.name, unit, rows)


WORD = Word(
    "given",
    Kind.SET,
    (
        Parameter("unit", Kind.SIZE, default=1, least=1),
        Parameter("rows", Kind.SIZE, default=1, least=1),
        Parameter("share", Kind.CHOICE, default="group", words=("head", "group", "all")),
        Parameter("most", Kind.SIZE, default=None, least=1),
    ),
    given,
    "a set that the caller passes: unit indices per tile of rows, padded with -1",
    "pattern p { allow(W504) tiles = given(rows = 32, unit = 32, share = head) return attend(tiles) }",
)
