"""Printed expressions, evaluated as Python, have the value of the expression: negative numbers, signs and brackets."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import sympy

from spdsl.codegen.expressions import PYTHON, TORCH, TRITON, Dialect, expression
from spdsl.ir.symbols import LENGTH, K, Q


def made(rng: random.Random, depth: int) -> sympy.Expr:
    if depth == 0:
        return rng.choice([Q, K, LENGTH, Q, K, sympy.Integer(rng.randint(-9, 9))])
    a, b, n = made(rng, depth - 1), made(rng, depth - 1), rng.randint(1, 9)
    ways = [a + b, a - b, a * b, n * a, -a, sympy.floor(a / n), sympy.floor((a + rng.randint(-9, 9)) / n),
            sympy.Mod(a, n), sympy.Max(a, b), sympy.Min(a, b, n), sympy.Abs(a)]  # fmt: skip
    return rng.choice(ways)


def condition(rng: random.Random, depth: int) -> sympy.Basic:
    if depth == 0:
        kinds = [sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne]
        left = made(rng, rng.randint(0, 2)) / rng.randint(1, 4)
        return rng.choice(kinds)(left, made(rng, rng.randint(0, 1)) / rng.randint(1, 3))
    a, b = condition(rng, depth - 1), condition(rng, depth - 1)
    return rng.choice([sympy.And(a, b), sympy.Or(a, b), sympy.Not(a)])


def truncated_div(a: int, b: int) -> int:
    return int(math.copysign(abs(a) // abs(b), a * b))


class Rounding(int):
    """An integer of a GPU: `//` and `%` round toward zero."""

    def __floordiv__(self, other: int) -> Rounding:
        return Rounding(truncated_div(int(self), int(other)))

    def __mod__(self, other: int) -> Rounding:
        return Rounding(int(self) - int(other) * truncated_div(int(self), int(other)))


for _name in ("add", "sub", "mul", "radd", "rsub", "rmul", "neg"):
    setattr(
        Rounding,
        f"__{_name}__",
        (lambda n: lambda self, *o: Rounding(getattr(int, n)(int(self), *map(int, o))))(f"__{_name}__"),
    )

_WORDS = {
    "max": max, "min": min, "abs": abs, "math": math,
    "rt": SimpleNamespace(
        maximum=max, minimum=min,
        floor_div=lambda a, b: Rounding(int(a) // int(b)), floor_mod=lambda a, b: Rounding(int(a) % int(b)),
    ),
    "tl": SimpleNamespace(maximum=max, minimum=min, abs=lambda a: Rounding(abs(int(a)))),
}  # fmt: skip


@pytest.mark.parametrize("dialect", [PYTHON, TORCH, TRITON], ids=lambda dialect: dialect.name)
def test_round_trip(dialect: Dialect) -> None:
    rng = random.Random(7)
    wrap = Rounding if dialect is TRITON else int
    for _ in range(150):
        boolean = rng.random() < 0.4
        value = condition(rng, rng.randint(0, 2)) if boolean else made(rng, rng.randint(0, 2))
        code = compile(expression(value, dialect), "<printed>", "eval")
        for _ in range(4):
            length = rng.randint(1, 30)
            at = {Q: rng.randint(-20, length), K: rng.randint(0, length), LENGTH: length}
            names = {symbol.name: wrap(number) for symbol, number in at.items()}
            got = eval(code, {**_WORDS, **names})  # noqa: S307 (our own printer's text)
            want = value.xreplace({symbol: sympy.Integer(number) for symbol, number in at.items()})
            if boolean:
                # `~` of a Python truth value is an int: -1 for False, -2 for True; only its last bit counts
                assert bool(int(got) & 1) == bool(want), (value, at)
            else:
                assert int(got) == int(want), (value, at)
