"""selection: how the score of a unit follows from the entries it overlaps, and which units are forced or allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from math import gcd

import sympy

from spdsl.ir import interval
from spdsl.ir.conjunct import Conjunct, Linear
from spdsl.ir.pattern import Choice, Grid, Pattern, Stream, Tensor
from spdsl.ir.plan import ChoicePlan
from spdsl.ir.symbols import K_FIRST, Q_FIRST, Q_LAST, Boolean, Expr, K, Q, lookup_name, lookups
from spdsl.passes.disjuncts import TooComplex, disjuncts

MOST_RANKED = 128  # a kernel keeps its best units in registers; longer lists are cut from scores in memory


def ranked(choice: Choice) -> bool:
    """Whether one kernel scores and ranks its units, or one scores them and another cuts the lists."""
    return choice.rows == 1 and (choice.capacity or MOST_RANKED + 1) <= MOST_RANKED


class NotOfUnits(Exception):
    """Whether a unit holds a token that passes does not follow from the unit's ends."""


def selection(pattern: Pattern, choice: Choice) -> ChoicePlan:
    """The plan of a selected choice."""
    assert choice.score is not None
    stream = pattern.input(choice.score.grain.stream)
    assert isinstance(stream, Stream)
    first, overlaps = overlap(stream.grid, choice.unit)
    weights = overlaps if choice.unit_by == "sum" else tuple(1.0 for _ in overlaps)
    started = K_FIRST <= Q if pattern.causal else sympy.true
    softmax = choice.score.softmax
    tests = [term.test for term in softmax.terms] + ([softmax.bias] if softmax.bias is not None else [])
    reads, at_call = (_read(pattern, values) for values in (tests, choice.at_call))
    ratio = choice.unit // stream.grid.stride
    if by_token(choice):
        asked = _read(pattern, (choice.force, choice.within))
        return ChoicePlan(choice, sympy.false, started, first, weights, ratio, reads, at_call, asked, sets=True)
    forced, allowed = (sympy.And(of_units(test, choice.unit), started) for test in (choice.force, choice.within))
    return ChoicePlan(choice, forced, allowed, first, weights, ratio, reads, at_call)


def by_token(choice: Choice) -> bool:
    """Whether torch asks every token of a unit if it passes `force` and `within`: of tiles, where the ends of a unit do
    not tell.
    """
    tests = (choice.force, choice.within)
    known = not any(lookups(test) or test.free_symbols - {Q, K} for test in tests)
    return choice.tiled and not (known and all(_of_ends(test, choice.unit) for test in tests))


def step_of(test: Boolean, unit: int) -> int:
    """Tokens from the first of a unit after which the test may change: it is asked at these alone."""
    steps = {found: int(K / found.args[0]) for found in test.atoms(sympy.floor) if (K / found.args[0]).is_Integer}
    alone = test.xreplace(dict.fromkeys(steps, sympy.S.Zero)).has(K)
    return 1 if alone else gcd(unit, *steps.values())


def _of_ends(test: Boolean, unit: int) -> bool:
    try:
        of_units(test, unit)
    except NotOfUnits:
        return False
    return True


def _read(pattern: Pattern, values: Iterable[sympy.Basic]) -> tuple[Tensor | Choice, ...]:
    """What the values look up."""
    names = dict.fromkeys(lookup_name(read) for value in values for read in lookups(value))
    return tuple(found for found in map(pattern.input, names) if isinstance(found, Tensor | Choice))


def overlap(grid: Grid, unit: int) -> tuple[int, tuple[float, ...]]:
    """Of the entries that share tokens with unit 0: the number of the first, and |entry & unit| / stride of each.

    Stride divides unit, so unit j has the same overlaps with entries j * unit / stride further on. NSA (arXiv
    2502.11089, eq. 9) has 1, 2, 2, 2, 1 from entry -1 on for cells of 32 at stride 16 and units of 64.
    """
    entries = grid.overlapping(unit)
    starts = (entry * grid.stride - grid.before for entry in entries)
    shared = (min(start + grid.width, unit) - max(start, 0) for start in starts)
    return entries.start, tuple(tokens / grid.stride for tokens in shared)


def of_units(test: Boolean, unit: int) -> Boolean:
    """Whether some token of the unit from k_first to k_last passes the test, for the query at q. Raises NotOfUnits.

    Ends of intervals meet in a token of the unit if each two of them do.
    """
    try:
        conjuncts = disjuncts(test)
    except TooComplex as error:
        raise NotOfUnits from error
    found = sympy.Or(*(sympy.And(*_conditions(conjunct, unit)) for conjunct in conjuncts))
    return found.xreplace({Q_FIRST: Q, Q_LAST: Q})


def _conditions(conjunct: Conjunct, unit: int) -> Iterator[Boolean]:
    yield from conjunct.uniform
    yield from (_same_for_all(atom, unit) for atom in conjunct.residual)
    yield from (interval.may(linear.total() >= 0) for linear in conjunct.linears)
    lower = [linear for linear in conjunct.linears if linear.k and linear.k.coefficient > 0]
    upper = [linear for linear in conjunct.linears if linear.k and linear.k.coefficient < 0]
    yield from (sympy.expand(_end(high) - _end(low)) >= 0 for low, high in product(lower, upper))


def _end(linear: Linear) -> Expr:
    """The least k, or the greatest, that a test on k allows the query at q."""
    assert linear.k is not None
    step, rest = linear.k, replace(linear, k=None).total()
    if step.coefficient > 0:
        return step.unit * -sympy.floor(rest / step.coefficient) - step.shift
    return step.unit * (sympy.floor(rest / -step.coefficient) + 1) - step.shift - 1


def _same_for_all(atom: Boolean, unit: int) -> Boolean:
    """An atom at the unit's first token, if it cannot tell the tokens of a unit apart."""
    whole = {found: found.xreplace({K: K_FIRST}) for found in atom.atoms(sympy.floor) if _is_unit(found.args[0], unit)}
    at_first = atom.xreplace(whole)
    if at_first.has(K):
        raise NotOfUnits
    return at_first


def _is_unit(inner: Expr, unit: int) -> bool:
    size = K / inner if inner.has(K) else sympy.S.Zero
    return bool(size.is_Integer and size > 0 and size % unit == 0)
