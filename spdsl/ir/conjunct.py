"""Element tests in disjunctive form: what the range, tile and overlap analyses read.

A conjunct is an And of atoms, sorted by what can be done with them:
  linears    a*step(k) + b*step(q) + c >= 0, step(x) = floor((x + shift) / unit): solvable for k and for q
  uniform    free of q and k: the same for a whole tile of one head
  residual   everything else: masks only
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from spdsl.ir.symbols import Boolean, Expr, K, Q


@dataclass(frozen=True, slots=True)
class Step:
    """`coefficient * floor((x + shift) / unit)` of a position x; unit 1 and shift 0 is the position itself."""

    coefficient: int
    unit: int = 1
    shift: int = 0

    def of(self, x: Expr) -> Expr:
        """The step at x, without its coefficient."""
        return x + self.shift if self.unit == 1 else sympy.floor((x + self.shift) / self.unit)


@dataclass(frozen=True, slots=True)
class Linear:
    """`k + q + constant >= 0`, the constant free of q, k and h."""

    k: Step | None
    q: Step | None
    constant: Expr

    def total(self, q: Expr = Q, k: Expr = K) -> Expr:
        """The left side as an expression."""
        from_k = self.k.coefficient * self.k.of(k) if self.k else sympy.S.Zero
        from_q = self.q.coefficient * self.q.of(q) if self.q else sympy.S.Zero
        return from_k + from_q + self.constant


@dataclass(frozen=True, slots=True)
class Conjunct:
    linears: tuple[Linear, ...] = ()
    uniform: tuple[Boolean, ...] = ()
    residual: tuple[Boolean, ...] = ()

    def __and__(self, other: Conjunct) -> Conjunct:
        return Conjunct(
            tuple(dict.fromkeys(self.linears + other.linears)),
            tuple(dict.fromkeys(self.uniform + other.uniform)),
            tuple(dict.fromkeys(self.residual + other.residual)),
        )

    def test(self) -> Boolean:
        """The conjunct as one Boolean again."""
        return sympy.And(*(linear.total() >= 0 for linear in self.linears), *self.uniform, *self.residual)
