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

    @property
    def base(self) -> tuple[int, int]:
        """(unit, shift) with 0 <= shift < unit: steps of one base differ by a number only."""
        return self.unit, self.shift % self.unit

    @property
    def offset(self) -> int:
        """What a step of that base lacks."""
        return self.coefficient * (self.shift // self.unit)


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

    def plus(self, other: Linear, times: int = 1) -> Sum:
        """self + times * other, without expanding expressions: `disjuncts` compares each with all."""
        return Sum(self, 1).add(other, times)

    @property
    def is_nonnegative(self) -> bool:
        """Whether it holds wherever k and length are not negative."""
        return Sum(self, 1).is_nonnegative


class Sum:
    """Multiples of linears: coefficients of the steps of k and of q by their bases, and a constant."""

    __slots__ = ("constant", "steps")

    def __init__(self, linear: Linear, times: int) -> None:
        self.steps: dict[tuple[bool, tuple[int, int]], int] = {}
        self.constant: Expr | int = 0
        self.add(linear, times)

    def add(self, linear: Linear, times: int) -> Sum:
        whole = linear.constant
        self.constant += times * (int(whole) if whole.is_Integer else whole)
        for step, of_k in ((linear.k, True), (linear.q, False)):
            if step is not None:
                place = (of_k, step.base)
                self.steps[place] = self.steps.get(place, 0) + times * step.coefficient
                self.constant += times * step.offset
        return self

    @property
    def number(self) -> Expr | int | None:
        """Its value, if it is the same at all positions and lengths."""
        if any(self.steps.values()):
            return None
        found = self.constant if isinstance(self.constant, int) else sympy.expand(self.constant)
        return found if isinstance(found, int) or found.is_number else None

    @property
    def is_nonnegative(self) -> bool:
        """Whether no position and no length makes it negative: k is not, q may be."""
        if any(times < 0 or (times and not of_k) for (of_k, _), times in self.steps.items()):
            return False
        if isinstance(self.constant, int):
            return self.constant >= 0
        return bool(sympy.expand(self.constant).is_nonnegative)


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
