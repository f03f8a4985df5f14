"""random(n, unit, rows, seed, share): n units of those visible, drawn per tile of rows by a fixed hash (BigBird, arXiv
2007.14062).

The draw depends on seed, head, row tile and unit alone, so that it is the same on every device and in every phase:
the n visible units of lowest hash win.
"""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Choice
from spdsl.ir.rule import Drawn, Size
from spdsl.ir.symbols import H, K, Q, membership
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def random(scope: Scope, n: int, unit: int, rows: int, seed: int, share: str) -> SetValue:
    scope.add(Choice(scope.name, Drawn(Size.of(n), seed), unit, rows, share, span=scope.span))
    return member(scope.name, unit, rows)


def member(name: str, unit: int, rows: int) -> SetValue:
    """The set of a Choice: its membership map read at (h, row tile, unit)."""
    read = membership(name, H, sympy.floor(Q / sympy.Integer(rows)), sympy.floor(K / sympy.Integer(unit)))
    return SetValue(((None, sympy.Ne(read, 0)),))


WORD = Word(
    "random",
    Kind.SET,
    (
        Parameter("n", Kind.SIZE, least=1),
        Parameter("unit", Kind.SIZE, default=64, least=1),
        Parameter("rows", Kind.SIZE, default=64, least=1),
        Parameter("seed", Kind.SIZE, default=0, least=0),
        Parameter("share", Kind.CHOICE, default="head", words=("head", "group")),
    ),
    random,
    "n units of those visible, drawn per tile of rows from a seed",
    "pattern p { allow(W404, W504) return attend(random(2, unit = 16, rows = 16)) }",
)
