"""ranges: the keys that a tile of rows may see, and the rows that a tile of keys may be seen by, solved symbolically.

For one conjunct both are an interval whose ends follow from the corners of the tile, so a kernel computes them and
no list is ever built. Ends are positions; the kernels turn them into blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, permutations

import sympy

from spdsl.budget import spend
from spdsl.ir.conjunct import Conjunct, Linear, Step
from spdsl.ir.symbols import K_FIRST, K_LAST, LENGTH, Q_BEGIN, Q_END, Q_FIRST, Q_LAST, Expr
from spdsl.ir.visit import Range
from spdsl.passes.affine import nonnegative

STEPS, ROUNDED = 30, 120  # of solving one linear, and one with a quotient that is rounded
MOST_ORDERED = 5  # 5! orders to try; more ranges than that go to a list


def key_range(conjunct: Conjunct) -> Range:
    """The keys for rows q_first..q_last, inside [0, length)."""
    return _range(conjunct, lambda a: (a.k, a.q), (Q_FIRST, Q_LAST), (sympy.S.Zero, LENGTH))


def row_range(conjunct: Conjunct) -> Range:
    """The rows for keys k_first..k_last, inside [q_begin, q_end)."""
    return _range(conjunct, lambda a: (a.q, a.k), (K_FIRST, K_LAST), (Q_BEGIN, Q_END))


Sides = Callable[[Linear], tuple[Step | None, Step | None]]


def _range(conjunct: Conjunct, sides: Sides, tile: tuple[Expr, Expr], bounds: tuple[Expr, Expr]) -> Range:
    """Solves each linear for the first of its `sides`, with the second at the tile's best and worst corner."""
    quotients = sum(1 for one in conjunct.linears for step in (one.q, one.k) if step is not None and step.unit > 1)
    spend(STEPS * (1 + len(conjunct.linears)) + ROUNDED * quotients)
    may, must = _Interval(*bounds), _Interval(*bounds)
    for linear in conjunct.linears:
        wanted, other = sides(linear)
        for interval, best in ((may, True), (must, False)):
            interval.meet(wanted, linear.constant + _extreme(other, tile, best))
    uniform = sympy.And(*conjunct.uniform)
    full = sympy.false if conjunct.residual else sympy.And(uniform, must.condition)
    may_visit = sympy.And(uniform, may.condition)
    firsts = (extremum(sympy.Max, interval.firsts) for interval in (may, must))
    ends = (extremum(sympy.Min, interval.ends) for interval in (may, must))
    (first, full_first), (end, full_end) = firsts, ends
    return Range(first, end, may_visit, full_first, full_end, full)


def _extreme(step: Step | None, tile: tuple[Expr, Expr], largest: bool) -> Expr:
    """The largest (or smallest) value of a monotone step over the tile."""
    if step is None:
        return sympy.S.Zero
    first, last = tile
    return step.coefficient * step.of(last if (step.coefficient > 0) == largest else first)


class _Interval:
    """[first, end) under construction: what first is the largest of, and end the least; with the condition under
    which it is not empty for other reasons.
    """

    def __init__(self, first: Expr, end: Expr) -> None:
        self.firsts, self.ends, self.condition = [first], [end], sympy.true

    def meet(self, step: Step | None, rest: Expr) -> None:
        """Intersects with the x for which `step(x) + rest >= 0`."""
        if step is None:
            self.condition = sympy.And(self.condition, rest >= 0)
        elif step.coefficient > 0:
            lowest = -sympy.floor(rest / step.coefficient)
            self.firsts.append(sympy.expand(step.unit * lowest - step.shift))
        else:
            highest = sympy.floor(rest / -step.coefficient)
            self.ends.append(sympy.expand(step.unit * (highest + 1) - step.shift))


def extremum(kind: type[sympy.Max | sympy.Min], candidates: Sequence[Expr]) -> Expr:
    """The Max or Min without the arguments that another one provably outdoes."""

    def outdoes(one: Expr, other: Expr) -> bool:
        return nonnegative(one, other) if kind is sympy.Max else nonnegative(other, one)

    kept: list[Expr] = []
    for candidate in sorted(dict.fromkeys(candidates), key=sympy.default_sort_key):
        if any(outdoes(known, candidate) for known in kept):
            continue
        kept = [known for known in kept if not outdoes(candidate, known)] + [candidate]
    return _plain(kind, kept)


def _plain(kind: type[sympy.Max | sympy.Min], parts: Sequence[Expr]) -> Expr:
    """Without sympy's own search for arguments that others outdo, which takes longer than all else and finds less."""
    return parts[0] if len(parts) == 1 else kind(*parts, evaluate=False)


def ordered(ranges: Sequence[Range]) -> tuple[int, ...] | None:
    """An order in which `first` provably never falls, whatever the tile; None if there is none.

    Then a running cursor over blocks visits the union of the ranges with no block twice.
    """
    if len(ranges) > MOST_ORDERED:
        return None
    below = {(i, j): _never_above(ranges[i].first, ranges[j].first) for i, j in permutations(range(len(ranges)), 2)}
    for order in permutations(range(len(ranges))):
        if all(below[i, j] for i, j in pairwise(order)):
            return order
    return None


def _never_above(low: Expr, high: Expr) -> bool:
    """low <= high for every tile: each argument of low's Max is provably below one of high's."""
    highs = sympy.Max.make_args(high)
    return all(any(nonnegative(top, bottom) for top in highs) for bottom in sympy.Max.make_args(low))
